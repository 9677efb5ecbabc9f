"""Sums and gathers among ranks that share a weight: a leg inside nodes, and a leg across them.

    sum      [ranks, width]  --- node --->  [nodes, width]  --- rail --->  [width]
    gather   [ranks, width]  <--- node ---  [nodes, width]  <--- rail ---  [width]

`node` are the ranks on one node, `rail` those with the same index on their nodes. What a rank sends over its NIC is
summed over its node before, and passed on inside the other node afterwards. Of n ranks, g of them on each node, and a
tensor of S bytes, each rank sends (`network.demands.closed_forms.collective_bytes`)

    node     S (g - 1) / g
    rail     S / g (n / g - 1) / (n / g)

Directly it would be g times as much over the NIC. Ranks on one node, ranks with a node each, and ranks that nodes have
in different numbers, have one leg among all of them.

In a leg of a sum each rank sends every other one its part and adds up what comes, in FP32 and in the order of ranks. So
a sum is that of the ranks of each node, in their order, and then of the nodes in theirs: ((a + b) + (c + d)) on two
nodes of two. Its bits depend on the ranks and on how many of them a node has, and on nothing else. A leg of a gather is
a ring. gloo's own reduce-scatter is an all-reduce, which is twice the bytes, and sums in an order that varies with the
place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from dovetail.parallel.mesh import Group, Mesh, make_group
from dovetail.parallel.traffic import Traffic, opened, sealed


@dataclass(frozen=True, slots=True, kw_only=True)
class Legs:
    """This rank's groups among ranks that share weights, in the order of a sum."""

    groups: tuple[Group, ...]
    ranks: tuple[int, ...]  # all of them, in the order of rows
    place: int  # of this rank's row

    @property
    def size(self) -> int:
        return len(self.ranks)


def cut_legs(ranks: Sequence[int], ranks_per_node: int) -> tuple[NDArray[np.int64], ...]:
    """The groups of each leg [groups, ranks], in the order of a sum; `ranks` ascending."""
    everyone = np.array(ranks, np.int64)
    _, counts = np.unique(everyone // ranks_per_node, return_counts=True)
    if len(counts) == 1 or counts[0] == 1 or (counts != counts[0]).any():
        return (everyone[None],)
    grid = everyone.reshape(len(counts), counts[0])
    return grid, grid.T


def form_legs(ranks: Sequence[int], mesh: Mesh) -> Legs | None:
    """All ranks of the world call it together; None on those that are not in `ranks`."""
    own: list[Group] = []
    legs = cut_legs(ranks, mesh.ranks_per_node)
    for groups in legs:
        for members in groups.tolist():
            handle = dist.new_group(members, timeout=mesh.deadline, group_desc="shares")
            if mesh.rank in members:
                own.append(make_group(handle, members, mesh))
    if not own:
        return None
    rows = tuple(legs[-1].flatten().tolist())
    return Legs(groups=tuple(own), ranks=rows, place=rows.index(mesh.rank))


class Exchange(ABC):
    """A sum or a gather under way, leg by leg. A leg starts when the one before is over and somebody asks.

    `operation` says in errors what is sent.
    """

    _work: dist.Work

    def __init__(self, tensor: Tensor, groups: Iterable[Group], traffic: Traffic, operation: str) -> None:
        self._left, self._traffic, self._operation = deque(groups), traffic, operation
        self._begin(tensor)

    def go_on(self) -> bool:
        """Start a leg that can start, and never wait. Whether the last leg has started."""
        while self._left and self._work.is_completed():
            self._begin(self._end())
        return not self._left

    def start_last(self) -> None:
        """Wait for all legs but the last."""
        while self._left:
            self._begin(self._end())

    def wait(self) -> Tensor:
        """The result."""
        self.start_last()
        return self._end()

    def _begin(self, tensor: Tensor) -> None:
        self._group, self._dtype = self._left.popleft(), tensor.dtype
        self._start(tensor, self._group)

    def _sealed(self, rows: Tensor) -> Tensor:
        return torch.stack([sealed(row) for row in rows]) if self._group.is_checked else rows

    def _opened(self, rows: Tensor) -> Tensor:
        """Rows, one from each rank of the group."""
        group = self._group
        if not group.is_checked:
            return rows
        to = group.ranks[group.index]
        each = [opened(row, source, to, self._operation) for row, source in zip(rows, group.ranks, strict=True)]
        return torch.stack(each).view(self._dtype)

    @abstractmethod
    def _start(self, tensor: Tensor, group: Group) -> None:
        """What is sent must be kept until `_end`."""

    @abstractmethod
    def _end(self) -> Tensor:
        """Wait for the leg. -> what it has made."""


class Sum(Exchange):
    """rows [ranks, width] FP32, a row for the place of each rank -> the sum of all ranks' rows for this one [width]."""

    def __init__(self, rows: Tensor, legs: Legs, traffic: Traffic, operation: str) -> None:
        super().__init__(rows, legs.groups, traffic, operation)

    def _start(self, tensor: Tensor, group: Group) -> None:
        self._sent = self._sealed(tensor.view(group.size, -1))
        for member in range(group.size):
            if member != group.index:
                count(self._traffic, group, member, self._sent[0].nbytes)
        self._came = torch.empty_like(self._sent)
        self._work = dist.all_to_all_single(self._came, self._sent, group=group.handle, async_op=True)

    def _end(self) -> Tensor:
        self._work.wait()
        came = self._opened(self._came)
        total = came[0] + came[1]
        for row in came[2:]:
            total += row
        return total


class Gather(Exchange):
    """row [width] -> all ranks' rows, by their places [ranks, width]."""

    def __init__(self, row: Tensor, legs: Legs, traffic: Traffic, operation: str) -> None:
        super().__init__(row, reversed(legs.groups), traffic, operation)
        self._shape = legs.size, len(row)

    def wait(self) -> Tensor:
        return super().wait().view(self._shape)

    def _start(self, tensor: Tensor, group: Group) -> None:
        self._sent = self._sealed(tensor[None])[0]
        count_ring(self._traffic, group, self._sent.nbytes)
        self._rows = self._sent.new_empty(group.size, len(self._sent))
        self._work = dist.all_gather(list(self._rows), self._sent, group=group.handle, async_op=True)

    def _end(self) -> Tensor:
        self._work.wait()
        return self._opened(self._rows).view(-1)


def count_ring(traffic: Traffic, group: Group, size: int) -> None:
    """What a rank sends where each has `size` bytes for all."""
    count(traffic, group, (group.index + 1) % group.size, (group.size - 1) * size)


def count(traffic: Traffic, group: Group, member: int, size: int) -> None:
    traffic.add(size, group.is_near[member])
