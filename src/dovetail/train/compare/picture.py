"""Draws a comparison: the losses of both sides, and what they differ by.

Where both sides see the same batches, the relative difference of their losses is below, and below it that of their MTP
losses. Otherwise bits per byte of held-out text are there, a point for each seed.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, ScalarFormatter
from numpy.typing import NDArray

from dovetail.atomic import write_bytes
from dovetail.train.compare.gap import FIRST, PAPER, smooth
from dovetail.train.compare.pairs import Pair, Record, SideStep
from dovetail.train.compare.summary import Summary
from dovetail.train.report.picture import HELD_OUT, INK, LOSS, MUTED, STYLE

Curves = NDArray[np.float64]  # [seeds, steps]
Steps = Sequence[SideStep]  # of all seeds, one after the other
WIDTH, HEIGHTS = 9.0, (2.64, 3.96, 2.64)  # inches; heights of the losses, of what they differ by, of MTP


def draw(summary: Summary, records: Sequence[Record], picture: Path) -> None:
    """Draw the records of whole seeds into the PNG `picture`, which appears whole or not at all."""
    pairs = [record for record in records if isinstance(record, Pair)]
    a, b = [pair.a for pair in pairs if pair.a is not None], [pair.b for pair in pairs if pair.b is not None]
    is_paired = not summary.unpaired
    heights = HEIGHTS if summary.mtp and is_paired else HEIGHTS[:2]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, sum(heights)), dpi=150, layout="constrained")
        figure.suptitle(summary.title, x=0.01, ha="left", weight="bold")
        panels = figure.subplots(len(heights), 1, sharex=is_paired, height_ratios=heights)
        _draw_losses(panels[0], summary, (a, b))
        if is_paired:
            _draw_differences(panels[1:], summary, (a, b))
        else:
            _draw_held_out(panels[1], summary)
        below = panels[-1 if is_paired else 0]
        below.set_xlabel("tokens consumed by each side")
        below.xaxis.set_major_formatter(EngFormatter(sep=""))
        below.set_xlim(0, 1.01 * max(side.tokens for side in summary.sides))
        png = io.BytesIO()
        figure.savefig(png, format="png")
    write_bytes(picture, png.getvalue())


def _draw_losses(axes: Axes, summary: Summary, sides: tuple[Steps, Steps]) -> None:
    for side, steps, color, width in zip(summary.sides, sides, (MUTED, LOSS), (4.0, 1.3), strict=True):
        tokens = [step.tokens for step in steps[: side.steps]]
        curves = np.array([step.loss for step in steps]).reshape(-1, side.steps)
        axes.plot(tokens, smooth(curves).mean(axis=0), color=color, linewidth=width, label=side.name)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.minorticks_off()
    unit = "nats per token" if summary.loss else "nats per own token"
    axes.set_ylabel(f"loss, mean of seeds\n({unit}, log scale)")
    axes.legend(loc="upper right")


def _draw_differences(panels: Sequence[Axes], summary: Summary, sides: tuple[Steps, Steps]) -> None:
    """Draw the difference in loss, and in the second panel, if there is one, that in the MTP losses."""
    num_steps, num_losses = summary.sides[0].steps, 1 + len(summary.mtp)
    a, b = (np.array([step.losses[:num_losses] for step in each]).reshape(-1, num_steps, num_losses) for each in sides)
    tokens = [step.tokens for step in sides[0][:num_steps]]
    loss, *mtp = np.moveaxis((b - a) / a, 2, 0)
    _draw_loss_difference(panels[0], tokens, loss, has_bound=list(summary.changes) == ["train.precision"])
    colors = matplotlib.colormaps["YlOrBr"](np.linspace(0.5, 0.9, max(1, len(mtp))))
    for gap, color, curves in zip(summary.mtp, colors, mtp, strict=True):
        _draw_mean(panels[1], tokens, curves, color, gap.measure)
    for axes, name, shown in zip(panels, ("losses", "MTP losses"), ([loss], mtp), strict=False):
        axes.axhline(0.0, color=INK, linewidth=0.8)
        axes.set_ylabel(f"difference of {name}, %\n(moving average 0.9)")
        axes.set_ylim(_limits(shown))
        axes.legend(loc="best", fontsize=9)


def _draw_loss_difference(axes: Axes, tokens: Sequence[int], differences: Curves, has_bound: bool) -> None:
    for index, curve in enumerate(100 * smooth(differences)):
        axes.plot(tokens, curve, color=LOSS, alpha=0.35, linewidth=0.8, label=None if index else "one seed")
    if len(differences) > 1:
        _draw_mean(axes, tokens, differences, LOSS, "mean of seeds, and standard deviation")
    for sign in (-1, 1) if has_bound else ():
        label = f"within {PAPER:.2%}, as the paper's FP8 [V3 App. B.1]" if sign > 0 else None
        axes.axhline(100 * sign * PAPER, color=HELD_OUT, linewidth=1.0, linestyle="--", label=label)


def _draw_mean(axes: Axes, tokens: Sequence[int], differences: Curves, color: Any, label: str) -> None:
    """Draw the mean over seeds and their standard deviation, in percent, smoothed."""
    curves = 100 * smooth(differences)
    centre = curves.mean(axis=0)
    if len(curves) > 1:
        spread = curves.std(axis=0, ddof=1)
        axes.fill_between(tokens, centre - spread, centre + spread, color=color, alpha=0.15, linewidth=0)
    axes.plot(tokens, centre, color=color, linewidth=2.0, label=label)


def _limits(differences: Sequence[Curves]) -> tuple[float, float]:
    """Return the limits of the axis. The first steps, where seeds differ most, may be outside."""
    curves = 100 * smooth(np.array(differences))
    shown = curves[..., int(FIRST * curves.shape[-1]) :]
    found = [-120 * PAPER, 120 * PAPER, *shown[np.isfinite(shown)]]
    margin = 0.1 * (max(found) - min(found))
    return float(min(found) - margin), float(max(found) + margin)


def _draw_held_out(axes: Axes, summary: Summary) -> None:
    """Draw bits per byte of each seed, A's beside B's, text by text."""
    for index, (side, color) in enumerate(zip("ab", (MUTED, LOSS), strict=True)):
        for place, gap in enumerate(summary.held_out):
            values = [getattr(seed, side) for seed in gap.seeds]
            where = np.linspace(-0.08, 0.08, len(values)) + place + 0.3 * (index - 0.5)
            label = summary.sides[index].name if place == 0 else None
            axes.plot(where, values, color=color, linestyle="none", marker="o", markeredgecolor="white", label=label)
    axes.set_xticks(range(len(summary.held_out)), [gap.measure.partition(", ")[2] for gap in summary.held_out])
    axes.set_xlim(-0.6, len(summary.held_out) - 0.4)
    axes.set_ylabel("bits per byte after the last step,\none point per seed")
    axes.legend(loc="upper right")
