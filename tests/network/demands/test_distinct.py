"""Distinct nodes and ranks of a token's experts: closed formulas, and the gate's own rule on random scores."""

import math

import numpy as np
import pytest
import torch

from dovetail.catalog.presets import load_model
from dovetail.cost.ops.ops import Exchange
from dovetail.model.experts.gate import select
from dovetail.network.demands.distinct import _walk, distinct_bins
from dovetail.spec.model import Moe


def exchange(choices: int = 8, experts: int = 256, groups: int = 8, kept: int = 4) -> Exchange:
    return Exchange(
        name="dispatch",
        pass_="forward",
        tokens=1,
        bytes_per_copy=1,
        choices=choices,
        experts=experts,
        groups=groups,
        kept_groups=kept,
    )


@pytest.mark.parametrize("bins", [1, 2, 4, 8, 32, 64, 256])
def test_unlimited_choice_is_the_closed_formula(bins: int) -> None:
    expected = bins * (1 - math.comb(256 - 256 // bins, 8) / math.comb(256, 8))
    assert distinct_bins(exchange(groups=1, kept=1), bins) == pytest.approx(expected)
    # Groups of which all are kept limit nothing.
    assert distinct_bins(exchange(groups=8, kept=8), bins) == pytest.approx(expected)


def test_eight_of_256_experts_touch_5_29_of_8_nodes_and_the_limit_makes_it_less_than_4() -> None:
    """[V3 §3.2.2, ISCA §4.3]: at most 4 nodes."""
    assert distinct_bins(exchange(groups=1, kept=1), 8) == pytest.approx(5.29, abs=0.005)
    assert 3.9 < distinct_bins(exchange(), 8) < 4
    assert distinct_bins(exchange(kept=1), 8) == pytest.approx(1)
    assert distinct_bins(exchange(choices=1), 8) == pytest.approx(1)


def test_chances_sum_to_one_and_choices_to_k() -> None:
    walk = _walk(8, 256, 8, 4)
    assert sum(walk.values()) == pytest.approx(1)
    assert all(sum(counts) == 8 and len(counts) <= 4 for counts in walk)
    assert sum(_walk(6, 160, 8, 3).values()) == pytest.approx(1)


def simulated(moe: Moe, bins: int) -> float:
    scores = torch.from_numpy(np.random.default_rng(0).normal(size=(4000, moe.n_routed_experts)))
    scores = scores.sigmoid() if moe.scoring_func == "sigmoid" else scores.softmax(-1)
    chosen = select(scores, moe) // (moe.n_routed_experts // bins)
    ordered = chosen.sort(dim=-1).values
    return float((1 + (ordered[:, 1:] != ordered[:, :-1]).sum(-1)).double().mean())


@pytest.mark.parametrize("bins", [2, 4, 8, 32, 64])
def test_the_gates_of_deepseek_v3(bins: int) -> None:
    """Its groups are ranked by their two best scores, the formula's by the best: within 1 %."""
    moe = load_model("deepseek-v3").moe
    assert moe
    assert distinct_bins(exchange(), bins) == pytest.approx(simulated(moe, bins), rel=0.01)


@pytest.mark.parametrize("bins", [2, 4, 8, 40])
def test_the_gates_of_deepseek_v2(bins: int) -> None:
    """The rule itself: only sampling parts the two."""
    moe = load_model("deepseek-v2").moe
    assert moe
    assert distinct_bins(exchange(6, 160, 8, 3), bins) == pytest.approx(simulated(moe, bins), rel=0.005)


def test_bins_that_do_not_divide_lie_between_those_that_do() -> None:
    sizes = [distinct_bins(exchange(), bins) for bins in (8, 12, 16, 18, 32)]
    assert sizes == sorted(sizes)
    assert distinct_bins(exchange(), 256) == pytest.approx(8)
