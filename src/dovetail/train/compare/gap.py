"""The loss gap of two recipes over several seeds, and whether it differs from chance.

    d_t = (loss_t - base_t) / base_t            of step t, both on the same batch
    s_t = sum_i 0.9^(t-i) d_i / sum_i 0.9^(t-i)     smoothed [V3 App. B.1]
    g   = mean of d_t over the last quarter of the steps     the gap of one seed

Two runs whose arithmetic differs at all drift apart by chance, as two seeds do, so the gap of one seed says little. Of
n seeds the mean is known to within t sqrt(variance of g / n), where t is Student's for 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dovetail.train.compare.pairs import Pair

SMOOTHING = 0.9  # coefficient of the moving average [V3 App. B.1]
PAPER = 0.0025  # FP8's relative loss error stays below this [V3 App. B.1]
LAST, FIRST = 0.25, 0.1  # shares of the steps: those the gap is the mean of, and those the largest leaves out
HEADER = (
    "seed",
    ">gap, last quarter",
    ">largest smoothed",
    ">loss",
    ">base loss",
    ">step time",
    ">skipped",
    ">by base",
)
# Student's t at 97.5 %, for 1, 2, ... degrees of freedom; more of them are treated as the last.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedGap:
    """Of one seed; gaps are fractions."""

    seed: int
    gap: float  # mean relative difference over the last quarter of the steps
    largest: float  # smoothed difference farthest from 0 after the first tenth, with its sign
    loss: float  # means over the last quarter, nats per token
    base_loss: float
    time_ratio: float  # median step time over the base's
    skipped: int  # steps that were not finite
    base_skipped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    recipe: str
    base: str
    steps: int
    seeds: tuple[SeedGap, ...]

    @property
    def mean(self) -> float:
        return mean(each.gap for each in self.seeds)

    @property
    def deviation(self) -> float:
        """Standard deviation from seed to seed; NaN of one."""
        return float(np.std([each.gap for each in self.seeds], ddof=1)) if len(self.seeds) > 1 else math.nan

    @property
    def half_width(self) -> float:
        """Of the mean's 95 % interval; infinite where one seed says nothing about others."""
        count = len(self.seeds)
        if count < 2:
            return math.inf
        return STUDENT[min(count - 1, len(STUDENT)) - 1] * self.deviation / math.sqrt(count)

    @property
    def is_told_apart(self) -> bool:
        """Whether the interval leaves out 0."""
        return abs(self.mean) > self.half_width

    @property
    def bounds(self) -> tuple[float, float]:
        """Of |gap|, by the interval: the least and the most it may be."""
        return max(0.0, abs(self.mean) - self.half_width), abs(self.mean) + self.half_width


def summarize(recipe: str, base: str, pairs: Iterable[Pair]) -> Gap:
    """Pairs of whole seeds, each seed's in order of steps."""
    seeds: dict[int, list[Pair]] = {}
    for pair in pairs:
        seeds.setdefault(pair.seed, []).append(pair)
    steps = max(len(each) for each in seeds.values())
    return Gap(recipe=recipe, base=base, steps=steps, seeds=tuple(_seed_gap(each) for each in seeds.values()))


def _seed_gap(pairs: Sequence[Pair]) -> SeedGap:
    last = pairs[-max(1, round(LAST * len(pairs))) :]
    after = smooth([pair.difference for pair in pairs])[int(FIRST * len(pairs)) :]
    after = after[np.isfinite(after)]
    return SeedGap(
        seed=pairs[0].seed,
        gap=_mean(pair.difference for pair in last),
        largest=float(after[np.abs(after).argmax()]) if len(after) else math.nan,
        loss=_mean(pair.loss for pair in last),
        base_loss=_mean(pair.base_loss for pair in last),
        time_ratio=median(pair.seconds for pair in pairs) / median(pair.base_seconds for pair in pairs),
        skipped=sum(pair.skipped for pair in pairs),
        base_skipped=sum(pair.base_skipped for pair in pairs),
    )


def _mean(values: Iterable[float]) -> float:
    """Of those that are finite; NaN of none."""
    finite = [value for value in values if math.isfinite(value)]
    return mean(finite) if finite else math.nan


def smooth(values: ArrayLike) -> NDArray[np.float64]:
    """Moving average over the last axis, whose weights add up to 1 from the first step on. What is not finite is left
    out; NaN where there was nothing yet."""
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


def as_json(gap: Gap) -> dict[str, Any]:
    """Plain data, with what follows from it; null for what is not known."""
    derived = {"mean": gap.mean, "deviation": gap.deviation, "half_width": gap.half_width}
    seeds = [_finite(asdict(each)) for each in gap.seeds]
    return asdict(gap) | _finite(derived) | {"is_told_apart": gap.is_told_apart, "seeds": seeds}


def _finite(record: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in record.items()}


def printed_rows(gap: Gap) -> Iterable[tuple[str, ...]]:
    for each in gap.seeds:
        losses = f"{each.loss:.4f}", f"{each.base_loss:.4f}"
        rest = f"{each.time_ratio:.2f} x base", str(each.skipped), str(each.base_skipped)
        yield str(each.seed), percent(each.gap), percent(each.largest), *losses, *rest
    blank = ("",) * (len(HEADER) - 2)
    yield "mean", percent(gap.mean), *blank
    if len(gap.seeds) > 1:
        yield "standard deviation", f"{100 * gap.deviation:.3f}%", *blank


def printed_notes(gap: Gap) -> Iterable[str]:
    """What the numbers do and do not say."""
    count, skipped = len(gap.seeds), sum(each.skipped for each in gap.seeds)
    if skipped:
        yield f"{gap.recipe}: {skipped} steps had a loss or gradient that was not finite and changed nothing"
    if count < 2:
        yield "one seed does not say how far seeds lie apart, so not whether this gap is more than chance"
        return
    interval = f"{percent(gap.mean - gap.half_width)} to {percent(gap.mean + gap.half_width)}"
    if math.isnan(gap.mean):
        yield f"{gap.recipe} has no gap to give: losses were not finite"
    elif gap.is_told_apart:
        side = "above" if gap.mean > 0 else "below"
        yield f"{gap.recipe} is {side} {gap.base}: {count} seeds put the gap at {interval} (95 %)"
    elif gap.deviation == 0:
        yield f"{gap.recipe} and {gap.base} have the same losses"
    else:
        yield (
            f"{gap.recipe} and {gap.base} cannot be told apart here: the spread of {count} seeds puts the gap at"
            f" {interval} (95 %), and 0 is in it; more seeds or more steps narrow it"
        )
