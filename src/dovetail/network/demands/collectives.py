"""Collectives as flows in steps: all-to-all, rings, trees and point-to-point.

    all-to-all          each rank sends size / n to every rank
    ring                each rank sends size / n to the next one, in n - 1 steps to gather or to reduce-scatter, and in
                        2 (n - 1) steps to all-reduce
    tree                sums go up and results down two binary trees with half of the bytes each, in pieces that follow
                        each other; a rank is inside one tree and a leaf of the other

`size` is what nccl-tests calls size: for an all-to-all the bytes of one rank, for the others the whole tensor. The
algorithm bandwidth is size over time, and the bus bandwidth is that times `bus_factor`. Expert exchanges are in
`network.demands.experts`, sends between parts of the GPUs in `network.demands.transfers`.
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
    """Flows that start together. The step is over when all have ended, and runs `times` times in a row."""

    flows: Flows
    times: int = 1
    messages: Floats | float = 1.0  # the number of messages that each flow is posted as
    posted_by: Poster = "host"
    hops: int = 1  # messages in a row that wait for each other, as on the levels of a tree


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
        """The bytes that all ranks together send."""
        return float(sum(step.times * step.flows.bytes.sum() for step in self.steps))


def collective(name: str, gpus: Sequence[int], size: float, gpus_per_node: int = 1, channels: int = 1) -> Demand:
    """Return the collective `name` (one of COLLECTIVES) among `gpus`.

    Raises ValueError for another name, a negative size, fewer than two GPUs, and a GPU given twice.
    """
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
    """Return each rank's `size` bytes in equal parts to all ranks. Its part to itself stays where it is."""
    ranks = checked_ranks(gpus, size)
    count = len(ranks)
    source, destination = np.divmod(np.arange(count * count, dtype=np.int64), count)
    goes = source != destination
    flows = Flows.of(ranks[source[goes]], ranks[destination[goes]], size / count)
    step = Step(flows=flows)
    return Demand(name="all-to-all", ranks=count, size=size, bus_factor=(count - 1) / count, steps=(step,))


def ring_orders(gpus: Sequence[int], gpus_per_node: int = 1, channels: int = 1) -> list[NDArray[np.int32]]:
    """Return the order of the GPUs in each channel's ring.

    A ring goes node by node, and within a node it starts with GPU `channel`, so that channels leave nodes through
    different NICs. Raises ValueError for less than one channel.
    """
    ranks = checked_ranks(gpus, 0.0)
    if channels < 1:
        raise ValueError(f"channels = {channels}: use 1 or more")
    nodes = [ranks[ranks // gpus_per_node == node] for node in np.unique(ranks // gpus_per_node)]
    return [np.concatenate([np.roll(each, -channel) for each in nodes]) for channel in range(channels)]


def in_rings(name: Ring, rings: Sequence[NDArray[np.int32]], size: float) -> Demand:
    """Return the collective with its bytes divided evenly among the rings, and in each ring among its ranks."""
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
    """Return both trees, and both directions of each, at the same time; the levels add their latencies."""
    ranks = checked_ranks(gpus, size)
    count = len(ranks)
    parents = _tree(count)
    child = np.flatnonzero(parents >= 0)
    parts = []
    for order in (
        ranks,
        np.roll(ranks[::-1], 1 if count % 2 else 0),
    ):  # the second is mirrored, so that leaves become inner ranks
        up = Flows.of(order[child], order[parents[child]], size / 2)
        parts += [up, up.reversed()]
    levels = 2 * max(1, int(np.ceil(np.log2(count))))
    step = Step(flows=joined(parts), hops=levels)
    return Demand(name="tree-all-reduce", ranks=count, size=size, bus_factor=2 * (count - 1) / count, steps=(step,))


def _tree(count: int) -> NDArray[np.int64]:
    """Return the parent of each rank in a binary tree whose odd ranks are leaves; the root, rank 0, has -1.

    The parent has the lowest set bit cleared and the next bit set.
    """
    parents = np.full(count, -1)
    for rank in range(1, count):
        low = rank & -rank
        parent = (rank ^ low) | (low << 1)
        parents[rank] = parent if parent < count else rank ^ low
    return parents


def point_to_point(pairs: Sequence[tuple[int, int]], size: float) -> Demand:
    """Return `size` bytes for each pair of source and destination. Raises ValueError without pairs."""
    if not pairs:
        raise ValueError("point-to-point between no pairs: give at least one")
    check_size(size)
    source, destination = np.asarray(pairs, np.int32).T
    flows = Flows.of(source, destination, size)
    ranks = len(np.unique([source, destination]))
    return Demand(name="point-to-point", ranks=ranks, size=size, bus_factor=1.0, steps=(Step(flows=flows),))


def checked_ranks(gpus: Sequence[int] | NDArray[np.int32], size: float) -> NDArray[np.int32]:
    """Return `gpus` as an array. Raises ValueError for fewer than two, a GPU given twice, and an illegal size."""
    ranks = np.asarray(gpus, np.int32)
    if len(ranks) < 2 or len(np.unique(ranks)) < len(ranks):
        raise ValueError(f"{len(ranks)} GPUs, {len(np.unique(ranks))} of them different: give at least 2, each once")
    check_size(size)
    return ranks


def check_size(size: float) -> None:
    """Raise ValueError for bytes that are negative or not finite."""
    if not 0 <= size < np.inf:
        raise ValueError(f"size = {size} bytes: must be finite and not negative")
