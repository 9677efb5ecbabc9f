"""Pictures say what the timeline says."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest

from dovetail.parallel.schedules.dualpipe import dualpipe
from dovetail.parallel.schedules.pipelines import SCHEDULES, interleaved, make_schedule, one_f_one_b
from dovetail.planner.report.drawing import chrome_trace, draw_svg, draw_text, seconds_text
from dovetail.planner.training.timeline import Durations, Timeline, replay

DURATIONS = Durations(
    forward=0.058, backward=0.127, input_backward=0.102, weight_backward=0.025, pair=0.139, send=0.001
)
SVG = "{http://www.w3.org/2000/svg}"


def timeline(name: str) -> Timeline:
    return replay(make_schedule(name, 4, 8), DURATIONS)


def test_text_of_a_small_schedule() -> None:
    """9 seconds on 45 columns, 5 each."""
    drawn = draw_text(replay(one_f_one_b(2, 2), Durations(forward=1.0, backward=2.0)), 59)
    assert drawn.splitlines() == [
        "1f1b: 2 ranks, 2 micro-batches",
        "rank 0 F0---F1---..........B0--------.....B1--------  33.3%",
        "rank 1 .....F0---B0--------F1---B1--------..........  33.3%",
        "       0                                         9 s idle",
        "F forward; B backward; . idle",
    ]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("width", [40, 80, 200])
def test_text_fits(name: str, width: int) -> None:
    lines = draw_text(timeline(name), width).splitlines()
    assert max(len(line) for line in lines) <= width
    assert [line.split("%")[0].split()[0] for line in lines[1:5]] == ["rank"] * 4


def test_text_idles_where_the_timeline_idles() -> None:
    drawn = timeline("1f1b")
    for rank, line in enumerate(draw_text(drawn, 120).splitlines()[1:5]):
        row = line[len("rank 0 ") : -len("  27.8%")]
        share = drawn.bubble[rank] / drawn.seconds
        assert row.count(".") / len(row) == pytest.approx(share, abs=0.05)
        assert float(line[-6:-1]) == pytest.approx(100 * share, abs=0.05)


def test_text_of_other_stages_is_lower_case() -> None:
    first = draw_text(replay(interleaved(2, 2, 2), DURATIONS), 150).splitlines()[1]
    assert re.match(r"rank 0 F0-*F1-*f0", first)
    letters = draw_text(replay(dualpipe(8, 20), DURATIONS), 100).splitlines()
    assert {"F", "f", "X", "I", "."} <= set(letters[1])


@pytest.mark.parametrize("name", SCHEDULES)
def test_svg_has_every_step_in_its_place(name: str) -> None:
    drawn = timeline(name)
    root = ElementTree.fromstring(draw_svg(drawn, title="a < b & c", width=1000))
    cells = [
        tuple(float(number) for number in found)
        for path in root.iter(f"{SVG}path")
        if path.get("fill")
        for found in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)", path.get("d") or "")
    ]
    halves = [
        (rank, index, start, end)
        for rank, steps in enumerate(drawn.schedule.actions)
        for step, start, end in zip(steps, drawn.start[rank], drawn.end[rank], strict=True)
        for index in range(len(step.halves))
    ]
    assert len(cells) == len(halves)
    left = min(x for x, *_ in cells)
    right = max(x + cell for x, _, cell, _ in cells)
    scale = (right - left) / drawn.seconds
    expected = sorted((left + start * scale, (end - start) * scale) for _, _, start, end in halves)
    for found, wanted in zip(sorted((x, cell) for x, _, cell, _ in cells), expected, strict=True):
        assert found == pytest.approx(wanted, abs=0.05)
    assert 0 <= left < right <= 1000
    texts = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert texts[0] == "a < b & c"
    assert {f"rank {rank}" for rank in range(4)} <= set(texts)
    assert "http" not in draw_svg(drawn).replace("http://www.w3.org/2000/svg", "")


def test_svg_numbers_are_the_micro_batches() -> None:
    drawn = timeline("1f1b")
    root = ElementTree.fromstring(draw_svg(drawn, width=1600))
    numbers = sorted(text.text or "" for group in root.iter(f"{SVG}g") for text in group.iter(f"{SVG}text"))
    assert numbers == sorted(str(half.microbatch) for steps in drawn.schedule.actions for half in steps)


def test_svg_of_the_training_run_is_small() -> None:
    drawn = draw_svg(replay(make_schedule("dualpipe", 16, 120), DURATIONS))
    assert len(drawn) < 200_000
    assert "<g" not in drawn  # no room for numbers, so none at all


def test_trace_is_the_timeline() -> None:
    drawn = timeline("dualpipe")
    events = json.loads(chrome_trace(drawn))["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {rank: f"rank {rank}" for rank in range(4)}
    for rank, steps in enumerate(drawn.schedule.actions):
        ran = [event for event in events if event["ph"] == "X" and event["tid"] == rank]
        assert [event["cat"] for event in ran] == [step.kind for step in steps]
        assert [event["ts"] for event in ran] == pytest.approx([1e6 * start for start in drawn.start[rank]])
        assert [event["ts"] + event["dur"] for event in ran] == pytest.approx([1e6 * end for end in drawn.end[rank]])
        held = [event["args"]["held"] for event in events if event["ph"] == "C" and event["tid"] == rank]
        assert (max(held), held[-1]) == (drawn.activation_peaks[rank], 0)
    pair = next(event for event in events if event.get("cat") == "FB")
    assert re.fullmatch(r"F\d+&B\d+", pair["name"])
    assert len(pair["args"]) == 2


def test_times_are_short_to_read() -> None:
    assert [seconds_text(each) for each in (19.926, 0.00042, 1.5e-6, 0.0, 1234.0)] == [
        "19.9 s",
        "420 us",
        "1.5 us",
        "0 us",
        "1234 s",
    ]


def test_nothing_to_draw_is_drawn() -> None:
    drawn = replay(one_f_one_b(2, 2), Durations(forward=0.0, backward=0.0))
    assert draw_text(drawn, 60).count("\nrank") == 2
    ElementTree.fromstring(draw_svg(drawn))


def test_widths_that_are_too_small() -> None:
    with pytest.raises(ValueError, match="width = 10: .* 40 columns"):
        draw_text(timeline("1f1b"), 10)
    with pytest.raises(ValueError, match="width = 100: .* 400 pixels"):
        draw_svg(timeline("1f1b"), width=100)
