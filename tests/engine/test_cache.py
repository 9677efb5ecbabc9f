import pytest
import torch

from dovetail.engine.steps.cache import PagedCache, contiguous_cache
from dovetail.spec.model import Gqa


def test_size_is_latent_and_rotary_key_per_token_and_layer(engine_spec):
    spec = engine_spec()
    cache = contiguous_cache(spec, slots=3, capacity=7, dtype=torch.float32)
    layers = spec.num_hidden_layers + spec.num_nextn_predict_layers
    width = spec.attention.kv_lora_rank + spec.attention.qk_rope_head_dim
    assert cache.data.numel() == layers * 3 * 7 * width
    sizes = {name: value.numel() for name, value in vars(cache).items() if isinstance(value, torch.Tensor)}
    assert sizes == {"data": cache.data.numel(), "tables": 3}, "and the table of pages, one for each slot here"


def update(cache, slots, layer, positions, value):
    """Write, and gather up to the largest position."""
    selected = cache.select(slots)
    num_keys = int(positions.max()) + 1
    selected.reserve(num_keys)
    selected.write(layer, positions, *written(cache, layer, positions, value))
    return selected.gather(layer, num_keys)


def written(cache, layer, positions, value):
    latent = torch.full((*positions.shape, cache.latent_dim), float(value))
    rope_key = torch.full((*positions.shape, cache.data.shape[-1] - cache.latent_dim), -float(value))
    return latent, rope_key


def test_write_keeps_its_positions_only_and_gather_gives_all_up_to_the_largest(engine_spec):
    cache = contiguous_cache(engine_spec(), slots=2, capacity=8, dtype=torch.float32)
    positions = torch.tensor([[2, 3], [5, 0]])
    latent, rope_key = update(cache, [0, 1], 1, positions, 3)
    assert latent.shape == (2, 6, cache.latent_dim)
    assert rope_key.shape == (2, 6, 8)
    expected = torch.zeros_like(cache.data)
    for sequence, position in ((0, 2), (0, 3), (1, 5), (1, 0)):
        expected[1, sequence, position, : cache.latent_dim] = 3
        expected[1, sequence, position, cache.latent_dim :] = -3
    assert torch.equal(cache.data, expected)
    assert torch.equal(torch.cat((latent, rope_key), dim=-1), expected[1, :, :6])


def test_a_second_write_replaces_the_first(engine_spec):
    cache = contiguous_cache(engine_spec(), slots=1, capacity=4, dtype=torch.float32)
    positions = torch.tensor([[1]])
    update(cache, [0], 0, positions, 1)
    latent, _ = update(cache, [0], 0, positions, 2)
    assert latent[0, 1].eq(2).all()


@pytest.mark.parametrize("slots", [[2], [1, 2], [3, 0]])
def test_selected_slots_share_the_memory(engine_spec, slots):
    cache = contiguous_cache(engine_spec(), slots=4, capacity=4, dtype=torch.bfloat16)
    positions = torch.arange(len(slots))[:, None] + 1
    latent, rope_key = update(cache, slots, 2, positions, 5)
    for row, slot in enumerate(slots):
        assert cache.data[2, slot, row + 1, : cache.latent_dim].eq(5).all()
        assert latent[row, row + 1].eq(5).all()
        assert rope_key[row, row + 1].eq(-5).all()
    assert int(cache.data.ne(0).any(dim=-1).sum()) == len(slots)


def test_positions_lie_in_the_pages_of_their_slot(engine_spec):
    """Page 3 is shared, and a slot's pages are in any order."""
    cache = PagedCache(engine_spec(), slots=2, capacity=7, pages=(5, 3), dtype=torch.float32)
    assert cache.tables.shape == (2, 3)
    cache.assign(0, [3, 0])
    cache.assign(1, [3, 4, 1])
    slots, positions = torch.tensor([[0], [1]]), torch.tensor([[0, 2, 4], [2, 3, 6]])
    assert cache.places(slots, positions).tolist() == [[9, 11, 1], [11, 12, 3]]
    update(cache, [0], 1, torch.tensor([[2, 4]]), 3)
    update(cache, [1], 1, torch.tensor([[3, 6]]), 5)
    assert cache.select([0]).gather(1, 5)[0][0, :, 0].tolist() == [0, 0, 3, 0, 3]
    assert cache.select([1]).gather(1, 7)[1][0, :, 0].tolist() == [0, 0, -3, -5, 0, 0, -5]
    assert int(cache.data.ne(0).any(dim=-1).sum()) == 4
    cache.assign(1, [2])
    assert cache.select([1]).gather(1, 3)[0].eq(0).all()


def test_beyond_capacity_is_an_error_with_numbers_and_remedy(engine_spec):
    cache = contiguous_cache(engine_spec(), slots=1, capacity=4)
    positions = torch.tensor([[4]])
    with pytest.raises(ValueError, match=r"position 4 is outside a cache of 4 positions.*capacity >= 5"):
        update(cache, [0], 0, positions, 1)


@pytest.mark.parametrize("slot", [-1, 4])
def test_no_such_slot(engine_spec, slot):
    cache = contiguous_cache(engine_spec(), slots=4, capacity=4)
    with pytest.raises(ValueError, match=rf"slot {slot} is not in a cache of 4 slots"):
        cache.select([slot])


def test_grouped_query_models_have_no_latent_cache(engine_spec):
    gqa = Gqa(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    spec = engine_spec(attention=gqa, moe=None, num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match="MLA"):
        contiguous_cache(spec, slots=1, capacity=4)
