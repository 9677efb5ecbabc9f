"""Rows on their way between the ranks of a group: as bytes, none of them padding, and counted.

A rank sends each other rank as many rows as it has for it, in one all-to-all. Rows travel as `uint8`, for backends do
not know every number format; `encode` and `decode` are all that knows how a row becomes bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dovetail.parallel.mesh import Group


@dataclass(slots=True)
class Traffic:
    """Bytes that this rank has sent to others so far, by the link they left over."""

    nic: int = 0  # to other nodes
    node: int = 0  # inside the node

    def add(self, size: int, is_near: bool) -> None:
        if is_near:
            self.node += size
        else:
            self.nic += size

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.nic + other.nic, self.node + other.node)

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(self.nic - other.nic, self.node - other.node)


def encode(rows: Tensor) -> Tensor:
    """rows [N, columns] -> the bytes of each row [N, width] uint8."""
    return rows.contiguous().view(torch.uint8)


def decode(sent: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows [N, columns] that `encode` was given; `sent` may be a part of wider rows."""
    return sent.contiguous().view(dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """One all-to-all, and the same one backwards."""

    group: Group
    sent: Sequence[int]  # rows to each rank of the group, in its order
    received: Sequence[int]  # rows from each
    traffic: Traffic

    def out(self, rows: Tensor) -> Tensor:
        """Bytes of rows [sum of sent, width] -> those that came [sum of received, width]."""
        return self._exchange(rows, self.sent, self.received)

    def home(self, rows: Tensor) -> Tensor:
        """Rows for those that came [sum of received, columns] -> rows for those that were sent [sum of sent, columns].

        Unlike `out` it takes numbers, since on their way home rows are summed between two wires.
        """
        return decode(self._exchange(encode(rows), self.received, self.sent), rows.dtype)

    def _exchange(self, rows: Tensor, given: Sequence[int], taken: Sequence[int]) -> Tensor:
        if self.group.size == 1:
            return rows
        for member, (count, is_near) in enumerate(zip(given, self.group.is_near, strict=True)):
            if member != self.group.index:
                size = count * rows.shape[1]
                self.traffic.node += size if is_near else 0
                self.traffic.nic += 0 if is_near else size
        arrived = rows.new_empty(sum(taken), rows.shape[1])
        work = dist.all_to_all_single(arrived, rows, list(taken), list(given), group=self.group.handle, async_op=True)
        self.group.turns.await_exchange(work)
        return arrived


def swap(numbers: Tensor, group: Group, traffic: Traffic) -> Tensor:
    """numbers [group, columns], a row for each rank -> the row that each rank has for this one [group, columns]."""
    one_each = [1] * group.size
    wire = Wire(group=group, sent=one_each, received=one_each, traffic=traffic)
    return decode(wire.out(encode(numbers)), numbers.dtype)
