"""What collectives ask of the network: flows, in steps that follow each other.

    all-to-all          each rank sends size / n to every rank
    ring                n - 1 steps to gather or to reduce-scatter, 2 (n - 1) to all-reduce, of size / n to the next
    tree                reduce up and broadcast down two binary trees, half of the bytes each, pieces in a pipeline;
                        a rank is inside one tree and a leaf of the other

`size` is what nccl-tests calls so: of all-to-all what one rank holds, of the others the whole tensor; algorithm
bandwidth is size over time, and bus bandwidth that times `bus_factor`. For experts see `network.demands.experts`, for
what goes from one part of the GPUs to another `network.demands.transfers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from dovetail.config import near_matches
from dovetail.network.flows.flows import Floats, Flows, joined
from dovetail.spec.fabric import Poster

Ring = Literal["all-gather", "reduce-scatter", "all-reduce"]
RINGS = get_args(Ring)
COLLECTIVES = ("all-to-all", *RINGS, "tree-all-reduce", "point-to-point")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """Flows that start together; the step is over when all have ended, and is run `times` times in a row."""

    flows: Flows
    times: int = 1
    messages: Floats | float = 1.0  # that each flow is posted as
    posted_by: Poster = "host"
    hops: int = 1  # messages that wait for one another: levels of a tree


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Demand:
    """One collective among `ranks` GPUs."""

    name: str
    ranks: int
    size: float  # bytes
    bus_factor: float
    steps: tuple[Step, ...]

    @property
    def bytes_sent(self) -> float:
        """By all ranks together."""
        return float(sum(step.times * step.flows.bytes.sum() for step in self.steps))


def collective(name: str, gpus: Sequence[int], size: float, gpus_per_node: int = 1, channels: int = 1) -> Demand:
    """The collective called `name` (of COLLECTIVES) among `gpus`. Raises ValueError for another name, for a negative
    size and for fewer than two GPUs, or one twice."""
    if name not in COLLECTIVES:
        raise ValueError(f"no collective {name!r}; {near_matches(name, COLLECTIVES)}")
    ring = ring_orders(gpus, gpus_per_node, channels)
    if name == "all-to-all":
        return all_to_all(gpus, size)
    if name == "tree-all-reduce":
        return tree_all_reduce(gpus, size)
    if name == "point-to-point":
        return point_to_point([(int(gpus[0]), int(gpus[-1]))], size)
    return in_rings(cast(Ring, name), ring, size)


def all_to_all(gpus: Sequence[int], size: float) -> Demand:
    """Each rank's `size` bytes in equal parts to all ranks, itself included: that part stays where it is."""
    ranks = checked_ranks(gpus, size)
    count = len(ranks)
    source, destination = np.divmod(np.arange(count * count, dtype=np.int64), count)
    goes = source != destination
    flows = Flows.of(ranks[source[goes]], ranks[destination[goes]], size / count)
    step = Step(flows=flows)
    return Demand(name="all-to-all", ranks=count, size=size, bus_factor=(count - 1) / count, steps=(step,))


def ring_orders(gpus: Sequence[int], gpus_per_node: int = 1, channels: int = 1) -> list[NDArray[np.int32]]:
    """The GPUs in a ring for each channel: node by node, and within nodes from GPU `channel` on, so that channels
    leave nodes through different NICs. Raises ValueError for channels below 1."""
    ranks = checked_ranks(gpus, 0.0)
    if channels < 1:
        raise ValueError(f"channels = {channels}: at least 1")
    nodes = [ranks[ranks // gpus_per_node == node] for node in np.unique(ranks // gpus_per_node)]
    return [np.concatenate([np.roll(each, -channel) for each in nodes]) for channel in range(channels)]


def in_rings(name: Ring, rings: Sequence[NDArray[np.int32]], size: float) -> Demand:
    """Bytes cut evenly over the rings, and in each over its ranks."""
    count = len(checked_ranks(rings[0], size))
    part = size / count / len(rings)
    flows = joined([Flows.of(ring, np.roll(ring, -1), part, queue_pair=index) for index, ring in enumerate(rings)])
    rounds = 2 if name == "all-reduce" else 1
    return Demand(
        name=name,
        ranks=count,
        size=size,
        bus_factor=rounds * (count - 1) / count,
        steps=(Step(flows=flows, times=rounds * (count - 1)),),
    )


def tree_all_reduce(gpus: Sequence[int], size: float) -> Demand:
    """Both trees, and both directions of each, at once; the levels add their latencies."""
    ranks = checked_ranks(gpus, size)
    count = len(ranks)
    parents = _tree(count)
    child = np.flatnonzero(parents >= 0)
    parts = []
    for order in (ranks, np.roll(ranks[::-1], 1 if count % 2 else 0)):  # mirrored, so that leaves become inner ranks
        up = Flows.of(order[child], order[parents[child]], size / 2)
        parts += [up, up.reversed()]
    levels = 2 * max(1, int(np.ceil(np.log2(count))))
    step = Step(flows=joined(parts), hops=levels)
    return Demand(name="tree-all-reduce", ranks=count, size=size, bus_factor=2 * (count - 1) / count, steps=(step,))


def _tree(count: int) -> NDArray[np.int64]:
    """Parent of each rank in a binary tree whose odd ranks are leaves: clear the lowest bit that is set, set the next;
    -1 for the root, rank 0."""
    parents = np.full(count, -1)
    for rank in range(1, count):
        low = rank & -rank
        parent = (rank ^ low) | (low << 1)
        parents[rank] = parent if parent < count else rank ^ low
    return parents


def point_to_point(pairs: Sequence[tuple[int, int]], size: float) -> Demand:
    """`size` bytes for each pair of source and destination."""
    if not pairs:
        raise ValueError("point-to-point between no pairs: give at least one")
    check_size(size)
    source, destination = np.asarray(pairs, np.int32).T
    flows = Flows.of(source, destination, size)
    ranks = len(np.unique([source, destination]))
    return Demand(name="point-to-point", ranks=ranks, size=size, bus_factor=1.0, steps=(Step(flows=flows),))


def checked_ranks(gpus: Sequence[int] | NDArray[np.int32], size: float) -> NDArray[np.int32]:
    """`gpus` as an array. Raises ValueError for fewer than two, for one twice and for a size that is none."""
    ranks = np.asarray(gpus, np.int32)
    if len(ranks) < 2 or len(np.unique(ranks)) < len(ranks):
        raise ValueError(f"{len(ranks)} GPUs, {len(np.unique(ranks))} of them different: give at least 2, each once")
    check_size(size)
    return ranks


def check_size(size: float) -> None:
    """Raises ValueError for bytes that are negative or not finite."""
    if not 0 <= size < np.inf:
        raise ValueError(f"size = {size} bytes: must be finite and not negative")
