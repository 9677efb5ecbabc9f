"""Draws a measurement: the spread of its latencies, and when each request ran."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dovetail.atomic import write_bytes
from dovetail.bench.outcome import Outcome
from dovetail.train.report.picture import GRID, LOSS, MTP, MUTED, SKIPPED, STYLE

MARKED = (0.5, 0.9)  # shares of the curves that get a line


def draw_serving(outcomes: Sequence[Outcome], picture: Path, title: str) -> None:
    """Draw `outcomes` into the PNG `picture`, which appears whole or not at all."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 6.6), dpi=150, layout="constrained")
        panels = figure.subplot_mosaic("AB\nCC", height_ratios=[2, 3])
        figure.suptitle(title, x=0.01, ha="left", weight="bold", size=10.5)
        fine = [outcome for outcome in outcomes if outcome.error is None]
        first = [(outcome.first_token_seconds, 1.0) for outcome in fine]
        _draw_shares(panels["A"], first, "time to first token, seconds")
        between = [(second * 1e3, count) for outcome in fine for second, count in outcome.token_seconds]
        _draw_shares(panels["B"], between, "inter-token latency, milliseconds")
        panels["A"].set_ylabel("share of requests up to this")
        panels["B"].set_ylabel("share of tokens up to this")
        _draw_timeline(panels["C"], outcomes)
        png = io.BytesIO()
        figure.savefig(png, format="png")
    write_bytes(picture, png.getvalue())


def _draw_shares(axes: Axes, values: Sequence[tuple[float, float]], label: str) -> None:
    """Draw the share of (value, weight) that is at most x, over x."""
    axes.set_xlabel(label)
    axes.set_ylim(0, 1.02)
    if not values:
        axes.text(0.5, 0.5, "none", ha="center", color=MUTED, transform=axes.transAxes)
        return
    points, weights = np.array(sorted(values)).T
    shares = np.cumsum(weights) / weights.sum()
    axes.step([points[0], *points], [0, *shares], where="post", color=LOSS)
    for share in MARKED:
        axes.axhline(share, color=GRID, linewidth=1, linestyle="--", zorder=0)
    axes.set_yticks([0, *MARKED, 1])
    axes.set_xlim(left=0)


def _draw_timeline(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    """Draw a line for each request: waiting for its first token, then generating; failures end in a cross."""
    rows = sorted(outcomes, key=lambda outcome: outcome.sent)
    waits, runs = [], []
    for row, outcome in enumerate(rows):
        first = outcome.chunks[0][0] if outcome.chunks else outcome.end
        waits.append((row, outcome.sent, first))
        runs.append((row, first, outcome.end))
    for spans, color, label in ((waits, MTP, "waiting and prefill"), (runs, LOSS, "generating")):
        places, begins, ends = np.array(spans).T
        axes.hlines(places, begins, ends, colors=color, linewidth=max(0.6, min(4.0, 150 / len(rows))), label=label)
    failed = [(outcome.end, row) for row, outcome in enumerate(rows) if outcome.error is not None]
    if failed:
        axes.scatter(*zip(*failed, strict=True), marker="x", color=SKIPPED, zorder=3, label="failed")
    axes.set_xlabel("seconds after the start")
    axes.set_ylabel("request")
    axes.set_xlim(left=0)
    axes.legend(loc="lower right")
