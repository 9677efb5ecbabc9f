"""Draws a run from its log: losses above, the load of experts below, over the tokens."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, ScalarFormatter

from dovetail.atomic import write_bytes
from dovetail.train.report.metrics import HeldOutMetrics, StepMetrics, WholeHeldOutMetrics, read_metrics

HeldOut = HeldOutMetrics | WholeHeldOutMetrics
INK, MUTED, GRID = "#22272e", "#6b7280", "#e5e7eb"
LOSS, MTP, HELD_OUT, SKIPPED = "#1f5fa8", "#d9822b", "#2a8f5b", "#c0392b"
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
}


def draw_run(log: Path, picture: Path, title: str = "") -> None:
    """Draw the metrics log `log` into the PNG `picture`, which appears whole or not at all.

    Raises ValueError if the log has no step in it.
    """
    records = read_metrics(log)
    steps = [record for record in records if isinstance(record, StepMetrics)]
    held_out = [record for record in records if isinstance(record, HeldOutMetrics | WholeHeldOutMetrics)]
    if not steps:
        raise ValueError(f"{log}: no steps to draw; has the run taken one?")
    with matplotlib.rc_context(STYLE):
        figure = _figure(steps, held_out, title)
        png = io.BytesIO()
        figure.savefig(png, format="png")
    write_bytes(picture, png.getvalue())


def _figure(steps: Sequence[StepMetrics], held_out: Sequence[HeldOut], title: str) -> Figure:
    has_experts = any(step.max_vio for step in steps)
    figure = Figure(figsize=(9.0, 6.6 if has_experts else 4.2), dpi=150, layout="constrained")
    ratios = [3, 2] if has_experts else [1]
    panels = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    if title:
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
    _draw_losses(panels[0], steps)
    _draw_held_out(panels[0], held_out)
    panels[0].legend(loc="upper right")
    if has_experts:
        _draw_max_vio(panels[1], [step for step in steps if step.max_vio])
    panels[-1].set_xlabel("tokens consumed")
    panels[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[-1].set_xlim(0, 1.01 * max([steps[-1].tokens, *(each.tokens for each in held_out)]))
    return figure


def _draw_losses(axes: Axes, steps: Sequence[StepMetrics]) -> None:
    tokens = [step.tokens for step in steps]
    for name, color, losses in (
        ("MTP loss", MTP, [step.mtp_loss for step in steps]),
        ("training loss", LOSS, [step.loss for step in steps]),
    ):
        if np.isfinite(losses).any():
            axes.plot(tokens, losses, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(tokens, smooth(losses), color=color, linewidth=1.8, label=name)
    skipped = [step.tokens for before, step in pairwise(steps) if step.skipped > before.skipped]
    for index, where in enumerate(skipped):
        axes.axvline(where, color=SKIPPED, linewidth=0.8, linestyle=":", label=None if index else "skipped step")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.minorticks_off()
    axes.set_ylabel("loss (nats per token, log scale)")


def _draw_held_out(axes: Axes, held_out: Sequence[HeldOut]) -> None:
    """Draw the curve over the same windows and, as a mark of its own, the final figure over all of the text."""
    curve = [each for each in held_out if isinstance(each, HeldOutMetrics)]
    if curve:
        label = f"held-out loss, the same windows ({curve[-1].bits_per_byte:.3f} bits/byte at the last point)"
        points = [each.tokens for each in curve], [each.loss for each in curve]
        axes.plot(*points, color=HELD_OUT, linewidth=1.2, marker="o", markeredgecolor="white", label=label)
    for each in held_out:
        if isinstance(each, WholeHeldOutMetrics):
            label = f"all held-out text ({each.bits_per_byte:.3f} bits/byte)"
            style: dict[str, Any] = {"linestyle": "none", "marker": "D", "markersize": 8, "markerfacecolor": "none"}
            axes.plot([each.tokens], [each.loss], color=HELD_OUT, label=label, **style)


def _draw_max_vio(axes: Axes, steps: Sequence[StepMetrics]) -> None:
    tokens = [step.tokens for step in steps]
    layers = np.array([step.max_vio for step in steps]).T  # [layers, steps]
    colors = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, len(layers)))
    for index, (layer, color) in enumerate(zip(layers, colors, strict=True)):
        is_named = len(layers) <= 8 or index in (0, len(layers) - 1)
        axes.plot(tokens, smooth(layer), color=color, linewidth=1.1, label=f"{index + 1}" if is_named else None)
    axes.plot(tokens, smooth(layers.mean(axis=0)), color=INK, linewidth=2.0, label="mean")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("MaxVio of expert load\n(max load / mean load - 1)")
    axes.legend(loc="upper right", ncols=3, title="MoE layer", fontsize=9, title_fontsize=9)


def smooth(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Mean over a fortieth of the run around each point.

    The window is centred, and at the start, where curves are steep, it shrinks evenly; so a falling curve is not
    drawn late. At the end it is cut off. What is not finite (a skipped step) is left out of every mean.
    """
    array = np.asarray(values, dtype=float)
    is_finite = np.isfinite(array)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_finite, array, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_finite)])
    index = np.arange(len(array))
    reach = np.minimum(len(array) // 80, index)
    first, past = index - reach, np.minimum(index + reach + 1, len(array))
    count = counts[past] - counts[first]
    return np.where(count > 0, (sums[past] - sums[first]) / np.maximum(count, 1), np.nan)
