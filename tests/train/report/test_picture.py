import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from dovetail.train.report.metrics import HeldOutMetrics, MetricsLog, StepMetrics, WholeHeldOutMetrics
from dovetail.train.report.picture import _figure, draw_run, smooth


def step_metrics(step: int, loss: float, layers: int, skipped: int = 0) -> StepMetrics:
    return StepMetrics(
        step=step,
        tokens=step * 512,
        loss=loss,
        mtp_loss=loss + 0.5 if layers else math.nan,
        mtp_losses=[loss + 0.5] if layers else [],
        balance_loss=1e-4,
        grad_norm=1.0,
        learning_rate=1e-3,
        batch_size=2,
        gamma=0.001,
        mtp_weight=0.3,
        tokens_per_second=1000.0,
        mfu=0.4,
        max_vio=[1 / (step + layer) for layer in range(layers)],
        skipped=skipped,
        seconds=0.5,
    )


def run(num_steps: int, layers: int) -> list[StepMetrics]:
    steps = [step_metrics(step, 2 + 5 / step, layers, skipped=step > 4) for step in range(1, num_steps + 1)]
    if num_steps > 4:
        steps[4] = step_metrics(5, math.nan, layers, skipped=1)
    return steps


HELD_OUT = [
    HeldOutMetrics(step=4, tokens=4 * 512, loss=3.6, bits_per_byte=2.3),
    HeldOutMetrics(step=9, tokens=9 * 512, loss=3.0, bits_per_byte=1.9),
    WholeHeldOutMetrics(step=9, tokens=9 * 512, loss=3.2, bits_per_byte=2.1),
]


def test_picture_is_a_png_that_appears_whole(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in run(30, 3):
        log.write(step)
    for record in HELD_OUT:
        log.write(record)
    log.close()
    picture = tmp_path / "pictures" / "run.png"
    draw_run(tmp_path / "metrics.jsonl", picture, "a run")
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape == (990, 1350, 4)
    assert pixels[..., :3].min() < 0.2
    assert [path.name for path in picture.parent.iterdir()] == ["run.png"]


def test_empty_log_is_an_error(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "metrics.jsonl").close()
    with pytest.raises(ValueError, match="no steps to draw"):
        draw_run(tmp_path / "metrics.jsonl", tmp_path / "run.png")
    assert not (tmp_path / "run.png").exists()


def test_every_curve_is_labelled() -> None:
    figure = _figure(run(30, 3), HELD_OUT, "a run")
    labels = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]  # type: ignore[union-attr]
    assert labels == [
        [
            "MTP loss",
            "training loss",
            "skipped step",
            "held-out loss, the same windows (1.900 bits/byte at the last point)",
            "all held-out text (2.100 bits/byte)",
        ],
        ["1", "2", "3", "mean"],
    ]
    assert [axes.get_ylabel().split("\n")[0] for axes in figure.axes] == [
        "loss (nats per token, log scale)",
        "MaxVio of expert load",
    ]
    assert figure.axes[1].get_xlabel() == "tokens consumed"


def test_the_figure_of_all_text_is_a_mark_and_not_a_point_of_the_curve() -> None:
    lines = {line.get_label(): line for line in _figure(run(30, 0), HELD_OUT, "").axes[0].get_lines()}
    curve = lines["held-out loss, the same windows (1.900 bits/byte at the last point)"]
    whole = lines["all held-out text (2.100 bits/byte)"]
    assert list(curve.get_ydata()) == [3.6, 3.0] and list(whole.get_ydata()) == [3.2]
    assert (curve.get_linestyle(), whole.get_linestyle()) == ("-", "None")


@pytest.mark.parametrize(("num_steps", "layers"), [(1, 0), (1, 1), (9, 9)])
def test_odd_runs_are_drawn(num_steps: int, layers: int) -> None:
    figure = _figure(run(num_steps, layers), [], "")
    assert len(figure.axes) == (2 if layers else 1)
    figure.draw_without_rendering()


def test_smoothing_neither_lags_nor_spreads_gaps() -> None:
    falling = np.linspace(10.0, 2.0, 400)
    assert np.allclose(smooth(falling)[:390], falling[:390])  # a trailing mean would lie above
    assert smooth(falling)[0] == 10.0
    noisy = np.where(np.arange(400) % 2, 4.0, 2.0)
    assert np.abs(smooth(noisy)[20:] - 3.0).max() < 0.2
    gap = falling.copy()
    gap[200] = math.nan
    assert np.isfinite(smooth(gap)).all()
    assert np.isnan(smooth([math.nan, 1.0])).tolist() == [True, False]
