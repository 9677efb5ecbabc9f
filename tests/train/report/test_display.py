import io
import math

import pytest
from rich.console import Console

from dovetail.train.report.display import BARS, PLAIN_BARS, Display, duration, spark
from dovetail.train.report.metrics import HeldOutMetrics, StepMetrics, WholeHeldOutMetrics


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def step_metrics(step: int, **changed: object) -> StepMetrics:
    values: dict[str, object] = {
        "step": step,
        "tokens": step * 4096,
        "loss": 9.0 / step,
        "mtp_loss": 9.5 / step,
        "mtp_losses": [9.5 / step],
        "balance_loss": 1e-4,
        "grad_norm": 0.81,
        "learning_rate": 2.2e-4,
        "batch_size": 16,
        "gamma": 0.001,
        "mtp_weight": 0.3,
        "tokens_per_second": 12345.6,
        "mfu": 0.412,
        "max_vio": [0.1, 0.52],
        "skipped": 0,
        "seconds": 2.0,
    }
    return StepMetrics(**(values | changed))  # type: ignore[arg-type]


HELD_OUT = HeldOutMetrics(step=2, tokens=8192, loss=3.0, bits_per_byte=1.9)


def plain(clock: Clock) -> tuple[Display, io.StringIO]:
    out = io.StringIO()
    return Display("run", 100, Console(file=out, width=40), line_seconds=10, clock=clock), out


def live(clock: Clock, encoding: str = "utf-8") -> tuple[Display, Console]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, force_terminal=True, width=100, record=True, _environ={"TERM": "xterm"})
    return Display("a run", 100, console, clock=clock), console


def test_plain_lines_are_whole_and_not_too_many() -> None:
    clock = Clock()
    display, out = plain(clock)
    for step in range(1, 22):
        display.update(step_metrics(step))
        clock.now += 2.0
    display.close()
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [
        "1/100",
        "6/100",
        "11/100",
        "16/100",
        "21/100",
    ]  # one in 10 s
    assert lines[0] == (
        "step 1/100  loss 9.0000  mtp 9.5000  12346 tokens/s  mfu 41.2%  maxvio 0.31 (worst 0.52)  "
        "lr 2.20e-04  grad 0.81  batch 16  3m18s left"
    )
    assert "\x1b" not in out.getvalue()


def test_plain_lines_show_the_last_step_and_what_is_odd() -> None:
    clock = Clock()
    display, out = plain(clock)
    display.update(step_metrics(1))
    display.update(HELD_OUT)
    display.message("[bold] is not markup")
    display.update(step_metrics(2, mtp_loss=math.nan, mtp_losses=[], max_vio=[], skipped=3), seconds_left=3600.0)
    display.close()
    display.close()
    assert out.getvalue().splitlines()[1:] == [
        "held out after step 2: loss 3.0000, 1.9000 bits/byte",
        "[bold] is not markup",
        "step 2/100  loss 4.5000  12346 tokens/s  mfu 41.2%  lr 2.20e-04  grad 0.81  batch 16  skipped 3  1h00m left",
    ]


def test_the_figure_of_all_text_is_a_line_of_its_own() -> None:
    whole = WholeHeldOutMetrics(step=2, tokens=8192, loss=3.25, bits_per_byte=2.0625)
    expected = "all held-out text after step 2: loss 3.2500, 2.0625 bits/byte"
    display, out = plain(Clock())
    display.update(step_metrics(1))
    display.update(HELD_OUT)
    display.update(step_metrics(2))
    display.update(whole)
    assert [line[:18] for line in out.getvalue().splitlines()] == [
        "step 1/100  loss 9",
        "held out after ste",
        "step 2/100  loss 4",  # what was waiting to be shown comes first
        "all held-out text ",
    ]
    assert out.getvalue().endswith(expected + "\n")
    live_display, console = live(Clock())
    live_display.update(step_metrics(1))
    live_display.update(whole)
    live_display.close()
    assert expected in console.export_text()


def test_the_loss_of_every_mtp_depth_is_shown() -> None:
    clock = Clock()
    display, out = plain(clock)
    display.update(step_metrics(1, mtp_loss=9.75, mtp_losses=[9.5, 10.0]))
    assert "loss 9.0000  mtp 9.5000 10.0000  12346 tokens/s" in out.getvalue()


def test_live_panel_shows_everything() -> None:
    clock = Clock()
    display, console = live(clock)
    for step in range(1, 4):
        clock.now += 1.0
        display.update(step_metrics(step))
    display.update(HELD_OUT)
    clock.now += 1.0
    display.update(step_metrics(4, skipped=1, max_vio=[0.0, 0.52, 7.0]))
    display.close()
    shown = console.export_text().split("a run")[-1]
    for expected in (
        "step 4 of 100",
        "3m12s left",
        "loss 2.2500",
        "MTP loss 2.3750",
        "1.9000 bits/byte",
        "tokens/s 12,346",
        "MFU 41.2%",
        "tokens 16,384",
        "learning rate 2.20e-04",
        "gradient norm 0.810",
        "batch 16 sequences",
        "MTP weight 0.3",
        "bias speed 0.001",
        "skipped 1",
        f"loss    {BARS[7]}{BARS[2]}{BARS[0]}{BARS[0]}  2.25 to 9.00",
        f"MaxVio  {BARS[0]}{BARS[4]}{BARS[7]}  mean 2.51, worst 7.00",
    ):
        assert expected in shown


def test_live_panel_is_not_redrawn_for_every_fast_step() -> None:
    clock = Clock()
    display, console = live(clock)
    for step in range(1, 101):
        display.update(step_metrics(step))
        clock.now += 0.02
    display.close()
    shown = console.export_text()
    assert shown.count("a run") <= 13
    assert "step 100 of 100" in shown


def test_live_panel_on_a_terminal_without_unicode() -> None:
    display, console = live(Clock(), encoding="ascii")
    display.update(step_metrics(1))
    display.close()
    shown = console.export_text()
    assert shown.isascii()
    assert f"MaxVio  {PLAIN_BARS[0]}{PLAIN_BARS[4]}" in shown


def test_dumb_terminal_gets_lines() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, _environ={"TERM": "dumb"})
    display = Display("a run", 100, console, clock=Clock())
    display.update(step_metrics(1))
    display.close()
    assert out.getvalue().startswith("step 1/100  loss 9.0000")


def test_spark_covers_its_range() -> None:
    assert spark([0.0, 0.5, 1.0], 0.0, 1.0) == BARS[0] + BARS[4] + BARS[7]
    assert spark([-5.0, 99.0, math.nan], 0.0, 1.0) == BARS[0] + BARS[7] + "?"
    assert spark([3.0, 3.0], 3.0, 3.0) == BARS[0] * 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (7620, "2h07m"),
        (442_800, "5d03h"),
        (math.nan, "-"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_long_work_says_how_far_it_is_and_short_work_says_nothing() -> None:
    clock = Clock()
    display, out = plain(clock)
    for done in range(1, 5):
        clock.now += 2.0
        display.progress("measuring", done, 4)  # in eight seconds
    assert out.getvalue() == ""
    for done in range(1, 21):
        display.progress("measuring", done, 20)
        clock.now += 2.0
    assert out.getvalue().splitlines() == ["measuring: 30%", "measuring: 55%", "measuring: 80%"]


def test_work_is_below_the_live_panel_until_it_is_done() -> None:
    display, console = live(Clock())
    display.update(step_metrics(1))
    display.progress("measuring", 1, 4)
    shown = console.export_text(clear=False)
    assert "measuring: 25%" in shown and "MFU" in shown
    display.progress("measuring", 4, 4)
    console.export_text()
    display.close()
    assert "measuring" not in console.export_text()
