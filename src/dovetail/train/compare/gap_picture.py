"""Draws a comparison: losses above, their relative difference below, over the tokens."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, ScalarFormatter
from numpy.typing import NDArray

from dovetail.text.atomic import write_bytes
from dovetail.train.compare.gap import FIRST, PAPER, Gap, smooth
from dovetail.train.compare.pairs import Pair
from dovetail.train.report.picture import HELD_OUT, INK, LOSS, MUTED, STYLE

Curves = NDArray[np.float64]  # [seeds, steps]


def draw_gap(pairs: Sequence[Pair], gap: Gap, picture: Path) -> None:
    """Draw pairs of whole seeds into the PNG `picture`, which appears whole or not at all."""
    seeds = list(dict.fromkeys(pair.seed for pair in pairs))
    tokens = [pair.tokens for pair in pairs if pair.seed == seeds[0]]
    losses, base_losses = (
        np.array([getattr(pair, name) for pair in pairs]).reshape(len(seeds), -1) for name in ("loss", "base_loss")
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 6.6), dpi=150, layout="constrained")
        title = f"{gap.recipe} against {gap.base}: {len(seeds)} seed{'s'[: len(seeds) > 1]} of {len(tokens)} steps"
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 3])
        _draw_losses(above, tokens, {gap.base: base_losses, gap.recipe: losses})
        _draw_differences(below, tokens, (losses - base_losses) / base_losses)
        below.set_xlabel("tokens consumed by each model")
        below.xaxis.set_major_formatter(EngFormatter(sep=""))
        below.set_xlim(0, 1.01 * tokens[-1])
        png = io.BytesIO()
        figure.savefig(png, format="png")
    write_bytes(picture, png.getvalue())


def _draw_losses(axes: Axes, tokens: Sequence[int], losses: dict[str, Curves]) -> None:
    for (name, curves), color, width in zip(losses.items(), (MUTED, LOSS), (4.0, 1.3), strict=False):
        axes.plot(tokens, smooth(curves).mean(axis=0), color=color, linewidth=width, label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.minorticks_off()
    axes.set_ylabel("loss, mean of seeds\n(nats per token, log scale)")
    axes.legend(loc="upper right")


def _draw_differences(axes: Axes, tokens: Sequence[int], differences: Curves) -> None:
    """In percent, smoothed. The first steps, where seeds differ most, may leave the axes."""
    curves = 100 * smooth(differences)
    centre = curves.mean(axis=0)
    for index, curve in enumerate(curves):
        axes.plot(tokens, curve, color=LOSS, alpha=0.35, linewidth=0.8, label=None if index else "one seed")
    if len(curves) > 1:
        spread = curves.std(axis=0, ddof=1)
        axes.fill_between(tokens, centre - spread, centre + spread, color=LOSS, alpha=0.15, linewidth=0)
        axes.plot(tokens, centre, color=LOSS, linewidth=2.0, label="mean of seeds, and standard deviation")
    for sign in (-1, 1):
        label = f"within {PAPER:.2%}, as the paper's FP8 [V3 App. B.1]" if sign > 0 else None
        axes.axhline(100 * sign * PAPER, color=HELD_OUT, linewidth=1.0, linestyle="--", label=label)
    axes.axhline(0.0, color=INK, linewidth=0.8)
    shown = np.abs(curves[:, int(FIRST * len(tokens)) :])
    reach = max([200 * PAPER, *shown[np.isfinite(shown)]])
    axes.set_ylim(-1.1 * reach, 1.1 * reach)
    axes.set_ylabel("difference of losses, %\n(moving average 0.9)")
    axes.legend(loc="upper right", fontsize=9)
