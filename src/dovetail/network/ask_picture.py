"""A sweep as a picture: bus bandwidth over size, or over GPUs, a line for each fabric, dashed with what fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dovetail.network.answer import Answer, Case
from dovetail.network.ask_report import size_text
from dovetail.network.question import Question, changes_text

INKS = ("#5b94cf", "#4fa367", "#dfa23c", "#c0605a", "#8a6fc0", "#3fa3a3", "#b0719f", "#7d8a4c")
_STYLE: dict[Any, Any] = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}
_TICKS = 12


def check_picture(question: Question, picture: Path) -> None:
    """Raises ValueError for a file that is neither .png nor .svg, for a folder that there is not, and where there is
    nothing to draw a line through."""
    if picture.suffix not in (".png", ".svg"):
        raise ValueError(f"--picture {picture}: expected a name that ends in .png or .svg")
    if not picture.absolute().parent.is_dir():
        raise ValueError(f"--picture {picture}: there is no folder {picture.parent}")
    if not question.swept:
        raise ValueError("--picture draws a sweep: add --sweep, such as --sweep 1MiB..1GiB")


def draw(answer: Answer, picture: Path) -> None:
    """Write `picture`, in the format that its name ends in. Raises ValueError as `check_picture` does."""
    check_picture(answer.question, picture)
    import matplotlib
    from matplotlib.figure import Figure

    by_size = answer.question.swept == "sizes"
    fails = answer.question.has_failures
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.0, 4.8), dpi=150, layout="constrained")
        axes = figure.subplots()
        lines = list(dict.fromkeys((case.fabric, case.gpus if by_size else case.size) for case in answer.cases))
        for index, (fabric, other) in enumerate(lines):
            cases = [
                case for case in answer.cases if (case.fabric, case.gpus if by_size else case.size) == (fabric, other)
            ]
            label = f"{fabric}, {other:,} GPUs" if by_size else f"{fabric}, {size_text(other)}"
            ink = INKS[index % len(INKS)]
            places = [_place(case, by_size) for case in cases]
            whole = [case.healthy.bus_bandwidth / 1e9 for case in cases]
            width = 1.6 + 1.4 * min(len(lines) - 1 - index, 3)  # so that equal lines are seen below each other
            axes.plot(places, whole, color=ink, linewidth=width, marker="o", markersize=4, label=label)
            if fails:
                left = [_mean([run.bus_bandwidth / 1e9 for run in case.failed]) for case in cases]
                axes.plot(places, left, color=ink, linewidth=width, linestyle="--")
        places = sorted({_place(case, by_size) for case in answer.cases})
        shown = places[:: -(-len(places) // _TICKS)]
        axes.set_xscale("log", base=2)
        axes.set_xticks(shown, [size_text(place) if by_size else f"{place:,.0f}" for place in shown], fontsize=8)
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("size" if by_size else "GPUs")
        axes.set_ylabel("bus bandwidth (GB/s per GPU)")
        dashed = f"; dashed: {changes_text(answer.question)}" if fails else ""
        axes.set_title(f"{answer.question.collective}, {answer.question.routing} routing{dashed}", loc="left")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False)
        figure.savefig(picture)


def _place(case: Case, by_size: bool) -> float:
    return case.size if by_size else float(case.gpus)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
