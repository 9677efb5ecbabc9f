"""quickstart.png: the picture that `dovetail quickstart` writes of its run, drawn by the same code from a log of one.

quickstart.jsonl is the metrics.jsonl of that run, shortened: a line for the mean of fifteen steps, and numbers of five
digits. To take those of another run: python docs/pictures/quickstart.py RUN/metrics.jsonl
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from dovetail.train.report.metrics import HeldOutMetrics, MetricsLog, StepMetrics, WholeHeldOutMetrics, read_metrics
from dovetail.train.report.picture import draw_run

RECORD = Path(__file__).with_suffix(".jsonl")
STRIDE = 15
MEANS = ("loss", "mtp_loss", "max_vio")  # what is drawn


def draw(directory: Path) -> Path:
    steps = max(each.step for each in read_metrics(RECORD))
    draw_run(RECORD, directory / "quickstart.png", f"quickstart, {steps} steps")
    return directory / "quickstart.png"


def record(log: Path) -> None:
    """Keep of `log` what the picture needs: held-out measurements, and the means of steps, up to the last one."""
    metrics = read_metrics(log)
    last = max(each.step for each in metrics)
    RECORD.unlink(missing_ok=True)
    kept = MetricsLog(RECORD)
    group: list[StepMetrics] = []
    for each in metrics:
        if isinstance(each, HeldOutMetrics | WholeHeldOutMetrics):
            kept.write(_short(each))
        elif isinstance(each, StepMetrics):
            group.append(each)
            if (last - each.step) % STRIDE == 0:
                means = {name: np.mean([getattr(step, name) for step in group], axis=0).tolist() for name in MEANS}
                kept.write(_short(replace(each, **means)))
                group.clear()
    kept.close()


def _short(metrics: Any) -> Any:
    """The same with five digits of every number."""

    def cut(value: Any) -> Any:
        if isinstance(value, list):
            return [cut(each) for each in value]
        return float(f"{value:.5g}") if isinstance(value, float) else value

    return replace(metrics, **{name: cut(value) for name, value in asdict(metrics).items()})


if __name__ == "__main__":
    record(Path(sys.argv[1]))
