"""A bit that has flipped in one replica is found, and named."""

from __future__ import annotations

import pytest
import torch
from rank_processes import Ranks
from replicas_on_ranks import compared

from dovetail.parallel.weights.replicas import ROW, hash_of


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 8 * ROW - 8, 8 * ROW, 8 * ROW + 1, 24 * ROW + 5])
@pytest.mark.parametrize("start", [0, 1])
def test_every_flipped_bit_changes_the_hash(count: int, start: int) -> None:
    generator = torch.Generator().manual_seed(count)
    held = torch.randint(0, 256, (count + start,), dtype=torch.uint8, generator=generator)[start:]
    before = hash_of(held)
    assert hash_of(held.clone()) == before
    for place in {0, count // 2, count - 1} if count else ():
        for bit in range(8):
            held[place] ^= 1 << bit
            assert hash_of(held) != before, (place, bit)
            held[place] ^= 1 << bit
    assert hash_of(held) == before


def test_words_in_another_order_have_another_hash() -> None:
    held = torch.arange(4 * ROW, dtype=torch.int64)
    assert hash_of(held) != hash_of(held.roll(ROW))


def test_a_replica_that_differs_is_named_by_all_ranks(ranks: Ranks) -> None:
    """Ranks 0 to 3 hold `all`, ranks 0 and 1 `pair`, ranks 2 and 3 the other `pair`."""
    assert ranks.run(compared, None, 0) == [None] * 4
    for name, rank, wanted in [
        ("all", 2, "all on rank 2. "),
        ("all.bias", 3, "all.bias on rank 3. "),
        ("pair", 3, "pair on ranks 2, 3, nobody knows on which. "),
    ]:
        said = ranks.run(compared, name, rank)
        assert said == said[:1] * 4
        assert said[0].startswith(f"step 7: replicas of weights differ: {wanted}")
