"""What the outcomes of many requests add up to: latencies, rates, and goodput under limits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dovetail.bench.outcome import Outcome

PERCENTILES = (50, 90, 95, 99)
LIMITS = ("ttft", "itl", "e2e")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Of a number of seconds each; all are NaN where there is none. Percentiles lie between neighbours, linearly."""

    mean: float
    median: float
    p90: float
    p95: float
    p99: float
    maximum: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request has to keep to be good, in seconds; None: anything."""

    ttft: float | None = None
    itl: float | None = None  # mean of the request's inter-token latencies
    e2e: float | None = None

    def are_kept(self, outcome: Outcome) -> bool:
        if outcome.error is not None:
            return False
        seconds = (outcome.first_token_seconds, outcome.mean_token_seconds, outcome.whole_seconds)
        limits = (self.ttft, self.itl, self.e2e)
        return all(limit is None or second <= limit for second, limit in zip(seconds, limits, strict=True))

    def __str__(self) -> str:
        given = {name: getattr(self, name) for name in LIMITS if getattr(self, name) is not None}
        return ", ".join(f"{name} <= {seconds:g} s" for name, seconds in given.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """Latencies and lengths are those of requests that went well; `errors` counts the others by kind."""

    requests: int
    completed: int
    errors: dict[str, int]
    seconds: float  # from the first sending to the last end
    ttft: Spread
    inter_token: Spread  # every token after a request's first chunk
    gap: Spread  # between chunks that brought tokens, however many
    end_to_end: Spread
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    shorter: int  # answers with fewer tokens than asked for
    mean_under_way: float  # requests
    latest_sending: float  # seconds after its time, of the request sent latest; 0 in a closed loop
    counting: dict[str, int]  # how tokens were counted -> requests
    good: int | None  # requests within the limits; None if there are none
    goodput: float | None  # good requests per second


def parse_limits(text: str) -> Limits:
    """Read "ttft=1s,itl=100ms". Raises ValueError naming the part that is wrong."""
    found: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+(?:\.\d+)?)\s*(ms|s)\s*", part)
        if match is None or match[1] not in LIMITS:
            raise ValueError(f"--goodput {text}: {part!r} is none of ttft=1s, itl=100ms, e2e=30s (s or ms)")
        found[match[1]] = float(match[2]) * (0.001 if match[3] == "ms" else 1)
    return Limits(**found)


def spread(values: Sequence[float], weights: Sequence[float] | None = None) -> Spread:
    """Return the spread of `values`; with `weights`, a value counts as that many, which need not be whole."""
    if not len(values):
        return Spread(**dict.fromkeys(("mean", "median", "p90", "p95", "p99", "maximum"), float("nan")))
    if weights is None:
        points = np.percentile(values, PERCENTILES)
    else:
        order = np.argsort(values)
        ends = np.cumsum(np.asarray(weights)[order])
        starts = ends - np.asarray(weights)[order]
        # A value of weight k is k equal values at places start to start + k - 1, as in an unweighted list.
        places = np.stack([starts, np.maximum(ends - 1, starts)], axis=1).ravel()
        wanted = np.asarray(PERCENTILES) / 100 * max(ends[-1] - 1, 0)
        points = np.interp(wanted, places, np.repeat(np.asarray(values)[order], 2))
    mean = np.average(values, weights=weights)
    numbers = [float(number) for number in (mean, *points, max(values))]
    return Spread(**dict(zip(("mean", "median", "p90", "p95", "p99", "maximum"), numbers, strict=True)))


def measure(outcomes: Sequence[Outcome], limits: Limits | None = None) -> Measures:
    """Add up `outcomes`, of which there has to be one."""
    fine = [outcome for outcome in outcomes if outcome.error is None]
    seconds = max(outcome.end for outcome in outcomes) - min(outcome.sent for outcome in outcomes)
    tokens = [each for outcome in fine for each in outcome.token_seconds]
    prompt_tokens = sum(outcome.prompt_tokens or 0 for outcome in fine)
    generated = round(sum(outcome.generated_tokens for outcome in fine))
    good = None if limits is None else sum(limits.are_kept(outcome) for outcome in outcomes)
    return Measures(
        requests=len(outcomes),
        completed=len(fine),
        errors=dict(Counter(outcome.error for outcome in outcomes if outcome.error is not None).most_common()),
        seconds=seconds,
        ttft=spread([outcome.first_token_seconds for outcome in fine]),
        inter_token=spread([second for second, _ in tokens], [count for _, count in tokens]),
        gap=spread([gap for outcome in fine for gap in outcome.gaps]),
        end_to_end=spread([outcome.whole_seconds for outcome in fine]),
        requests_per_s=len(fine) / seconds,
        input_tokens_per_s=prompt_tokens / seconds,
        output_tokens_per_s=generated / seconds,
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(outcome.cached_tokens or 0 for outcome in fine),
        generated_tokens=generated,
        shorter=sum(round(outcome.generated_tokens) < outcome.output_tokens for outcome in fine),
        mean_under_way=sum(outcome.whole_seconds for outcome in outcomes) / seconds,
        latest_sending=max((each.sent - each.arrival for each in outcomes if each.arrival is not None), default=0.0),
        counting=dict(Counter(outcome.counting for outcome in fine)),
        good=good,
        goodput=None if good is None else good / seconds,
    )
