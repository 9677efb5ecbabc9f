"""The gap over seeds: smoothing, Student's interval, and what is said of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from dovetail.train.compare.gap import STUDENT, Gap, as_json, interval, said, seed_gap, smooth


def gap_of(curves: Sequence[Sequence[float]]) -> Gap:
    """A's losses are 2, and B's differ by `curves`, of seeds and steps."""
    seeds = (
        seed_gap(seed, [2.0] * len(curve), [2.0 * (1.0 + each) for each in curve]) for seed, curve in enumerate(curves)
    )
    return Gap(measure="loss", seeds=tuple(seeds))


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
    assert interval(gap) == f"{100 * low:+.3f}% to {100 * high:+.3f}%"


def test_of_other_batches_the_means_of_each_side_s_last_quarter_are_compared() -> None:
    gap = seed_gap(3, [9.0] * 6 + [2.0, 4.0], [9.0] * 3 + [3.3], is_paired=False)
    assert (gap.a, gap.b, gap.seed) == (3.0, 3.3, 3) and gap.gap == pytest.approx(0.1) and math.isnan(gap.largest)
    paired = seed_gap(3, [2.0, 4.0], [3.0, 3.3])
    assert paired.gap != pytest.approx(0.1)


def test_the_largest_leaves_out_the_first_tenth() -> None:
    curve = [9.0, *[0.0] * 9, -0.5, *[0.0] * 9]
    (seed,) = gap_of([curve]).seeds
    assert seed.largest == smooth(curve)[2] > 0.5
    (seed,) = gap_of([[0.0, *curve[1:]]]).seeds
    assert seed.largest == smooth([0.0, *curve[1:]])[10] < 0


@pytest.mark.parametrize(
    ("gaps", "words"),
    [
        ([0.010, 0.011, 0.012], "loss: ours is above bf16: 3 seeds put the gap at +0.852% to +1.348% (95 %)"),
        ([-0.010, -0.011, -0.012], "ours is below bf16"),
        ([0.010, -0.011, 0.003], "cannot be told apart here: the spread of 3 seeds"),
        ([0.0, 0.0], "ours and bf16 have the same"),
        ([0.01], "one seed does not say"),
        ([math.nan, math.nan], "values were not finite"),
    ],
)
def test_what_is_said(gaps: list[float], words: str) -> None:
    gap = gap_of([[value] * 4 for value in gaps])
    assert words in said(gap, "bf16", "ours")
    assert gap.is_told_apart == (" is above " in words or " is below " in words)


def test_values_that_are_not_finite_are_left_out() -> None:
    (seed,) = gap_of([[0.0] * 4 + [math.nan, 0.0, math.nan, 0.02]]).seeds
    assert seed.gap == pytest.approx(0.02) and seed.b == pytest.approx(2.04)


def test_json_has_null_for_what_is_not_known() -> None:
    record = json.loads(json.dumps(as_json(gap_of([[0.01] * 4])), allow_nan=False))
    assert record["deviation"] is None and record["half_width"] is None and record["mean"] == pytest.approx(0.01)
    empty = json.loads(json.dumps(as_json(gap_of([[math.nan] * 4] * 2)), allow_nan=False))
    assert empty["mean"] is None and empty["seeds"][0]["gap"] is None and empty["seeds"][0]["a"] == 2.0
