"""Closed formulas of what a pipeline idles against replays."""

from __future__ import annotations

import random

import pytest

from dovetail.parallel.schedules.pipelines import SCHEDULES, make_schedule, zero_bubble
from dovetail.planner.training.bubbles import estimate_seconds, published_bubble
from dovetail.planner.training.timeline import Durations, replay


def alike(forward: float, inputs: float, weights: float, pair: float) -> Durations:
    return Durations(
        forward=forward, backward=inputs + weights, input_backward=inputs, weight_backward=weights, pair=pair
    )


# Forward, input half, weight half, pair: the usual ratio, whole overlap, ratios of V3's Table 4, unequal ones.
RATIOS = [(1.0, 1.0, 1.0, 3.0), (1.0, 1.0, 1.0, 2.0), (1.0, 1.0, 0.4, 2.0), (0.058, 0.102, 0.025, 0.139)]


@pytest.mark.parametrize("ratio", [*RATIOS, (1.0, 0.7, 1.6, 2.5)])
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 4), (8, 24)])
def test_bubble_of_1f1b(ratio: tuple[float, float, float, float], ranks: int, microbatches: int) -> None:
    forward, inputs, weights, _ = ratio
    expected = (ranks - 1) * (forward + inputs + weights)
    assert published_bubble("1f1b", ranks, forward=forward, backward=inputs + weights) == pytest.approx(expected)
    for name, count in (("1f1b", ranks), ("interleaved", ranks)):
        bubble = replay(make_schedule(name, count, microbatches), alike(*ratio)).bubble
        assert bubble == pytest.approx([expected] * ranks)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (8, 24)])
def test_bubble_of_zb1p(ratio: tuple[float, float, float, float], ranks: int, microbatches: int) -> None:
    forward, inputs, weights, _ = ratio
    backward = inputs + weights
    expected = (ranks - 1) * (forward + backward - 2 * weights)
    assert published_bubble(
        "zb1p", ranks, forward=forward, backward=backward, weight_backward=weights
    ) == pytest.approx(expected)
    assert replay(zero_bubble(ranks, microbatches), alike(*ratio)).bubble == pytest.approx([expected] * ranks)


@pytest.mark.parametrize(("forward", "weights", "pair"), [(1.0, 1.0, 3.0), (1.0, 1.0, 2.2), (1.3, 0.6, 2.8)])
@pytest.mark.parametrize(
    ("name", "ranks", "microbatches"), [("dualpipe", 8, 20), ("dualpipe", 16, 120), ("dualpipev", 4, 20)]
)
def test_bubble_of_dualpipe(
    name: str, ranks: int, microbatches: int, forward: float, weights: float, pair: float
) -> None:
    """(PP/2 - 1) (FB + B - 3 W) on the middle ranks where the input half takes what a forward takes; on all, where
    a pair saves nothing."""
    half = ranks // 2 if name == "dualpipe" else ranks
    backward = forward + weights
    timeline = replay(make_schedule(name, ranks, microbatches), alike(forward, forward, weights, pair))
    expected = (half - 1) * (pair + backward - 3 * weights)
    formula = published_bubble(name, ranks, forward=forward, backward=backward, weight_backward=weights, pair=pair)
    assert formula == pytest.approx(expected)
    assert timeline.bubble[half - 1] == pytest.approx(expected)
    saved = forward + backward - pair
    outwards = [max(0, half - 2 - rank) * saved for rank in range(half)]
    assert timeline.bubble[:half] == pytest.approx([expected - less for less in outwards])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ratio", [*RATIOS, (1.0, 0.7, 1.6, 2.5), (0.8, 1.5, 1.2, 2.7)])
def test_estimate_is_exact_for_equal_stages(name: str, ratio: tuple[float, float, float, float]) -> None:
    for ranks, microbatches in ((4, 8), (8, 32)):
        timeline = replay(make_schedule(name, ranks, microbatches), alike(*ratio))
        assert estimate_seconds(name, ranks, microbatches, alike(*ratio)) == pytest.approx(timeline.seconds)


@pytest.mark.parametrize("name", SCHEDULES)
def test_estimate_is_near_for_unequal_stages(name: str) -> None:
    stages = 16 if name in ("interleaved", "dualpipev") else 8
    for seed in range(5):
        draw = random.Random(seed)
        scale = [draw.uniform(0.9, 1.1) for _ in range(stages - 1)] + [1.25]
        durations = Durations(
            forward=[1.0 * each for each in scale],
            backward=[2.2 * each for each in scale],
            input_backward=[1.7 * each for each in scale],
            weight_backward=[0.5 * each for each in scale],
            pair=[1.2 * (each + other) for each, other in zip(scale, reversed(scale), strict=True)],
            send=0.02,
        )
        timeline = replay(make_schedule(name, 8, 64), durations)
        assert estimate_seconds(name, 8, 64, durations) == pytest.approx(timeline.seconds, rel=0.05)


def test_names_that_are_no_schedules() -> None:
    with pytest.raises(ValueError, match="no schedule 'gpipe'"):
        estimate_seconds("gpipe", 4, 8, Durations(forward=1.0, backward=2.0))
    with pytest.raises(ValueError, match="no schedule 'gpipe'"):
        published_bubble("gpipe", 4, forward=1.0, backward=2.0)
