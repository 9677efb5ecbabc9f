"""The cache in FP8: its entries, its size, and that it makes no difference where a prompt is cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dovetail.catalog.presets import load_model
from dovetail.engine.room import EngineConfig, plan_room
from dovetail.engine.steps.cache import PagedCache, fp8_entry_bytes
from dovetail.engine.steps.rows import NONE, Chunk, Short
from dovetail.engine.steps.runner import Runner
from dovetail.engine.steps.stores import Fp8Store
from dovetail.model.transformer import Transformer
from dovetail.numerics import capability
from dovetail.numerics.cpu.kernels import array
from dovetail.numerics.formats.quantize import dequantize, quantize
from dovetail.spec.model import Mla, ModelSpec

SpecFactory = Callable[..., ModelSpec]
ModelFactory = Callable[..., Transformer]
FP8 = torch.float8_e4m3fn
needs_bf16 = pytest.mark.skipif(not capability.has_bf16_instructions(), reason="the kernels need AVX-512 BF16")


def test_an_entry_of_deepseek_v3_is_656_bytes() -> None:
    attention = load_model("deepseek-v3").attention
    assert isinstance(attention, Mla) and fp8_entry_bytes(attention) == 656


@pytest.mark.parametrize("latent", [512, 130, 21])
def test_entries_are_those_of_quantize(latent: int, engine_spec: SpecFactory) -> None:
    attention = engine_spec().attention
    spec = engine_spec(attention=attention.model_copy(update={"kv_lora_rank": latent}))
    cache = PagedCache(spec, 1, 12, (4, 3), FP8)
    store, places = Fp8Store(cache), torch.tensor([7, 0, 11])
    entries = torch.randn(3, latent + cache.rope_dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    entries[1, :3] = torch.tensor([0.0, -0.0, 300.0])
    store.written(1, array(entries), places.numpy())
    seen = store.gather(1, places)
    for begin in range(0, latent, 128):
        tile = entries[:, begin : min(begin + 128, latent)].float()
        expected = dequantize(quantize(tile, (1, 128))).bfloat16()
        assert torch.equal(seen[:, begin : begin + 128][:, : tile.shape[1]], expected)
    assert torch.equal(seen[:, latent:], entries[:, latent:])
    assert not torch.equal(seen, entries)  # it is FP8
    assert not store.gather(0, places).any(), "another layer has them"


@needs_bf16
@torch.no_grad()
def test_cuts_pages_and_neighbours_change_no_bit(engine_spec: SpecFactory, random_model: ModelFactory) -> None:
    spec = engine_spec()
    model = random_model(spec, torch.bfloat16)
    texts = torch.randint(spec.vocab_size, (2, 30), generator=torch.Generator().manual_seed(0)).tolist()
    whole, cut, exact = (
        Runner(model, PagedCache(spec, 2, 40, pages, dtype))
        for pages, dtype in (((2, 40), FP8), ((20, 4), FP8), ((2, 40), torch.bfloat16))
    )
    whole.cache.assign(0, [1]), whole.cache.assign(1, [0]), exact.cache.assign(1, [1])
    cut.cache.assign(0, list(range(0, 20, 2))), cut.cache.assign(1, list(range(19, 0, -2)))
    expected = [whole.prompt([Chunk(slot, 0, text)])[-1] for slot, text in enumerate(texts)]
    cut.prompt([Chunk(0, 0, texts[0][:7], True)])
    cut.prompt([Chunk(1, 0, texts[1][:11], True), Chunk(0, 7, texts[0][7:13], True)])
    last = cut.prompt([Chunk(0, 13, texts[0][13:]), Chunk(1, 11, texts[1][11:])], [16, 35])
    assert torch.equal(last, torch.stack(expected))
    steps = [runner.run(Short([3, 4, 5], [0, 1, 1], [30, 30, 31]), []) for runner in (whole, cut)]
    assert torch.equal(*steps)
    alone = [cut.run(Short([token], [slot], [at]), []) for token, slot, at in ((3, 0, 30), (4, 1, 30), (5, 1, 31))]
    assert torch.equal(torch.cat(alone), steps[0])
    exact.run(NONE, [Chunk(slot, 0, text) for slot, text in enumerate(texts)])
    rounded = exact.run(Short([3, 4, 5], [0, 1, 1], [30, 30, 31]), [])
    error = (rounded.float() - steps[0].float()).norm() / rounded.float().norm()
    assert 0 < error < 2**-3  # it sees what FP8 rounded, and no more than that


def test_it_is_refused_where_no_kernel_reads_it(engine_spec: SpecFactory, engine_model: ModelFactory) -> None:
    spec = engine_spec()
    with pytest.raises(ValueError, match="cache_format = fp8 needs BF16 weights"):
        Runner(engine_model(spec), PagedCache(spec, 1, 8, (1, 8), FP8))


def test_a_room_counts_bytes_of_the_format() -> None:
    spec = load_model("300m")
    pages = [plan_room(spec, EngineConfig(cache_format=f, max_sequences=10**6), 2).num_pages for f in ("bf16", "fp8")]
    assert pages[1] / pages[0] == pytest.approx(1152 / 656, rel=0.01)
