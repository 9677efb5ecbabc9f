"""Reads the health of a run's operands from its log, the worst first, for `dovetail health`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dovetail.train.report.metrics import HealthMetrics, read_metrics

HEADER = ("layer", "operand", ">signal-to-noise", ">flushed", ">clipped", ">smallest scale", ">largest scale")


def read_health(run: Path) -> list[HealthMetrics]:
    """Return all health records of the run in the directory `run`. Raises ValueError where there are none."""
    log = run / "metrics.jsonl"
    if not log.is_file():
        raise ValueError(f"{run}: no metrics.jsonl in it; give the directory of a run that has taken a step")
    found = [each for each in read_metrics(log) if isinstance(each, HealthMetrics)]
    if not found:
        raise ValueError(
            f"{log}: no health records; a run writes them with train.health_every, every so many steps, under a "
            "train.precision that quantises layers, such as deepseek-v3"
        )
    return found


def of_step(records: Sequence[HealthMetrics], step: int | None = None) -> list[HealthMetrics]:
    """Return the records of `step`, by default the last one, the worst first. Raises ValueError for another step."""
    steps = sorted({each.step for each in records})
    wanted = steps[-1] if step is None else step
    if wanted not in steps:
        nearest = min(steps, key=lambda each: abs(each - wanted))
        raise ValueError(f"step {wanted} has no health records; the nearest that has is {nearest}")
    return sorted((each for each in records if each.step == wanted), key=_badness)


def _badness(each: HealthMetrics) -> tuple[bool, float, float, float]:
    """Operands that are not finite come first, then those with the lowest signal-to-noise ratio."""
    ratio = each.signal_to_noise if math.isfinite(each.signal_to_noise) else math.inf
    return is_finite(each), ratio, -each.flushed, -each.clipped


def is_finite(each: HealthMetrics) -> bool:
    """Whether the operand had neither NaN nor infinities, which would be in its scales."""
    return math.isfinite(each.largest_scale)


def rows(records: Sequence[HealthMetrics]) -> list[tuple[str, ...]]:
    """Return what a person reads, a row for each record."""
    return [
        (
            each.layer,
            each.operand,
            ratio_text(each),
            f"{each.flushed:.3%}",
            f"{each.clipped:.3%}",
            f"{each.smallest_scale:.3g}",
            f"{each.largest_scale:.3g}",
        )
        for each in records
    ]


def ratio_text(each: HealthMetrics) -> str:
    if not is_finite(each):
        return "not finite"
    return f"{each.signal_to_noise:.1f} dB" if math.isfinite(each.signal_to_noise) else "exact"


def as_json(records: Sequence[HealthMetrics], shown: Sequence[HealthMetrics]) -> dict[str, Any]:
    """Return the steps that have `records`, and those of one step that are `shown`, as plain data."""
    operands = [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in table.items()}
        for table in map(dataclasses.asdict, shown)
    ]
    return {"steps": sorted({each.step for each in records}), "step": shown[0].step, "operands": operands}


def summary_line(records: Sequence[HealthMetrics]) -> str:
    """Say in one line how a step's operands are: the worst of each kind, and where it is."""
    worst = of_step(records)[0]
    flushed = max(records, key=lambda each: each.flushed)
    clipped = max(records, key=lambda each: each.clipped)
    parts = [f"lowest signal-to-noise {ratio_text(worst)} ({_place(worst)})"]
    parts += [f"flushed up to {flushed.flushed:.2%}" + (f" ({_place(flushed)})" if flushed.flushed else "")]
    parts += [f"clipped up to {clipped.clipped:.2%}" + (f" ({_place(clipped)})" if clipped.clipped else "")]
    return f"health after step {worst.step}, {len(records)} operands: {', '.join(parts)}"


def _place(each: HealthMetrics) -> str:
    return f"{each.operand} of {each.layer}"
