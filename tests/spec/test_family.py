"""Our own family: the benchmark sizes exactly, and shapes that fast kernels take from 2,048 up."""

import math

import pytest

from dovetail.catalog.presets import load_model
from dovetail.cost.count import parameters
from dovetail.spec.family import Dial, dovetail_spec
from dovetail.spec.kernel_shapes import HIDDEN_SIZES, accepted_by
from dovetail.spec.model import Mla


def test_the_benchmark_sizes_are_what_others_were_measured_at() -> None:
    large, small = load_model("104m"), load_model("20m")
    for spec, width, layers, dense, expert in ((large, 512, 8, 1408, 256), (small, 256, 6, 704, 128)):
        assert (spec.hidden_size, spec.num_hidden_layers, spec.intermediate_size) == (width, layers, dense)
        assert spec.attention == Mla(
            num_attention_heads=width // 64,
            q_lora_rank=width // 2,
            kv_lora_rank=width // 4,
            qk_nope_head_dim=64,
            qk_rope_head_dim=32,
            v_head_dim=64,
        )
        assert spec.moe
        assert (spec.moe.n_routed_experts, spec.moe.num_experts_per_tok, spec.moe.n_shared_experts) == (
            32,
            4,
            1,
        )
        assert (spec.moe.n_group, spec.moe.topk_group, spec.moe.first_k_dense_replace) == (4, 2, 1)
        assert spec.moe.moe_intermediate_size == expert
        assert (spec.vocab_size, spec.num_nextn_predict_layers) == (4096, 1)
    assert round(parameters(large).total / 1e6) == 104
    assert round(parameters(large).active_with_embedding / 1e6) == 27
    assert round(parameters(small).total / 1e6) == 20
    assert round(parameters(small).active_with_embedding / 1e6, 1) == 6.4


def test_quickstart_has_about_four_million_parameters() -> None:
    spec = load_model("quickstart")
    assert (spec.hidden_size, spec.num_hidden_layers, spec.vocab_size) == (192, 4, 4096)
    assert spec.moe and (spec.moe.n_routed_experts, spec.moe.num_experts_per_tok) == (16, 4)
    assert 4.0e6 < parameters(spec).total < 4.5e6


@pytest.mark.parametrize(("name", "millions"), [("300m", 300), ("600m", 600), ("1b", 1000)])
def test_larger_presets_have_the_size_in_their_name_and_shapes_that_kernels_take(name: str, millions: int) -> None:
    spec = load_model(name)
    assert parameters(spec).total / 1e6 == pytest.approx(millions, rel=0.1)
    assert set(accepted_by(spec).values()) == {None}


@pytest.mark.parametrize("width", HIDDEN_SIZES)
def test_every_width_from_2048_up_is_taken_by_all_kernels(width: int) -> None:
    assert set(accepted_by(dovetail_spec(Dial(width=width))).values()) == {None}


def test_only_the_smallest_are_refused_and_the_reasons_have_the_numbers() -> None:
    reasons = accepted_by(load_model("quickstart"))
    assert "(64, 32, 64, 64)" in str(reasons["FlashMLA attention"])
    assert "hidden_size = 192" in str(reasons["DeepEP expert parallelism"])
    assert "kv_lora_rank = 64" in str(reasons["DeepGEMM block FP8"])
    assert reasons["SGLang MTP speculation"] is None
    deep = load_model("deepseek-v3").model_copy(update={"num_nextn_predict_layers": 2})
    assert accepted_by(deep)["SGLang MTP speculation"] == "num_nextn_predict_layers = 2, it takes 1"


def test_published_models_are_taken_by_the_kernels_written_for_them() -> None:
    assert set(accepted_by(load_model("deepseek-v3")).values()) == {None}
    assert accepted_by(load_model("qwen2.5-72b"))["FlashMLA attention"] == "grouped-query attention"
    assert accepted_by(load_model("qwen2.5-72b"))["DeepEP expert parallelism"] == "no experts"


@pytest.mark.parametrize("width", [128, 192, 256, 320, 512, 1024, 1984, 2048, 7168])
def test_dims_are_multiples_of_32_and_the_model_grows_with_the_dial(width: int) -> None:
    spec = dovetail_spec(Dial(width=width))
    mla, moe = spec.attention, spec.moe
    assert isinstance(mla, Mla) and moe and mla.q_lora_rank
    dims = (
        mla.kv_lora_rank,
        mla.q_lora_rank,
        mla.qk_head_dim,
        spec.intermediate_size,
        moe.moe_intermediate_size,
    )
    assert math.gcd(*dims) % 16 == 0
    assert spec.num_hidden_layers % 2 == 0 and moe.first_k_dense_replace == 1
    if width > 128:
        smaller = dovetail_spec(Dial(width=128))
        assert parameters(spec).total > parameters(smaller).total


def test_what_can_be_set_beside_the_dial() -> None:
    spec = dovetail_spec(Dial(width=256, layers=3, experts=8, mtp_depth=0, vocab_size=512))
    assert spec.moe
    assert (spec.num_hidden_layers, spec.moe.n_routed_experts) == (3, 8)
    assert (spec.num_nextn_predict_layers, spec.vocab_size) == (0, 512)


@pytest.mark.parametrize(
    ("width", "message"), [(100, "multiple of 64|greater than"), (2112, "width = 2112"), (64, "128")]
)
def test_widths_that_no_member_has(width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dial(width=width)
