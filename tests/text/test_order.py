from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.text.order import feistel, rank_slice, sample_indices


@settings(deadline=None, max_examples=60)
@given(num_samples=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 1000))
def test_every_epoch_visits_each_sample_once(num_samples: int, seed: int, epoch: int) -> None:
    order = sample_indices(num_samples, seed, epoch * num_samples, num_samples)
    assert sorted(order.tolist()) == list(range(num_samples))


@settings(deadline=None, max_examples=60)
@given(
    num_samples=st.integers(1, 200),
    seed=st.integers(0, 2**32),
    start=st.integers(0, 10**12),
    cuts=st.lists(st.integers(0, 300), max_size=5),
)
def test_any_steps_walk_the_same_order(num_samples: int, seed: int, start: int, cuts: list[int]) -> None:
    """Batch size may change and training may stop anywhere, also across epochs."""
    edges = [0, *sorted(cuts), 300]
    pieces = [sample_indices(num_samples, seed, start + a, b - a) for a, b in pairwise(edges)]
    assert np.array_equal(np.concatenate(pieces), sample_indices(num_samples, seed, start, 300))


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(sample_indices(50, seed, 50 * epoch, 50)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100  # one order for all epochs, or epochs shared between seeds, would be fewer
    assert tuple(range(50)) not in orders


def test_order_is_pinned() -> None:
    """A run that is resumed by a later version must go on with the samples that were next."""
    assert sample_indices(1000, 42, 998, 6).tolist() == PINNED_ORDER


PINNED_ORDER = [478, 931, 387, 62, 791, 109]


def excess(num_samples: int) -> float:
    """Chi-squared of (place, sample) over 8000 epochs, in standard deviations above its mean."""
    orders = sample_indices(num_samples, 1, 0, 8000 * num_samples).reshape(8000, num_samples)
    counts = np.stack([np.bincount(orders[:, place], minlength=num_samples) for place in range(num_samples)])
    expected, freedom = 8000 / num_samples, (num_samples - 1) ** 2
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("num_samples", [4, 50])
def test_every_place_is_equally_likely(num_samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert excess(num_samples) < 5  # the seed is fixed, so this cannot fail by chance
    monkeypatch.setattr("dovetail.text.order.NUM_ROUNDS", 1)  # half of every number stays what it was
    assert excess(num_samples) > 100


def test_neighbours_are_not_kept_together() -> None:
    order = sample_indices(10_000, 0, 0, 10_000)
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05  # five standard deviations
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
    following = sample_indices(10_000, 0, 10_000, 10_000)
    assert abs(np.corrcoef(order, following)[0, 1]) < 0.05


def test_large_sets_need_no_memory() -> None:
    trillion = 10**12
    order = sample_indices(trillion, 0, 5 * trillion - 500, 1000)
    assert len(set(order[:500].tolist())) == len(set(order[500:].tolist())) == 500
    assert order.min() >= 0 and order.max() < trillion
    assert 0.4 < order.mean() / trillion < 0.6


def test_feistel_is_a_bijection_for_any_keys() -> None:
    values = np.arange(256, dtype=np.uint64)
    for key in (0, 1, 2**64 - 1):
        assert sorted(feistel(values, np.full(256, key, np.uint64), half=4).tolist()) == list(range(256))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_one_after_another_are_the_batch(world: int) -> None:
    batch = sample_indices(100, 0, 24, 8)
    parts = [batch[rank_slice(8, rank, world)] for rank in range(world)]
    assert np.array_equal(np.concatenate(parts), batch)
    assert {len(part) for part in parts} == {8 // world}
    if world not in (1, 8):  # dealing samples out like cards, the wrong variant, changes the order
        assert not np.array_equal(np.concatenate([batch[rank::world] for rank in range(world)]), batch)


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 6 samples cannot be shared evenly by 4 ranks"):
        rank_slice(6, 0, 4)
    with pytest.raises(ValueError, match="rank 2 is outside a world of 2"):
        rank_slice(4, 2, 2)
    with pytest.raises(ValueError, match="0 samples"):
        sample_indices(0, 0, 0, 1)
    with pytest.raises(ValueError, match="must not be negative"):
        sample_indices(5, 0, -1, 1)
    assert sample_indices(5, 0, 3, 0).shape == (0,)
