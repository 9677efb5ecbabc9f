"""The log of a comparison: written, read, torn, wrong; and which of its seeds are whole."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from dovetail.train.compare.pairs import HeldOutPair, Pair, SideStep, line, read_records, whole_seeds

SIDE = SideStep(tokens=8, loss=2.0, mtp=[2.5], skipped=False, seconds=0.1)
PAIR = Pair(seed=0, step=1, a=SIDE, b=replace(SIDE, loss=math.nan, mtp=[math.nan, 3.0], skipped=True))
HELD_OUT = HeldOutPair(seed=0, text="held-out text", a=1.5, b=math.nan)


def test_a_log_with_a_torn_end_and_one_with_a_bad_line(tmp_path: Path) -> None:
    second, path = replace(PAIR, step=2, b=replace(SIDE, loss=3.0)), tmp_path / "compare.jsonl"
    alone = replace(second, step=3, a=None)
    path.write_text(line(PAIR) + line(second) + line(alone) + line(HELD_OUT) + line(PAIR)[:40])
    first, *rest, held_out = read_records(path)
    assert rest == [second, alone] and second.difference == 0.5 and math.isnan(alone.difference)
    assert isinstance(first, Pair) and first.a == SIDE and first.b is not None
    assert math.isnan(first.b.loss) and math.isnan(first.b.mtp[0]) and first.b.mtp[1:] == [3.0]
    assert isinstance(held_out, HeldOutPair) and held_out.a == 1.5 and math.isnan(held_out.b)
    for bad in ("{}\n", "[]\n", '{"seed": 0, "stop": 1}\n', '{"seed": 0, "text": "x"}\n', line(PAIR)[:40] + "\n"):
        path.write_text(line(PAIR) + bad + line(second))
        with pytest.raises(ValueError, match="line 2 is not of a comparison"):
            read_records(path)


def test_seeds_that_are_whole() -> None:
    second = replace(PAIR, step=2)
    assert whole_seeds([PAIR, second], 2, []) == {0: [PAIR, second]}
    assert whole_seeds([PAIR, second, HELD_OUT], 2, ["held-out text"]) == {0: [PAIR, second, HELD_OUT]}
    for records, steps, texts in (
        ([second, PAIR], 2, []),
        ([PAIR], 2, []),
        ([PAIR, second], 1, []),
        ([PAIR, second], 2, ["held-out text"]),
        ([PAIR, second, HELD_OUT], 2, []),
        ([PAIR, second, HELD_OUT], 2, ["A's held-out text"]),
    ):
        assert whole_seeds(records, steps, texts) == {}
