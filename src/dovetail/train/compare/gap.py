"""The gap between two sides over several seeds, and whether it differs from chance.

    d_t = (b_t - a_t) / a_t                                  the difference in step t, on the same batch
    s_t = sum_i 0.9^(t-i) d_i / sum_i 0.9^(t-i)              the same, smoothed [V3 App. B.1]
    g   = mean of d_t over the last quarter of the steps     the gap of one seed

Where the two sides see different batches, g is (b - a) / a with the means of both sides over their last quarters.

Two runs whose arithmetic differs at all drift apart by chance, as two seeds do, so the gap of one seed says little. The
mean over n seeds is known to within t sqrt(variance of g / n), where t is Student's for 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dovetail.train.compare.pairs import relative

SMOOTHING = 0.9  # coefficient of the moving average [V3 App. B.1]
PAPER = 0.0025  # FP8's relative loss error stays below this [V3 App. B.1]
LAST, FIRST = 0.25, 0.1  # shares of the steps: the gap is a mean over the last, the largest leaves out the first
# Student's t at 97.5 %, for 1, 2, ... degrees of freedom; more of them are treated as the last.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedGap:
    """The gap of one seed. Differences are fractions, not percent."""

    seed: int
    gap: float  # mean relative difference over the last quarter of the steps
    largest: float  # smoothed difference farthest from 0 after the first tenth; NaN where batches differ
    a: float  # means over the last quarter
    b: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """The gap in one measure, such as the loss, over all seeds."""

    measure: str
    seeds: tuple[SeedGap, ...]

    @property
    def mean(self) -> float:
        return mean(each.gap for each in self.seeds)

    @property
    def deviation(self) -> float:
        """The standard deviation from seed to seed; NaN if there is one seed."""
        return float(np.std([each.gap for each in self.seeds], ddof=1)) if len(self.seeds) > 1 else math.nan

    @property
    def half_width(self) -> float:
        """Half the width of the mean's 95 % interval; infinite if there is one seed."""
        count = len(self.seeds)
        if count < 2:
            return math.inf
        return STUDENT[min(count - 1, len(STUDENT)) - 1] * self.deviation / math.sqrt(count)

    @property
    def is_told_apart(self) -> bool:
        """Whether 0 is outside the interval."""
        return abs(self.mean) > self.half_width

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the most that the size of the gap may be, by the interval."""
        return max(0.0, abs(self.mean) - self.half_width), abs(self.mean) + self.half_width


def seed_gap(seed: int, a: Sequence[float], b: Sequence[float], is_paired: bool = True) -> SeedGap:
    """Return the gap of one seed, from the values of A's steps and of B's."""
    last_a, last_b = _mean(_last(a)), _mean(_last(b))
    if not is_paired:
        return SeedGap(seed=seed, gap=relative(last_a, last_b), largest=math.nan, a=last_a, b=last_b)
    differences = [relative(x, y) for x, y in zip(a, b, strict=True)]
    after = smooth(differences)[int(FIRST * len(differences)) :]
    after = after[np.isfinite(after)]
    return SeedGap(
        seed=seed,
        gap=_mean(_last(differences)),
        largest=float(after[np.abs(after).argmax()]) if len(after) else math.nan,
        a=last_a,
        b=last_b,
    )


def _last(values: Sequence[float]) -> Sequence[float]:
    return values[-max(1, round(LAST * len(values))) :]


def _mean(values: Iterable[float]) -> float:
    """Return the mean of the values that are finite, or NaN if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return mean(finite) if finite else math.nan


def smooth(values: ArrayLike) -> NDArray[np.float64]:
    """Return the moving average over the last axis, whose weights add up to 1 from the first step on.

    Values that are not finite are left out. The average is NaN where there was no value yet.
    """
    values = np.asarray(values, dtype=np.float64)
    smoothed = np.full_like(values, np.nan)
    total, weight = np.zeros(values.shape[:-1]), np.zeros(values.shape[:-1])
    for step in range(values.shape[-1]):
        is_finite = np.isfinite(values[..., step])
        total = SMOOTHING * total + np.where(is_finite, values[..., step], 0.0)
        weight = SMOOTHING * weight + is_finite
        smoothed[..., step] = np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)
    return smoothed


def percent(fraction: float) -> str:
    return "-" if math.isnan(fraction) else f"{100 * fraction:+.3f}%"


def interval(gap: Gap) -> str:
    """Return the mean's 95 % interval as text, or "-" if there is one seed."""
    if len(gap.seeds) < 2:
        return "-"
    return f"{percent(gap.mean - gap.half_width)} to {percent(gap.mean + gap.half_width)}"


def as_json(gap: Gap) -> dict[str, Any]:
    """Return the gap as plain data, with what follows from it. What is not known is null."""
    derived = {"mean": gap.mean, "deviation": gap.deviation, "half_width": gap.half_width}
    seeds = [_finite(asdict(each)) for each in gap.seeds]
    return asdict(gap) | _finite(derived) | {"is_told_apart": gap.is_told_apart, "seeds": seeds}


def _finite(record: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in record.items()}


def said(gap: Gap, a: str, b: str) -> str:
    """Return one sentence on what the numbers do and do not say about the sides named `a` and `b`."""
    count = len(gap.seeds)
    if count < 2:
        return (
            f"{gap.measure}: one seed does not say how far seeds lie apart, so not whether this gap is more than chance"
        )
    if math.isnan(gap.mean):
        return f"{gap.measure}: {b} has no gap to give, for values were not finite"
    if gap.is_told_apart:
        side = "above" if gap.mean > 0 else "below"
        return f"{gap.measure}: {b} is {side} {a}: {count} seeds put the gap at {interval(gap)} (95 %)"
    if gap.deviation == 0:
        return f"{gap.measure}: {b} and {a} have the same"
    return (
        f"{gap.measure}: {b} and {a} cannot be told apart here: the spread of {count} seeds puts the gap at"
        f" {interval(gap)} (95 %), and 0 is in it; more seeds or more steps narrow it"
    )
