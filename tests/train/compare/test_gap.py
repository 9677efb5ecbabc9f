"""The gap over seeds: smoothing, Student's interval, what is said of it, the picture and the line of progress."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from dovetail.train.compare.gap import HEADER, STUDENT, Gap, as_json, printed_notes, printed_rows, smooth, summarize
from dovetail.train.compare.gap_picture import draw_gap
from dovetail.train.compare.live import CompareDisplay
from dovetail.train.compare.pairs import Pair

Curves = Sequence[Sequence[float]]  # differences by seed and step


def pairs_of(curves: Curves) -> list[Pair]:
    """Base losses of 2, and losses that differ by `curves`."""
    return [
        Pair(
            seed=seed,
            step=step,
            tokens=64 * step,
            base_loss=2.0,
            loss=2.0 * (1.0 + difference),
            base_skipped=False,
            skipped=math.isnan(difference),
            base_seconds=0.1,
            seconds=0.15,
        )
        for seed, curve in enumerate(curves)
        for step, difference in enumerate(curve, start=1)
    ]


def gap_of(curves: Curves) -> Gap:
    return summarize("ours", "bf16", pairs_of(curves))


def test_smoothing_weighs_by_powers_of_nine_tenths() -> None:
    values = np.array([[1.0, 3.0, -2.0], [math.nan, 5.0, math.nan]])
    expected = [(0.81 + 0.9 * 3 - 2) / (0.81 + 0.9 + 1), 5.0]
    assert smooth(values)[:, 2] == pytest.approx(expected, rel=1e-12)
    assert smooth(values)[0, 0] == 1.0 and math.isnan(smooth(values)[1, 0])
    assert smooth([0.25] * 50) == pytest.approx([0.25] * 50, rel=1e-12)  # no start from 0


def test_student_s_t() -> None:
    assert pytest.approx(STUDENT, abs=6e-4) == [float(stats.t.ppf(0.975, n)) for n in range(1, 11)]


def test_the_gap_is_of_the_last_quarter_and_the_interval_is_student_s() -> None:
    gap = gap_of([[0.5, -0.3, 0.2, 0.010], [0.1, 0.2, 0.0, 0.013], [0.7, 0.6, 0.1, 0.016]])
    last = np.array([0.010, 0.013, 0.016])
    assert [each.gap for each in gap.seeds] == pytest.approx(last)
    low, high = stats.t.interval(0.95, 2, loc=last.mean(), scale=stats.sem(last))
    assert (gap.mean - gap.half_width, gap.mean + gap.half_width) == pytest.approx((low, high), rel=1e-3)
    assert gap.is_told_apart and gap.bounds == pytest.approx((low, high), rel=1e-3)
    assert [each.time_ratio for each in gap.seeds] == pytest.approx([1.5] * 3)


def test_the_largest_leaves_out_the_first_tenth() -> None:
    curve = [9.0, *[0.0] * 9, -0.5, *[0.0] * 9]
    (seed,) = gap_of([curve]).seeds
    assert seed.largest == smooth(curve)[2] > 0.5
    (seed,) = gap_of([[0.0, *curve[1:]]]).seeds
    assert seed.largest == smooth([0.0, *curve[1:]])[10] < 0


@pytest.mark.parametrize(
    ("gaps", "words"),
    [
        ([0.010, 0.011, 0.012], "ours is above bf16: 3 seeds put the gap at +0.852% to +1.348% (95 %)"),
        ([-0.010, -0.011, -0.012], "ours is below bf16"),
        ([0.010, -0.011, 0.003], "cannot be told apart here: the spread of 3 seeds"),
        ([0.0, 0.0], "have the same losses"),
        ([0.01], "one seed does not say"),
        ([math.nan, math.nan], "losses were not finite"),
    ],
)
def test_what_is_said(gaps: list[float], words: str) -> None:
    gap = gap_of([[value] * 4 for value in gaps])
    assert words in "\n".join(printed_notes(gap))
    assert gap.is_told_apart == (" is above " in words or " is below " in words)
    assert all(len(row) == len(HEADER) for row in printed_rows(gap))
    assert len(list(printed_rows(gap))) == len(gaps) + (2 if len(gaps) > 1 else 1)


def test_skipped_steps_are_left_out_and_told() -> None:
    gap = gap_of([[0.0] * 4 + [math.nan, 0.0, math.nan, 0.02]])
    assert gap.seeds[0].gap == pytest.approx(0.02) and gap.seeds[0].skipped == 2
    assert "2 steps had a loss or gradient that was not finite" in next(iter(printed_notes(gap)))


def test_json_has_null_for_what_is_not_known() -> None:
    record = json.loads(json.dumps(as_json(gap_of([[0.01] * 4])), allow_nan=False))
    assert record["deviation"] is None and record["half_width"] is None and record["mean"] == pytest.approx(0.01)
    empty = json.loads(json.dumps(as_json(gap_of([[math.nan] * 4] * 2)), allow_nan=False))
    assert empty["mean"] is None and empty["seeds"][0]["gap"] is None and empty["seeds"][0]["skipped"] == 4


@pytest.mark.parametrize("curves", [[[0.01]], [[0.001, -0.002, 0.003]] * 3, [[math.nan] * 3, [0.0, 0.1, math.nan]]])
def test_the_picture_is_whole(curves: Curves, tmp_path: Path) -> None:
    draw_gap(pairs_of(curves), gap_of(curves), tmp_path / "new" / "gap.png")
    assert matplotlib.image.imread(tmp_path / "new" / "gap.png").shape == (990, 1350, 4)
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["gap.png"]


@pytest.fixture
def shown() -> Callable[[Curves], str]:
    """What a display that is not a terminal prints, at a second per pair of steps."""

    def show(curves: Curves) -> str:
        clock = iter(float(second) for second in range(1000))
        console = Console(file=io.StringIO(), width=200)
        display = CompareDisplay(len(curves), len(curves[0]), console, line_seconds=10.0, clock=lambda: next(clock))
        for pair in pairs_of(curves):
            display.update(pair, num_done=pair.seed)
        display.close()
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    return show


def test_progress_comes_in_plain_lines(shown: Callable[[Curves], str]) -> None:
    first, *rest = shown([[0.01] * 25, [-0.01] * 25]).splitlines()
    assert first == "seed 0 (1/2)  step 1/25  loss 2.0200  base 2.0000  gap +1.000%  150 ms  base 100 ms  12s left"
    assert [text.split("  ")[1] for text in rest[:3]] == ["step 11/25", "step 21/25", "step 25/25"]
    assert rest[-1].startswith("seed 1 (2/2)  step 25/25") and "gap -1.000%" in rest[-1]  # seeds are not mixed
    assert rest[-1].endswith("0s left")


def test_on_a_terminal_it_is_one_live_line() -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    display = CompareDisplay(1, 40, console, clock=iter(range(1000)).__next__)
    for pair in pairs_of([[0.01] * 40]):
        display.update(pair, num_done=0)
    display.close()
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert text.count("step ") >= 40 and text.count("\n") < 3 and "step 40/40" in text
    assert text.endswith("\x1b[?25h")  # the cursor is there again
