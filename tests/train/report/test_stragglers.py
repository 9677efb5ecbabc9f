"""A rank that lags over some steps is named once."""

from __future__ import annotations

from collections.abc import Sequence

from dovetail.train.report.metrics import StragglerMetrics
from dovetail.train.report.stragglers import STEPS, Stragglers, straggler_line


def named(steps: Sequence[Sequence[float]], pp: int = 1) -> list[StragglerMetrics]:
    watched = Stragglers(pp)
    return [each for step, seconds in enumerate(steps, 1) for each in watched.look(step, seconds)]


def test_a_rank_that_lags_is_named_once() -> None:
    [found] = named([[1.0, 1.1, 0.9, 2.31]] * 30)
    assert found == StragglerMetrics(step=STEPS, rank=3, ratio=2.31 / 1.0, seconds=2.31)
    assert straggler_line(found) == "straggler: rank 3, 2.3 x the median"


def test_of_two_ranks_the_faster_one_is_the_measure() -> None:
    assert [each.rank for each in named([[1.0, 1.6]] * STEPS)] == [1]
    assert not named([[1.0, 1.4]] * STEPS)


def test_a_slow_step_now_and_then_is_no_lag() -> None:
    steps = [[1.0, 1.0, 1.0] for _ in range(40)]
    for step in range(0, 40, 3):
        steps[step][step % 2] = 9.0
    assert not named(steps)


def test_ranks_are_compared_with_those_at_their_place_in_the_pipeline() -> None:
    assert not named([[1.0, 1.0, 3.0, 3.0]] * STEPS, pp=2)
    assert [each.rank for each in named([[1.0, 1.0, 3.0, 6.0]] * STEPS, pp=2)] == [3]
    assert [each.rank for each in named([[1.0, 3.0]] * STEPS, pp=2)] == [1]  # alone there


def test_one_process_is_compared_with_nobody() -> None:
    assert not named([[]] * STEPS) and not named([[1.0]] * STEPS)
