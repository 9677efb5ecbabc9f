"""Draws a sweep: bus bandwidth over size, tokens or GPUs, with a line for each fabric.

If sizes or tokens are crossed with numbers of GPUs, there is a line for each number. A dashed line shows the bandwidth
with failures, or beside another collective.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dovetail.network.ask.answer import Answer, Case
from dovetail.network.ask.question import Question, changes_text
from dovetail.network.ask.report import size_text

INKS = ("#5b94cf", "#4fa367", "#dfa23c", "#c0605a", "#8a6fc0", "#3fa3a3", "#b0719f", "#7d8a4c")
MARKERS = "os^D"  # the next one is used each time that the colours have run out
_STYLE: dict[Any, Any] = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}
_TICKS = 12
_LINES_INSIDE = 4  # so many names find room between the lines


def check_picture(question: Question, picture: Path) -> None:
    """Raise ValueError if the file is neither .png nor .svg, its folder is missing, or there is no sweep to draw."""
    if picture.suffix not in (".png", ".svg"):
        raise ValueError(f"--picture {picture}: expected a name that ends in .png or .svg")
    if picture.is_dir():
        raise ValueError(f"--picture {picture}: is a folder; give the name of a file")
    if not picture.absolute().parent.is_dir():
        raise ValueError(f"--picture {picture}: there is no folder {picture.parent}")
    if not os.access(picture.absolute().parent, os.W_OK | os.X_OK):
        raise ValueError(f"--picture {picture}: {picture.absolute().parent} cannot be written to; give another path")
    if not question.swept:
        raise ValueError("--picture draws a sweep: add --sweep, such as --sweep 1MiB..1GiB")


def draw(answer: Answer, picture: Path) -> None:
    """Write `picture`, in the format that its name ends in. Raises ValueError as `check_picture` does."""
    check_picture(answer.question, picture)
    import matplotlib
    from matplotlib.figure import Figure

    swept = answer.question.swept
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.0, 4.8), dpi=150, layout="constrained")
        axes = figure.subplots()
        lines = _plot(axes, answer)
        places = sorted({_place(case, swept) for case in answer.cases})
        shown = places[:: -(-len(places) // _TICKS)]
        axes.set_xscale("log", base=2)
        axes.set_xticks(
            shown, [size_text(place) if swept == "sizes" else f"{place:,.0f}" for place in shown], fontsize=8
        )
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel({"sizes": "size", "tokens": "tokens per GPU", "gpus": "GPUs"}[swept])
        axes.set_ylabel("bus bandwidth (GB/s per GPU)")
        question = answer.question
        reduced_by = changes_text(question) or (f"beside {question.beside}" if question.beside else "")
        dashed = f"; dashed: {reduced_by}" if reduced_by else ""
        axes.set_title(f"{question.collective}, {question.routing} routing{dashed}", loc="left")
        axes.grid(axis="y", alpha=0.3)
        if len(lines) > _LINES_INSIDE:
            figure.legend(frameon=False, loc="outside right upper")
        else:
            axes.legend(frameon=False)
        try:
            figure.savefig(picture)
        except OSError as error:
            raise ValueError(f"--picture {picture}: cannot be written: {error.strerror}; give another path") from None


def _plot(axes: Any, answer: Answer) -> list[str]:
    """Draw the lines, and return their names."""
    swept, fabrics = answer.question.swept, [each.name for each in answer.fabrics]
    lines = list(dict.fromkeys(_line(case, swept) for case in answer.cases))
    for index, label in enumerate(lines):
        cases = [case for case in answer.cases if _line(case, swept) == label]
        ink = INKS[index % len(INKS)]
        places = [_place(case, swept) for case in cases]
        whole = [case.healthy.bus_bandwidth / 1e9 for case in cases]
        behind = fabrics.index(cases[0].fabric)
        width = 1.6 + 1.4 * min(len(fabrics) - 1 - behind, 3)  # so that a line shows under an equal one
        marker = MARKERS[index // len(INKS) % len(MARKERS)]
        axes.plot(places, whole, color=ink, linewidth=width, marker=marker, markersize=4 + width, label=label)
        reduced = [(_place(case, swept), rate / 1e9) for case in cases if (rate := _reduced(case)) is not None]
        if reduced:
            axes.plot(*zip(*reduced, strict=True), color=ink, linewidth=width, linestyle="--")
    return lines


def _line(case: Case, swept: str) -> str:
    amount = f"{case.experts.tokens:,} tokens" if case.experts else size_text(case.size)
    return f"{case.fabric}, {amount}" if swept == "gpus" else f"{case.fabric}, {case.gpus:,} GPUs"


def _place(case: Case, swept: str) -> float:
    if swept == "gpus":
        return float(case.gpus)
    return float(case.experts.tokens) if case.experts else case.size


def _reduced(case: Case) -> float | None:
    """Return the bus bandwidth with failures, as the mean over trials, or while sharing with what runs beside."""
    if case.failed:
        return sum(run.bus_bandwidth for run in case.failed) / len(case.failed)
    if case.contention is None or not case.contention.times.shared:
        return None
    return case.healthy.bus_bandwidth * case.contention.times.alone / case.contention.times.shared
