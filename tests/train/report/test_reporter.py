"""What goes to TensorBoard, read back with TensorBoard's own reader."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dovetail.train.report import reporter
from dovetail.train.report.display import Display
from dovetail.train.report.metrics import HeldOutMetrics, StepMetrics, WholeHeldOutMetrics
from dovetail.train.report.reporter import Reporter, scalars

StepOf = Callable[..., StepMetrics]


@pytest.fixture
def step_metrics() -> StepOf:
    def build(step: int, **changed: object) -> StepMetrics:
        floats = dict.fromkeys(("balance_loss", "grad_norm", "learning_rate", "gamma", "mtp_weight", "mfu"), 0.5)
        values = {"step": step, "tokens": 8 * step, "loss": 4.0 / step, "mtp_loss": 5.0, "mtp_losses": [4.0, 6.0]}
        values |= {"batch_size": 2, "tokens_per_second": 9.0, "max_vio": [0.25], "skipped": 0, "seconds": 1.0}
        return StepMetrics(**(floats | values | changed))  # type: ignore[arg-type]

    return build


def report(out: Path, resumed_step: int, *records: StepMetrics | HeldOutMetrics | WholeHeldOutMetrics) -> None:
    found = Reporter(out, resumed_step, Display("run", 9, Console(file=io.StringIO())), with_tensorboard=True)
    for record in records:
        found.write(record)
    found.sync()
    found.close()


def read(out: Path) -> EventAccumulator:
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return events


def test_a_resumed_run_has_every_step_once(tmp_path: Path, step_metrics: StepOf) -> None:
    report(tmp_path, 0, *(step_metrics(step) for step in range(1, 6)))
    report(tmp_path, 3, step_metrics(4, loss=7.0), WholeHeldOutMetrics(step=4, tokens=32, loss=3.0, bits_per_byte=1.5))
    events = read(tmp_path)
    found = [(each.step, each.value) for each in events.Scalars("training/loss")]
    assert found == [(1, 4.0), (2, 2.0), (3, pytest.approx(4 / 3)), (4, 7.0)]
    assert [(each.step, each.value) for each in events.Scalars("held_out_whole/bits_per_byte")] == [(4, 1.5)]


def test_numbers_have_a_tag_each_and_what_is_not_finite_has_none(step_metrics: StepOf) -> None:
    found = scalars(step_metrics(2, mtp_loss=math.nan, mtp_losses=[4.0, math.inf]))
    assert found["training/loss"] == 2.0 and found["training/mtp_losses/1"] == 4.0
    assert found["training/max_vio/1"] == 0.25
    assert not {"training/mtp_loss", "training/mtp_losses/2", "training/step", "training/tokens"} & found.keys()
    point = HeldOutMetrics(step=2, tokens=16, loss=3.0, bits_per_byte=1.5)
    assert scalars(point) == {"held_out/loss": 3.0, "held_out/bits_per_byte": 1.5}


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter.check_tensorboard()
    monkeypatch.setattr(reporter, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"train.tensorboard = true: .*pip install 'dovetail\[tensorboard\]'"):
        reporter.check_tensorboard()
    assert importlib.util.find_spec("tensorboard") is not None
