"""Rows on their way between the ranks of a group: as bytes, none of them padding, and counted.

A rank sends each other rank as many rows as it has for it, in one all-to-all. Rows travel as `uint8`, for backends do
not know every number format; `parallel.experts.formats` is all that knows how a row becomes bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dovetail.parallel.experts.formats import Format, decode, encode
from dovetail.parallel.mesh import Group
from dovetail.parallel.traffic import CHECKSUM, Traffic, opened, sealed


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """One all-to-all, and the same one backwards. `operation` says in errors what is sent."""

    group: Group
    sent: Sequence[int]  # rows to each rank of the group, in its order
    received: Sequence[int]  # rows from each
    traffic: Traffic

    def out(self, rows: Tensor, operation: str) -> Tensor:
        """Bytes of rows [sum of sent, width] -> those that came [sum of received, width]."""
        return self._exchange(rows, self.sent, self.received, operation)

    def home(self, rows: Tensor, format: Format, operation: str) -> Tensor:
        """Rows for those that came [sum of received, columns] -> rows for those that were sent [sum of sent, columns].

        Unlike `out` it takes numbers, since on their way home rows are summed between two wires.
        """
        if self.group.size == 1:
            return rows
        sent = self._exchange(format.encode(rows), self.received, self.sent, operation)
        return format.decode(sent, rows.shape[1], rows.dtype)

    def _exchange(self, rows: Tensor, given: Sequence[int], taken: Sequence[int], operation: str) -> Tensor:
        if self.group.size == 1:
            return rows
        width, extra = rows.shape[1], 0
        if self.group.is_checked:  # rows of one byte then
            extra, rows = CHECKSUM, torch.cat([sealed(part) for part in rows.split(list(given))])[:, None]
            given, taken = ([count * width + extra for count in counts] for counts in (given, taken))
        for member, (count, is_near) in enumerate(zip(given, self.group.is_near, strict=True)):
            if member != self.group.index:
                self.traffic.add(count * rows.shape[1], is_near)
        arrived = rows.new_empty(sum(taken), rows.shape[1])
        work = dist.all_to_all_single(arrived, rows, list(taken), list(given), group=self.group.handle, async_op=True)
        self.group.turns.await_exchange(work)
        if not extra:
            return arrived
        parts = zip(arrived.flatten().split(list(taken)), self.group.ranks, strict=True)
        to = self.group.ranks[self.group.index]
        return torch.cat([opened(part, source, to, operation) for part, source in parts]).view(-1, width)


def swap(numbers: Tensor, group: Group, traffic: Traffic) -> Tensor:
    """numbers [group, columns], a row for each rank -> the row that each rank has for this one [group, columns]."""
    one_each = [1] * group.size
    wire = Wire(group=group, sent=one_each, received=one_each, traffic=traffic)
    return decode(wire.out(encode(numbers), "numbers of rows"), numbers.dtype)
