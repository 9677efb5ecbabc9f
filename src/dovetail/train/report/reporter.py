"""Where a run's metrics go: to its log, to the display, and to TensorBoard if the run asks for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dovetail.train.report.display import Display
from dovetail.train.report.health_table import summary_line
from dovetail.train.report.metrics import (
    HealthMetrics,
    HeldOutMetrics,
    Metrics,
    MetricsLog,
    StepMetrics,
    WholeHeldOutMetrics,
    read_metrics,
)
from dovetail.train.report.stragglers import Stragglers, straggler_line

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDERS = {StepMetrics: "training", HeldOutMetrics: "held_out", WholeHeldOutMetrics: "held_out_whole"}
COUNTS = ("step", "tokens")  # a place in the run, not a result


class Reporter:
    """Reports the run in `out` from `resumed_step` on: later records of earlier attempts are taken away."""

    def __init__(self, out: Path, resumed_step: int, display: Display, with_tensorboard: bool, pp: int = 1) -> None:
        self.display = display
        self._stragglers = Stragglers(pp)
        self.log = MetricsLog(out / "metrics.jsonl", resumed_step)
        self._board = _board(out / "tensorboard", resumed_step) if with_tensorboard else None

    def write(self, metrics: StepMetrics | HeldOutMetrics | WholeHeldOutMetrics) -> None:
        self.log.write(metrics)
        self.display.update(metrics)
        if self._board is not None:
            for tag, number in scalars(metrics).items():
                self._board.add_scalar(tag, number, metrics.step)

    def write_health(self, health: Sequence[HealthMetrics]) -> None:
        for each in health:
            self.log.write(each)
        if health:
            self.display.message(summary_line(list(health)))

    def write_stragglers(self, step: int, seconds: Sequence[float]) -> None:
        """Name the ranks that lag, from how long each has worked in each step."""
        for each in self._stragglers.look(step, seconds):
            self.log.write(each)
            self.display.message(straggler_line(each))

    def has(self, kind: type[Metrics], step: int) -> bool:
        """Whether the log has a record of that kind after `step`."""
        return any(isinstance(each, kind) and each.step == step for each in read_metrics(self.log.path))

    def sync(self) -> None:
        """Make what was written so far survive a power cut: call before a checkpoint."""
        self.log.sync()
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        self.log.close()
        if self._board is not None:
            self._board.close()


def scalars(metrics: StepMetrics | HeldOutMetrics | WholeHeldOutMetrics) -> dict[str, float]:
    """Return the numbers of a record by TensorBoard's tags; a list has one per depth or layer, numbered from 1.

    What is not finite is left out.
    """
    found: dict[str, float] = {}
    for name, value in dataclasses.asdict(metrics).items():
        if name not in COUNTS:
            tag = f"{FOLDERS[type(metrics)]}/{name}"
            each = (
                {f"{tag}/{index}": v for index, v in enumerate(value, 1)} if isinstance(value, list) else {tag: value}
            )
            found |= {key: number for key, number in each.items() if math.isfinite(number)}
    return found


def check_tensorboard() -> None:
    """Raise ValueError if TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise ValueError(
            "train.tensorboard = true: the package is not installed; pip install 'dovetail[tensorboard]', "
            "or leave train.tensorboard out"
        )


def _board(directory: Path, resumed_step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter  # here, because few runs ask for it and it takes a second

    # Events of steps past the checkpoint are of an earlier attempt: TensorBoard drops them when it reads this.
    return SummaryWriter(str(directory), purge_step=resumed_step + 1)
