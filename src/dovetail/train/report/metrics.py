"""The metrics of a run's steps and their log, one JSON object per line.

Lines are appended and flushed as steps happen.

A resumed run cuts the log back to the step it resumes from, so the file reads as if nothing had stopped it
(times aside). A line torn by a crash is dropped. NaN and infinities, which JSON cannot say, are written as null
and read back as NaN.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """One optimizer step. Losses are nats per token, of the batch the step was taken on."""

    step: int  # counted from 1
    tokens: int  # consumed by the run, this step included
    loss: float
    mtp_loss: float  # mean over the MTP depths, before its weight; NaN without MTP
    mtp_losses: list[float]  # of each depth
    balance_loss: float  # sequence-wise, after its coefficient
    grad_norm: float  # before clipping
    learning_rate: float
    batch_size: int  # sequences
    gamma: float  # bias update speed
    mtp_weight: float  # lambda
    tokens_per_second: float
    mfu: float  # share of the machine's peak, 0 to 1
    max_vio: list[float]  # (largest load - mean load) / mean load of each MoE layer [ALF]
    skipped: int  # steps skipped so far for a loss or gradient that was not finite
    seconds: float  # wall time of this step
    nic_bytes: int = 0  # sent by all ranks to other nodes
    node_bytes: int = 0  # sent by all ranks inside their nodes
    expected_nic_bytes: int = 0  # as the layout says beforehand, with experts that are chosen equally often
    expected_node_bytes: int = 0
    stage_wait: float = 0.0  # seconds of the step that a rank computed nothing, in the mean: for other stages
    expert_wait: float = 0.0  # likewise, for rows to and from experts
    gradient_wait: float = 0.0  # likewise, for sums of gradients and gathered weights, their copies included
    rank_memory: float = 0.0  # bytes, the most that any rank's process has taken
    rank_max_vio: list[float] = field(default_factory=list)  # as max_vio, of the ranks that share a layer's experts


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutMetrics:
    """A measurement on windows of the held-out text after `step` steps; a run measures the same windows each time."""

    step: int
    tokens: int
    loss: float  # nats per token
    bits_per_byte: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeHeldOutMetrics:
    """The measurement on all of the held-out text, once at the end of a run."""

    step: int
    tokens: int
    loss: float  # nats per token
    bits_per_byte: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthMetrics:
    """What a precision recipe did to one operand of one layer in step `step`; `numerics.operands.health.Health` says
    how."""

    step: int
    layer: str
    operand: str  # input, grad, weight; up_weight and down_weight of a feed-forward
    flushed: float
    clipped: float
    smallest_scale: float
    largest_scale: float
    signal_to_noise: float  # decibel; NaN in the file's null stands for infinity too


@dataclass(frozen=True, slots=True, kw_only=True)
class StragglerMetrics:
    """A rank that lags, as of `step`: the others wait for it."""

    step: int
    rank: int
    ratio: float  # times the median of the ranks that do the same
    seconds: float  # of its own work in a step


Metrics = StepMetrics | HeldOutMetrics | WholeHeldOutMetrics | HealthMetrics | StragglerMetrics
_KINDS: dict[str, type[Metrics]] = {
    "step": StepMetrics,
    "held_out": HeldOutMetrics,
    "held_out_whole": WholeHeldOutMetrics,
    "health": HealthMetrics,
    "straggler": StragglerMetrics,
}


class MetricsLog:
    """Appends to a JSONL file. Opening it drops every line past `resumed_step` (0: a run from the start)."""

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            os.truncate(self.path, _length_up_to(self.path, resumed_step))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run

    def write(self, metrics: Metrics) -> None:
        """Add one line; it survives this process from here on, and the machine from the next `sync` on."""
        kind = next(name for name, each in _KINDS.items() if isinstance(metrics, each))
        record = {"kind": kind, **dataclasses.asdict(metrics)}
        self._file.write(json.dumps({key: _plain(value) for key, value in record.items()}, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make the lines so far survive a power cut: call before a checkpoint that a run may resume from."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[Metrics]:
    """All records of a log in order; a torn last line is left out. Raises ValueError naming a bad line."""
    found: list[Metrics] = []
    for number, (line, record) in enumerate(_records(path), start=1):
        if record is None:
            if line.endswith(b"\n"):
                raise ValueError(f"{path}: line {number} is not a record of a metrics log: {line[:60]!r}")
            break
        found.append(_from_record(record))
    return found


def _length_up_to(path: Path, step: int) -> int:
    """Bytes of the whole lines from the start whose step is at most `step`."""
    length = 0
    for line, record in _records(path):
        if record is None or record["step"] > step:
            break
        length += len(line)
    return length


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line with what it says; None for one that is torn or is no record."""
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            whole = line.endswith(b"\n") and isinstance(record, dict) and _is_record(record)
            yield line, record if whole else None


def _is_record(record: dict[str, Any]) -> bool:
    """A field that has a default may be missing: earlier versions did not write it."""
    kind = _KINDS.get(str(record.get("kind")))
    if kind is None:
        return False
    fields = dataclasses.fields(kind)
    needed = {each.name for each in fields if each.default is MISSING and each.default_factory is MISSING}
    return {"kind"} | needed <= record.keys() <= {"kind"} | {each.name for each in fields}


def _from_record(record: dict[str, Any]) -> Metrics:
    kind = _KINDS[record["kind"]]
    types = get_type_hints(kind)
    return kind(**{name: _typed(record[name], types[name]) for name in types if name in record})


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _typed(value: Any, type_: Any) -> Any:
    if type_ is float:
        return math.nan if value is None else float(value)
    if type_ == list[float]:
        return [_typed(each, float) for each in value]
    return value
