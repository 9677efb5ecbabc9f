"""The line of progress, in plain lines and on a terminal."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from dovetail.train.compare.live import CompareDisplay
from dovetail.train.compare.pairs import Pair

RecordsOf = Callable[..., list[Pair]]
Show = Callable[..., str]


@pytest.fixture
def shown() -> Show:
    """What a display that is not a terminal prints, at a second per pair of steps."""

    def show(pairs: list[Pair], num_seeds: int, num_steps: int, is_paired: bool = True) -> str:
        clock = iter(float(second) for second in range(1000))
        console = Console(file=io.StringIO(), width=200)
        display = CompareDisplay(num_seeds, num_steps, ("x", "y"), is_paired, console, 10.0, lambda: next(clock))
        for pair in pairs:
            display.update(pair, num_done=pair.seed)
        display.close()
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    return show


def test_progress_comes_in_plain_lines(shown: Show, records_of: RecordsOf) -> None:
    names, first, *rest = shown(records_of([[0.01] * 25, [-0.01] * 25]), 2, 25).splitlines()
    assert names == "A: x; B: y"
    assert first == ("seed 0 (1/2)  step 1/25  A 2.0000  B 2.0200  difference +1.000%  A 100 ms  B 150 ms  12s left")
    assert [text.split("  ")[1] for text in rest[:3]] == ["step 11/25", "step 21/25", "step 25/25"]
    assert rest[-1].startswith("seed 1 (2/2)  step 25/25") and "difference -1.000%" in rest[-1]  # seeds are not mixed
    assert rest[-1].endswith("0s left")


def test_other_batches_have_no_difference_and_a_side_may_end_first(shown: Show, records_of: RecordsOf) -> None:
    first, second = records_of([[0.01] * 2])
    *_, last = shown([first, replace(second, a=None)], 1, 2, is_paired=False).splitlines()
    assert last == "seed 0 (1/1)  step 2/2  B 2.0200  B 150 ms  0s left"


def test_on_a_terminal_it_is_one_live_line(records_of: RecordsOf) -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    display = CompareDisplay(1, 40, ("x", "y"), console=console, clock=iter(range(1000)).__next__)
    for pair in records_of([[0.01] * 40]):
        display.update(pair, num_done=0)
    display.close()
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert text.count("step ") >= 40 and text.count("\n") < 4 and "step 40/40" in text
    assert text.endswith("\x1b[?25h")  # the cursor is there again
