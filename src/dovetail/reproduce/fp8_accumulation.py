"""An experiment: the error of FP8 sums on Hopper's Tensor Core, with and without promotion.

The paper [V3 §3.3.2] reports that the product of two random matrices with K = 4096 has a maximum relative error of
nearly 2 %, and that promotion to FP32 every N_C = 128 elements of K removes it. It says neither how the matrices were
drawn nor what the error is relative to. So there are two draws here, and three measures over all outputs, against the
exact product of the same E4M3 values in FP64 (which leaves out the error of quantisation):

    max            max |error| / |exact|                where values have both signs some outputs nearly cancel, and
                                                        this has no bound
    max of RMS     max |error| / root mean square of exact
    RMS            root mean square of error / root mean square of exact

The Tensor Core is that of `numerics.products.accumulate`, which models it on any device.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dovetail.atomic import check_new_file, write_bytes
from dovetail.numerics.formats.quantize import quantize
from dovetail.numerics.formats.quantized import grid_values
from dovetail.numerics.products.accumulate import matmul
from dovetail.numerics.products.accumulators import HopperAccumulator
from dovetail.train.report.picture import INK, STYLE

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)  # K
INTERVALS = (None, 512, 256, 128, 64)  # N_C
OUTPUTS = 256  # rows and columns of the product
READING = {
    "normal": "max_of_rms",
    "uniform 0..1": "max",
}  # each draw, and the measure that is compared with the paper's
DRAWS = tuple(READING)
PAPER = 0.02  # "nearly 2 %" at PAPER_LENGTH without promotion [V3 §3.3.2]
PAPER_LENGTH = 4096
REMOVED = 10.0  # promotion removes the error if it is this many times smaller with N_C = 128
MEASURES = {"max": "max", "max_of_rms": "max of RMS", "rms": "RMS"}
HEADER = ("values", "error", ">K", ">N_C = never", *(f">{each}" for each in INTERVALS[1:]), ">paper, never")
COLORS = ("#c0392b", "#d9822b", "#8a6fb0", "#1f5fa8", "#2a8f5b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The errors of one product, as fractions."""

    values: str
    length: int  # K
    promotion: int | None  # N_C
    max: float
    max_of_rms: float
    rms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    rows: tuple[Row, ...]
    picture: Path
    title: str = "Relative error of FP8 products on Hopper's Tensor Core (model)"
    source: str = "[V3 §3.3.2]"

    def row(self, values: str, length: int, promotion: int | None) -> Row:
        return next(row for row in self.rows if (row.values, row.length, row.promotion) == (values, length, promotion))

    def readings(self, promotion: int | None) -> list[float]:
        """Return the paper's error in our two readings: for values of both signs, and for positive ones."""
        return [getattr(self.row(values, PAPER_LENGTH, promotion), measure) for values, measure in READING.items()]

    @property
    def is_reproduced(self) -> bool:
        """Whether the paper's 2 % is between the two readings, and N_C = 128 makes both REMOVED times smaller."""
        without, promoted = self.readings(None), self.readings(128)
        is_removed = all(after * REMOVED < before for before, after in zip(without, promoted, strict=True))
        return is_removed and min(without) <= PAPER <= max(without)


def reproduce(picture: Path, lengths: Sequence[int] = LENGTHS, outputs: int = OUTPUTS) -> Result:
    """Measure, and draw the PNG `picture`, in half a minute on two cores. `lengths` must contain PAPER_LENGTH."""
    check_new_file(picture)
    rows = [row for values in DRAWS for length in lengths for row in measure(values, length, outputs)]
    result = Result(rows=tuple(rows), picture=picture)
    draw(result, picture)
    return result


def measure(values: str, length: int, outputs: int) -> Iterable[Row]:
    """Yield a row for each interval of promotion."""
    generator = torch.Generator().manual_seed(length)
    a, b = (_operand(values, outputs, length, generator) for _ in range(2))
    exact = a.double() @ b.double().t()
    for promotion in INTERVALS:
        if promotion is not None and promotion >= length:
            continue  # the same as without promotion
        error = (matmul(a, b, HopperAccumulator(promotion)).double() - exact).abs()
        size = _rms(exact)
        yield Row(
            values=values,
            length=length,
            promotion=promotion,
            max=float((error / exact.abs()).max()),
            max_of_rms=float(error.max()) / size,
            rms=_rms(error) / size,
        )


def _operand(values: str, rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Draw an operand [rows, length] in FP32 on the E4M3 grid, with one scale: its largest value is 448."""
    draw = torch.randn if values == "normal" else torch.rand
    drawn = draw(rows, length, generator=generator)
    return grid_values(quantize(drawn, (rows, length)))


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def as_json(result: Result) -> dict[str, Any]:
    """Return plain data, with the verdict."""
    return asdict(result) | {"picture": str(result.picture), "paper": PAPER, "is_reproduced": result.is_reproduced}


def printed_rows(result: Result) -> Iterable[tuple[str, ...]]:
    """Yield a row for each draw, measure and K, with a column for each interval, empty if it is not shorter than K."""
    lengths = sorted({row.length for row in result.rows})
    for values in DRAWS:
        for measure, name in MEASURES.items():
            if values == "uniform 0..1" and measure == "max_of_rms":
                continue  # outputs differ so little that it equals max
            for length in lengths:
                line = {row.promotion: row for row in result.rows if (row.values, row.length) == (values, length)}
                errors = (f"{100 * getattr(line[each], measure):.3g}%" if each in line else "" for each in INTERVALS)
                is_paper = length == PAPER_LENGTH and measure == READING[values]
                yield values, name, str(length), *errors, f"nearly {PAPER:.0%}" if is_paper else ""


def printed_notes(result: Result) -> Iterable[str]:
    both, positive = result.readings(None)
    yield "max: |error| / |exact|; max of RMS: max |error| / RMS of exact; RMS: RMS of error / RMS of exact"
    yield (
        f"K = {PAPER_LENGTH} without promotion: {both:.1%} of the RMS for values of both signs (some outputs nearly"
        f" cancel, so max has no bound), {positive:.1%} at most for positive ones; the paper says nearly {PAPER:.0%},"
        " and neither how values were drawn nor what the error is relative to"
    )
    yield f"picture: {result.picture}"


def draw(result: Result, picture: Path) -> None:
    """Draw the error over K for both draws, with a line per N_C; the PNG appears whole or not at all."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.0, 4.4), dpi=150, layout="constrained")
        figure.suptitle(f"{result.title} {result.source}", x=0.01, ha="left", weight="bold")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (values, measure) in zip(panels, READING.items(), strict=True):
            _draw_panel(axes, [row for row in result.rows if row.values == values], measure)
        panels[0].set_title("values of both signs (normal)", fontsize=10.5)
        panels[0].set_ylabel("max |error|, % of the RMS of exact")
        panels[1].set_title("positive values (uniform 0..1)", fontsize=10.5)
        panels[1].set_ylabel("max |error| / |exact|, %")
        panels[1].yaxis.set_tick_params(labelleft=True)
        panels[0].legend(title="promoted every", loc="upper left", fontsize=9, title_fontsize=9)
        png = io.BytesIO()
        figure.savefig(png, format="png")
    write_bytes(picture, png.getvalue())


def _draw_panel(axes: Axes, rows: Sequence[Row], measure: str) -> None:
    for promotion, color in zip(INTERVALS, COLORS, strict=True):
        line = [row for row in rows if row.promotion == promotion]
        errors = [100 * getattr(row, measure) for row in line]
        label = "never" if promotion is None else f"{promotion} of K"
        axes.plot([row.length for row in line], errors, color=color, marker="o", markersize=4, label=label)
    axes.plot(
        [PAPER_LENGTH], [100 * PAPER], color=INK, marker="*", markersize=12, linestyle="none", label="paper, never"
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({row.length for row in rows}), [str(length) for length in sorted({r.length for r in rows})])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel("K")
