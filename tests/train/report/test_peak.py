"""The rate that MFU is a share of: never below that of a step, and measured again as the run goes on."""

from __future__ import annotations

import math

import pytest
import torch

from dovetail.train.report import peak
from dovetail.train.report.peak import AGAIN_EVERY, Peak, measure_peak


def test_a_share_is_never_above_one_and_a_faster_step_raises_the_peak() -> None:
    found = Peak(lambda seconds: 100.0, lambda: 0.0)
    assert found.share(50.0) == 0.5
    assert found.share(130.0) == 1.0
    assert found.share(65.0) == 0.5  # of the 130 that were seen


def test_a_peak_that_was_low_at_the_start_is_measured_again() -> None:
    now, rates, asked = [0.0], iter([100.0, 400.0, 200.0]), []

    def measure(seconds: float) -> float:
        asked.append(seconds)
        return next(rates)

    found = Peak(measure, lambda: now[0])
    assert found.share(50.0) == found.share(50.0) == 0.5
    now[0] = AGAIN_EVERY
    assert found.share(50.0) == 0.125
    now[0] = 2 * AGAIN_EVERY
    assert found.share(50.0) == 0.125  # the best so far stays
    assert asked == [peak.SECONDS, peak.AGAIN_SECONDS, peak.AGAIN_SECONDS]


def test_the_best_of_all_shapes_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock on which every product takes a second, the largest one has the highest rate."""
    seconds = iter(range(10_000))
    monkeypatch.setattr(peak.time, "perf_counter", lambda: float(next(seconds)))
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda left, right: left)
    device = torch.device("cpu")
    assert measure_peak(torch.float32, device, seconds=0.0) == 2 * 2048**3
    assert measure_peak(torch.float32, device, [(2048, 2048, 2049)], seconds=0.0) == 2 * 2048**2 * 2049


def test_it_is_a_rate_of_this_machine_and_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    assert 0 < measure_peak(torch.float32, torch.device("cpu"), seconds=0.0) < math.inf
    assert torch.equal(torch.get_rng_state(), before)
