"""[layout] of a run file, and the layout that it makes of the ranks that were started."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from dovetail.config import Record
from dovetail.parallel.experts.formats import Back
from dovetail.spec.layout import Layout, ScheduleName
from dovetail.train.layout.ranks import DEADLINE


class LayoutConfig(Record):
    """[layout]: see `spec.layout.Layout`. Without it each rank has the whole model and its part of the batch."""

    dp: int | None = Field(default=None, gt=0)  # all ranks that pp leaves
    pp: int = Field(default=1, gt=0)
    ep: int = Field(default=1, gt=0)
    schedule: ScheduleName = "1f1b"
    chunks: int = Field(default=2, gt=0)
    microbatches: int | None = Field(default=None, gt=0)  # follows from the batch; given, it is checked
    stage_layers: tuple[PositiveInt, ...] | None = None
    zero: Literal[0, 1] = 1
    hops: Literal[1, 2] = 2  # of a row on its way to an expert: straight, or over the NIC once per node [V3 §3.2.2]
    back: Back = "bf16"  # format in which experts' outputs come back: "bf16" is the model's own
    checksums: bool = False  # of messages between ranks
    ranks_per_node: int | None = Field(default=None, gt=0)  # as many as torchrun started on this one
    deadline: float = Field(default=DEADLINE, gt=0)  # seconds that an exchange may wait for another rank
    replica_check: int = Field(default=0, ge=0)  # every so many steps; 0: never

    def parts(self, world: int) -> int:
        """The number of parts in which `world` ranks read a batch."""
        return self.dp or max(world // self.pp, 1)

    def multiple(self, world: int) -> int:
        """What the micro-batches of a whole batch are a multiple of."""
        each = {"interleaved": self.pp, "dualpipe": 2}.get(self.schedule, 1) if self.pp > 1 else 1
        return each * self.parts(world)

    def layout(self, world: int, batch_size: int, microbatch_size: int) -> Layout:
        """The layout for a batch of so many sequences. Raises ValueError where `microbatches` says otherwise."""
        dp = self.parts(world)
        microbatches = max(batch_size // (dp * microbatch_size), 1)
        if self.microbatches not in (None, microbatches):
            raise ValueError(
                f"layout.microbatches = {self.microbatches}: a batch of {batch_size} sequences over dp = {dp} and "
                f"train.microbatch_size = {microbatch_size} makes {microbatches}; set train.batch_size = "
                f"{self.microbatches * dp * microbatch_size}, or leave it out"
            )
        return Layout(
            dp=dp,
            pp=self.pp,
            ep=self.ep,
            schedule=self.schedule,
            chunks=self.chunks,
            microbatches=microbatches,
            microbatch_size=microbatch_size,
            stage_layers=self.stage_layers,
            zero=self.zero,
        )
