"""The ranks of a layout, and the groups in which they exchange.

Ranks are numbered as the planner numbers them (`network.delivery.layout_traffic`): neighbours share the experts, copies
of the experts come next, stages of the pipeline last.

    rank  = (stage * copies + copy) * ep + member       copies = dp / ep
    node  = rank // ranks_per_node

    pp      the ranks of one pipeline, in its order: all of them have the same tokens
    dp      all ranks of a stage: each has other tokens, and the same weights but for the experts
    ep      ranks that share one copy of the experts; member m has the m-th of their contiguous blocks
    edp     ranks that have the same experts
    node    of an ep group, the ranks on one node
    rail    of an ep group, the ranks with the same index on their nodes

A "stage" is here a rank of the pipeline, which may hold several stages of the model: a schedule says which. An ep group
is whole nodes, or a part of one: then it has node = ep, and each rank is a rail of its own. DeepSeek-V3 trained with
pp 16 and ep 64 on nodes of 8 [V3 §3.2]. No tensor parallelism so far.

Between neighbours of a pipeline, whose last rank is the first one's neighbour, there is a group of two for each
direction (`links`). So a message waits for those that the same rank sent before it, and for no other, on backends too
that carry out the messages of a group in order, as NCCL does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from dovetail.parallel.turns import Turns
from dovetail.spec.layout import Layout, divisors, nearest_divisor

HALF_AN_HOUR = timedelta(minutes=30)  # as gloo has it


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Ranks that exchange with each other."""

    handle: dist.ProcessGroup
    ranks: tuple[int, ...]  # in the world, in the order of the group
    index: int  # of this rank in the group
    is_near: tuple[bool, ...]  # of each rank: whether it is on this rank's node
    turns: Turns  # one for all groups of a mesh: who computes while an exchange is under way
    is_checked: bool = False  # whether messages have checksums; the same in all groups of a mesh

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A rank's place, and what all its groups have in common."""

    rank: int
    ranks_per_node: int
    turns: Turns
    is_checked: bool  # whether messages have checksums
    deadline: timedelta  # of an exchange


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh(Seat):
    """This process's groups."""

    links: Mapping[tuple[int, int], dist.ProcessGroup]  # (from, to) in the world, of those from and to this rank
    pp: Group
    dp: Group
    ep: Group
    edp: Group
    node: Group
    rail: Group


def form_mesh(
    layout: Layout,
    ranks_per_node: int | None = None,
    is_checked: bool = False,
    deadline: timedelta = HALF_AN_HOUR,
) -> Mesh:
    """Form the groups of `layout` from the ranks of the default process group; all ranks call it together.

    `ranks_per_node` is what torchrun started on this node unless given. Raises ValueError, the same on all ranks, where
    ranks differ in either, and for what `check_ranks` refuses.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if ranks_per_node is None:
        ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))  # set by torchrun
    _check_agreement(layout, ranks_per_node, world)
    check_ranks(layout, world, ranks_per_node)
    found = partitions(layout, ranks_per_node)
    seat = {
        "rank": rank,
        "ranks_per_node": ranks_per_node,
        "turns": Turns(),
        "is_checked": is_checked,
        "deadline": deadline,
    }
    groups = {name: _own_group(name, ranks, Seat(**seat)) for name, ranks in found.items()}
    pairs = neighbours(found["pp"])
    links = {pair: dist.new_group(list(pair), timeout=deadline, group_desc="link") for pair in pairs}
    return Mesh(**seat, links={pair: handle for pair, handle in links.items() if rank in pair}, **groups)


def check_ranks(layout: Layout, world: int, ranks_per_node: int) -> None:
    """Raise ValueError, with the nearest legal value, unless `world` ranks on such nodes can run `layout`."""
    if layout.tp > 1:
        raise ValueError(
            f"tp = {layout.tp} is planned but does not run yet: set tp = 1, and dp = {layout.dp * layout.tp}"
        )
    if world != layout.gpus:
        needed = f"dp = {layout.dp}" + (f" x pp = {layout.pp}" if layout.pp > 1 else "")
        remedy = f"set dp = {world // layout.pp}, or start" if world % layout.pp == 0 else "start"
        raise ValueError(f"{needed} needs {layout.gpus} ranks, and {world} were started: {remedy} {layout.gpus}")
    if layout.dp % layout.ep:
        raise ValueError(
            f"ep = {layout.ep} does not divide the {layout.dp} ranks of a stage; nearest: ep = "
            f"{nearest_divisor(layout.ep, layout.dp)}"
        )
    if ranks_per_node < 1 or world % ranks_per_node:
        raise ValueError(
            f"ranks_per_node = {ranks_per_node} does not divide the {world} ranks; nearest: "
            f"{nearest_divisor(ranks_per_node, world)}"
        )
    if not _fits_nodes(layout.ep, ranks_per_node):
        legal = [ep for ep in divisors(layout.dp) if _fits_nodes(ep, ranks_per_node)]
        raise ValueError(
            f"ep = {layout.ep} on nodes of {ranks_per_node} ranks: ranks that share experts are whole nodes or an "
            f"equal part of one; nearest: ep = {min(legal, key=lambda ep: (abs(ep - layout.ep), ep))}"
        )


def partitions(layout: Layout, ranks_per_node: int) -> dict[str, NDArray[np.int64]]:
    """Return, for each kind of group, the ranks of all groups of that kind [groups, size]."""
    copies, each = layout.expert_replicas, min(layout.ep, ranks_per_node)
    grid = np.arange(layout.gpus).reshape(layout.pp, copies, layout.ep // each, each)
    return {
        "pp": grid.reshape(layout.pp, layout.dp).T,
        "dp": grid.reshape(layout.pp, layout.dp),
        "ep": grid.reshape(-1, layout.ep),
        "edp": grid.transpose(0, 2, 3, 1).reshape(-1, copies),
        "node": grid.reshape(-1, each),
        "rail": grid.transpose(0, 1, 3, 2).reshape(-1, layout.ep // each),
    }


def neighbours(pipelines: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Each pair (from, to) of neighbours in pipelines [pipelines, ranks], both ways, all pipelines in turn."""
    for ranks in pipelines.tolist():
        ring = [*ranks, *ranks[:1]] if len(ranks) > 2 else ranks
        for one, other in pairwise(ring):
            yield one, other
            yield other, one


def _fits_nodes(ep: int, ranks_per_node: int) -> bool:
    return ep % ranks_per_node == 0 or ranks_per_node % ep == 0


def _check_agreement(layout: Layout, ranks_per_node: int, world: int) -> None:
    known: list[tuple[Layout, int]] = [(layout, ranks_per_node)] * world
    dist.all_gather_object(known, (layout, ranks_per_node))
    for rank, (other, count) in enumerate(known):
        if other != known[0][0]:
            raise ValueError(f"rank 0 has the layout {known[0][0]}, rank {rank} has {other}: give all ranks the same")
        if count != known[0][1]:
            raise ValueError(
                f"the node of rank 0 has {known[0][1]} ranks, that of rank {rank} has {count}: start as many on each"
            )


def make_group(handle: dist.ProcessGroup, ranks: Sequence[int], seat: Seat) -> Group:
    """This rank's group of `ranks`, of which it is one."""
    nodes = [other // seat.ranks_per_node for other in ranks]
    index = ranks.index(seat.rank)
    return Group(
        handle=handle,
        ranks=tuple(ranks),
        index=index,
        is_near=tuple(node == nodes[index] for node in nodes),
        turns=seat.turns,
        is_checked=seat.is_checked,
    )


def _own_group(name: str, ranks: NDArray[np.int64], seat: Seat) -> Group:
    handle, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=seat.deadline, group_desc=name)
    own: list[int] = ranks[(ranks == seat.rank).any(axis=1)][0].tolist()
    return make_group(handle, own, seat)
