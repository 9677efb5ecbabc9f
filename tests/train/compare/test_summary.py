"""A comparison summed up: every measure, both sides, what is printed and what JSON has."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from statistics import mean

import pytest

from dovetail.cost.count import parameters
from dovetail.train.compare.gap import seed_gap
from dovetail.train.compare.pairs import HeldOutPair, Pair, Record
from dovetail.train.compare.sides import Comparison
from dovetail.train.compare.summary import as_json, notes, summarize, tables
from dovetail.train.run.run_file import resolve_model

Compared = Callable[..., Comparison]
RecordsOf = Callable[..., list[Record]]
LOSSES, MTP = [[0.5, 0.1, 0.2, 0.011]] * 2 + [[0.0, 0.0, 0.0, 0.014]], [[0.0] * 3 + [0.03], [0.0] * 3 + [0.02]] * 2


def test_every_measure_has_its_own_gap(compared: Compared, records_of: RecordsOf) -> None:
    what, records = compared(), records_of(LOSSES, MTP)
    summary = summarize(what, records)
    assert [gap.measure for gap in summary.gaps] == ["loss", "MTP loss, depth 1"]
    for gap, curves in zip(summary.gaps, (LOSSES, MTP), strict=True):
        expected = [seed_gap(i, [2.0] * 4, [2 * (1 + each) for each in curves[i]]) for i in range(3)]
        assert list(gap.seeds) == expected
    assert summary.title == "deepseek-v3 against bf16: 3 seeds of 4 steps"


def test_both_sides_are_counted(compared: Compared, records_of: RecordsOf) -> None:
    what = compared()
    a, b = summarize(what, records_of([[0.0, 0.0, math.nan, 0.0]] * 2, [[0.0] * 4] * 2)).sides
    counted = parameters(resolve_model(what.settings.a.model))
    assert (a.parameters, a.active, a.steps, a.tokens) == (counted.total_with_mtp, counted.active, 4, 256)
    assert (a.seconds, b.seconds, a.skipped, b.skipped) == (0.1, 0.15, 0, 2)


def test_other_batches_of_the_same_text_have_means_and_held_out_text(compared: Compared, records_of: RecordsOf) -> None:
    what = compared(b={"seed": 3})
    records: list[Record] = []
    for seed in range(2):
        pairs = [each for each in records_of([[0.1] * 4] * 2, [[0.0] * 4] * 2) if each.seed == seed]
        records += [*pairs, HeldOutPair(seed=seed, text="held-out text", a=2.0, b=2.2 + seed)]
    summary = summarize(what, records)
    assert summary.loss is not None and math.isnan(summary.loss.seeds[0].largest)
    assert [gap.measure for gap in summary.gaps] == ["loss", "MTP loss, depth 1", "bits per byte, held-out text"]
    assert [each.gap for each in summary.held_out[0].seeds] == pytest.approx([0.1, 0.6])
    text = "\n".join(notes(summary))
    assert "do not see the same batches (other seeds)" in text and "losses are means over other batches" in text
    assert "from A to B: train.seed: 0 -> 3" in text


def test_sides_of_different_lengths(compared: Compared, records_of: RecordsOf) -> None:
    what = compared(b={"steps": 6})
    records: list[Record] = [
        replace(each, a=each.a if each.step <= 4 else None)
        for each in records_of([[0.1] * 6], [[0.0] * 6])
        if isinstance(each, Pair)
    ]
    summary = summarize(what, [*records, HeldOutPair(seed=0, text="held-out text", a=2.0, b=2.0)])
    assert summary.title == "steps 6 against steps 4: 1 seed of 6 against 4 steps"
    assert summary.loss is not None and summary.loss.seeds[0].gap == pytest.approx(0.1)
    assert [side.tokens for side in summary.sides] == [256, 384]


def test_tables_are_whole_and_json_has_the_same_numbers(compared: Compared, records_of: RecordsOf) -> None:
    summary = summarize(compared(), records_of(LOSSES, MTP))
    (_, header, rows), (_, means, gaps), (_, columns, seeds) = tables(summary)
    assert header == ("", ">bf16", ">deepseek-v3") and all(len(row) == 3 for row in rows)
    assert ("relative step time", "1.00", "1.50") in rows
    assert len(means) == 5 and [row[0] for row in gaps] == ["loss", "MTP loss, depth 1"]
    assert gaps[0][3] == f"{100 * mean((0.011, 0.011, 0.014)):+.3f}%"
    assert columns == ("seed", ">loss", ">MTP loss, depth 1", ">loss, largest smoothed")
    assert [row[0] for row in seeds] == ["0", "1", "2", "standard deviation"] and {len(row) for row in seeds} == {4}
    record = json.loads(json.dumps(as_json(summary), allow_nan=False))
    assert record["changes"] == {"train.precision": ["bf16", "deepseek-v3"]} and record["unpaired"] == []
    assert record["time_ratio"] == pytest.approx(1.5) and record["held_out"] == []
    assert summary.loss is not None and record["loss"]["half_width"] == summary.loss.half_width
    assert [each["gap"] for each in record["mtp"][0]["seeds"]] == pytest.approx([0.03, 0.02, 0.03])
    assert (record["a"]["name"], record["b"]["name"], record["b"]["seconds"]) == ("bf16", "deepseek-v3", 0.15)


def test_skipped_steps_are_told(compared: Compared, records_of: RecordsOf) -> None:
    summary = summarize(compared(), records_of([[0.0, math.nan, math.nan, 0.02]], [[0.0] * 4]))
    assert "deepseek-v3: 2 steps had a loss or gradient that was not finite" in "\n".join(notes(summary))
