"""Percentiles, rates and goodput of recorded times are those that are counted by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from dovetail.bench.measures import Limits, measure, parse_limits, spread
from dovetail.bench.outcome import Outcome
from dovetail.bench.picture import draw_serving

ONE = Outcome(
    index=0,
    arrival=None,
    sent=1.0,
    end=4.0,
    input_tokens=10,
    output_tokens=6,
    prompt_tokens=11,
    cached_tokens=4,
    chunks=((2.0, 1.0), (2.5, 1.0), (3.5, 4.0)),
    counting="usage of every chunk",
    finish_reason="length",
    error=None,
    message="",
)
SLOW = replace(ONE, index=1, arrival=1.5, sent=1.75, end=6.0, chunks=((5.0, 1.0), (6.0, 1.0)), cached_tokens=None)
LOST = replace(ONE, index=2, sent=2.0, end=2.5, chunks=(), error="HTTP 429", message="full")


def test_the_times_of_one_request() -> None:
    assert (ONE.first_token_seconds, ONE.whole_seconds, ONE.generated_tokens) == (1.0, 3.0, 6)
    assert ONE.gaps == [0.5, 1.0]
    assert ONE.token_seconds == [(0.5, 1), (0.25, 4)]  # four tokens that came together share a second
    assert ONE.mean_token_seconds == 1.5 / 5
    assert replace(ONE, chunks=((2.0, 6.0),)).mean_token_seconds == 0


def test_what_three_requests_add_up_to() -> None:
    measures = measure([ONE, SLOW, LOST], Limits(ttft=2.0, itl=0.3))
    assert (measures.requests, measures.completed, measures.errors) == (3, 2, {"HTTP 429": 1})
    assert measures.seconds == 5.0
    assert measures.requests_per_s == 2 / 5
    assert (measures.input_tokens_per_s, measures.output_tokens_per_s) == (22 / 5, 8 / 5)
    assert (measures.cached_tokens, measures.shorter, measures.latest_sending) == (4, 1, 0.25)
    assert measures.mean_under_way == (3 + 4.25 + 0.5) / 5
    assert (measures.ttft.mean, measures.ttft.median, measures.ttft.maximum) == (2.125, 2.125, 3.25)
    assert measures.inter_token.median == 0.25  # of 0.25 four times, 0.5 and 1
    assert measures.gap.median == 1.0
    assert (measures.good, measures.goodput) == (1, 1 / 5)
    assert measure([ONE, SLOW, LOST]).goodput is None
    assert measure([ONE, SLOW], Limits(e2e=4.0)).good == 1


def test_requests_that_all_failed_have_no_latencies() -> None:
    measures = measure([LOST], Limits(ttft=1.0))
    assert measures.good == measures.completed == 0 and math.isnan(measures.ttft.median)


def test_percentiles_are_those_of_numpy_and_weights_repeat() -> None:
    numbers = np.random.default_rng(0)
    values, weights = numbers.exponential(size=50), numbers.integers(1, 6, size=50)
    plain = spread(list(values))
    assert [plain.median, plain.p90, plain.p95, plain.p99] == list(np.percentile(values, [50, 90, 95, 99]))
    repeated, weighted = spread(list(np.repeat(values, weights))), spread(list(values), [float(w) for w in weights])
    for name in ("mean", "median", "p90", "p95", "p99", "maximum"):
        assert getattr(weighted, name) == pytest.approx(getattr(repeated, name), rel=1e-12)


def test_limits_are_read() -> None:
    assert parse_limits("ttft=1s, itl=100ms") == Limits(ttft=1.0, itl=0.1)
    assert str(Limits(ttft=1.0, itl=0.1)) == "ttft <= 1 s, itl <= 0.1 s"
    for wrong in ("ttft", "ttft=1", "tpot=1s", "ttft=1s,", "itl=-1s"):
        with pytest.raises(ValueError, match="is none of ttft=1s"):
            parse_limits(wrong)


def test_the_picture_is_drawn_with_and_without_answers(tmp_path: Path) -> None:
    for name, outcomes in (("some", [ONE, SLOW, LOST]), ("none", [LOST])):
        draw_serving(outcomes, tmp_path / f"{name}.png", "a title")
    assert imread(tmp_path / "some.png").shape == imread(tmp_path / "none.png").shape == (990, 1350, 4)
