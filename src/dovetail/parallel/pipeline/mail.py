"""Messages between the ranks of a pipeline: received ahead, and sent without waiting.

Receives are posted a few steps before they are needed, in the order in which their rank sends: so the two ends agree
without tags. A rank never waits to hand over an output. A tensor that is sent is kept until it has surely arrived: a
message from another rank shows that this rank's messages for its earlier steps have, which needs no question and is
the same on every backend.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from dovetail.parallel.mesh import Mesh
from dovetail.parallel.pipeline.messages import Due, Key, Message, arrivals, messages
from dovetail.parallel.schedules.schedule import Schedule
from dovetail.parallel.traffic import Traffic, opened, room_for, sealed

AHEAD = 2  # steps: a rank that has two neighbours hears of each in every other step


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """A message that is under way, here to be read or to be kept."""

    message: Message
    tensor: Tensor
    work: dist.Work


class Mail:
    """The messages of one rank during one run of a schedule."""

    def __init__(self, schedule: Schedule, mesh: Mesh, traffic: Traffic, empty: Callable[[int], Tensor]) -> None:
        """`empty` makes a tensor like the hidden states of a micro-batch, to be received into."""
        self.mesh, self.traffic, self.empty = mesh, traffic, empty
        everything = messages(schedule)
        self._coming = {source: deque(due) for source, due in arrivals(everything, mesh.pp.index).items()}
        self._going = {each.key: each for each in everything if each.source == mesh.pp.index}
        self._posted: dict[Key, Pending] = {}
        self._kept: dict[int, deque[Pending]] = {each.target: deque() for each in self._going.values()}
        self._handed: dict[Key, Tensor] = {}  # from stage to stage on this rank

    def post(self, step: int) -> None:
        """Post the receives of all that steps up to `AHEAD` after this one need."""
        for coming in self._coming.values():
            while coming and coming[0].step <= step + AHEAD:
                self._receive(coming.popleft())

    def take(self, key: Key) -> Tensor:
        """Wait for a message, whose receive has been posted."""
        if key in self._handed:
            return self._handed.pop(key)
        pending = self._posted.pop(key)
        with self.mesh.turns.waiting("stages"):
            pending.work.wait()
        kept = self._kept.get(pending.message.source, deque())
        while kept and kept[0].message.needed < pending.message.made:
            kept.popleft().work.wait()  # it has arrived
        return self._opened(pending)

    def give(self, key: Key, tensor: Tensor) -> None:
        """Hand a tensor to the stage that `key` says, on this rank or on another; it must not change afterwards."""
        message = self._going.get(key)
        if message is None:
            self._handed[key] = tensor
            return
        tensor = sealed(tensor) if self.mesh.is_checked else tensor.contiguous()
        self.traffic.add(tensor.nbytes, self.mesh.pp.is_near[message.target])
        target = self.mesh.pp.ranks[message.target]
        work = dist.isend(tensor, target, group=self.mesh.links[self.mesh.rank, target])
        assert work is not None
        self._kept[message.target].append(Pending(message=message, tensor=tensor, work=work))

    def finish(self) -> None:
        """Wait until everything that was sent has arrived."""
        assert not self._posted and not self._handed and not any(self._coming.values())
        with self.mesh.turns.waiting("stages"):
            for kept in self._kept.values():
                while kept:
                    kept.popleft().work.wait()

    def _opened(self, pending: Pending) -> Tensor:
        if not self.mesh.is_checked:
            return pending.tensor
        is_forward, microbatch, stage = pending.message.key
        like, source = self.empty(microbatch), self.mesh.pp.ranks[pending.message.source]
        what = "hidden states" if is_forward else "gradients"
        name = f"{what} of micro-batch {microbatch} for stage {stage}"
        return opened(pending.tensor, source, self.mesh.rank, name).view(like.dtype).view_as(like)

    def _receive(self, due: Due) -> None:
        tensor, source = self.empty(due.message.key[1]), self.mesh.pp.ranks[due.message.source]
        if self.mesh.is_checked:
            tensor = room_for(tensor)
        work = dist.irecv(tensor, source, group=self.mesh.links[source, self.mesh.rank])
        assert work is not None
        self._posted[due.message.key] = Pending(message=due.message, tensor=tensor, work=work)
