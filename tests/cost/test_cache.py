"""The caches that `dovetail inspect --cache` counts, against published numbers."""

import pytest

from dovetail.catalog.presets import load_model
from dovetail.cost.cache import Cached, caches, fp8_latent_bytes
from dovetail.cost.count import cache_bytes_per_token
from dovetail.spec.model import Mla, ModelSpec


def by_kind(spec: ModelSpec, context: int = 4096, **more: int) -> dict[str, Cached]:
    return {each.kind: each for each in caches(spec, context, **more)}


@pytest.mark.parametrize(
    ("name", "kind", "published"),
    [
        ("deepseek-v3", "its own: latent, BF16", 70_272),
        ("qwen2.5-72b", "its own: GQA, BF16", 327_680),
        ("llama-3.1-405b", "its own: GQA, BF16", 516_096),
    ],
)
def test_the_models_of_the_paper_cache_what_its_table_says(name: str, kind: str, published: int) -> None:
    """[ISCA Table 1]."""
    spec = load_model(name)
    own = by_kind(spec)[kind]
    assert own.token_bytes == published == cache_bytes_per_token(spec)
    assert caches(spec, 1)[0].kind == kind


def test_v3_beside_other_kinds() -> None:
    found = by_kind(load_model("deepseek-v3"))
    own = found["its own: latent, BF16"]
    assert own.layer_bytes == 2.25 * found["MQA, BF16"].layer_bytes  # [V2 Table 1]: GQA with 2.25 groups
    assert found["latent, FP8"].layer_bytes == 656  # [FlashMLA]
    assert found["latent, FP8"].kept == "512 E4M3, 4 FP32, 64 BF16"
    assert found["all heads, BF16"].layer_bytes == 2 * 2 * 128 * 128  # [V2 Table 1]: 2 n_h d_h elements
    assert found["GQA, BF16"].token_bytes == 2 * 8 * 128 * 61 * 2
    assert caches(load_model("deepseek-v2"), 1)[0].token_bytes == 69_120


def test_qwen_in_eight_bits_is_half_and_a_latent_less() -> None:
    found = by_kind(load_model("qwen2.5-72b"))
    assert found["GQA, FP8"].token_bytes == 163_840
    assert found["latent, BF16"].token_bytes == 2 * 576 * 80
    assert found["all heads, BF16"].token_bytes == 8 * 327_680


def test_a_window_bounds_what_a_sequence_keeps() -> None:
    spec = load_model("deepseek-v3")
    long, short = by_kind(spec, 10_000, sequences=3, window=256), by_kind(spec, 100, sequences=3, window=256)
    name = "GQA, BF16, window of 256"
    assert long[name].tokens == 256 and short[name].tokens == 100
    assert long[name].total_bytes == 3 * 256 * long["GQA, BF16"].token_bytes
    assert short[name].total_bytes == short["GQA, BF16"].total_bytes
    assert long["its own: latent, BF16"].total_bytes == 3 * 10_000 * 70_272


@pytest.mark.parametrize(("latent", "expected"), [(512, 656), (128, 260), (129, 265), (64, 196)])
def test_a_ragged_tile_of_the_latent_has_a_scale_of_its_own(latent: int, expected: int) -> None:
    mla = Mla(num_attention_heads=4, kv_lora_rank=latent, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64)
    assert fp8_latent_bytes(mla) == expected


@pytest.mark.parametrize(("heads", "groups"), [(128, 8), (16, 8), (12, 6), (8, 4), (4, 2), (7, 1), (1, 1)])
def test_groups_share_each_key_among_several_heads(heads: int, groups: int) -> None:
    spec = load_model("300m")
    attention = spec.attention.model_copy(update={"num_attention_heads": heads})
    assert by_kind(spec.model_copy(update={"attention": attention}))["GQA, BF16"].kept == f"{groups} x (128 + 128)"


@pytest.mark.parametrize("wrong", [{"context": 0}, {"context": 1, "sequences": 0}, {"context": 1, "window": -1}])
def test_numbers_below_one_are_refused(wrong: dict[str, int]) -> None:
    name, number = list(wrong.items())[-1]
    with pytest.raises(ValueError, match=f"{name} = {number}: it has to be at least 1"):
        caches(load_model("quickstart"), **wrong)
