import math

import pytest

from dovetail.spec.model import Gqa, Mla, ModelSpec, Moe
from dovetail.spec.tensors import published_tensors, scale_shape, stored_tensors

V3 = ModelSpec(  # [V3 §4.2]
    vocab_size=129280,
    hidden_size=7168,
    num_hidden_layers=61,
    intermediate_size=18432,
    attention=Mla(
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    ),
    moe=Moe(
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        first_k_dense_replace=3,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
    ),
    num_nextn_predict_layers=1,
)


def test_the_671b_checkpoint_has_91991_tensors_in_fp8() -> None:
    names = [name for name, _, _ in published_tensors(V3, fp8=True)]
    assert len(names) == len(set(names)) == 91_991
    assert 91_991 == 62 * 14 + 3 * 6 + 59 * 1544 + 3 + 6  # blocks, dense MLPs, MoE MLPs, outside, MTP extras


def test_parameters_add_up_to_the_published_totals() -> None:
    mtp = "model.layers.61."
    main = sum(math.prod(t.shape) for t in stored_tensors(V3) if not t.name.startswith(mtp))
    assert main == 671_026_419_200
    unique = sum(math.prod(t.shape) for t in stored_tensors(V3) if t.name.startswith(mtp) and not t.copy_of)
    assert unique == 11_610_068_224


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("model.embed_tokens.weight", (129280, 7168), "BF16"),
        ("lm_head.weight", (129280, 7168), "BF16"),
        ("model.norm.weight", (7168,), "F32"),
        ("model.layers.0.self_attn.q_a_proj.weight", (1536, 7168), "F8_E4M3"),
        ("model.layers.0.self_attn.q_b_proj.weight", (24576, 1536), "F8_E4M3"),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", (576, 7168), "F8_E4M3"),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv", (5, 56), "F32"),
        ("model.layers.0.self_attn.kv_b_proj.weight", (32768, 512), "F8_E4M3"),
        ("model.layers.60.self_attn.o_proj.weight", (7168, 16384), "F8_E4M3"),
        ("model.layers.2.mlp.down_proj.weight", (7168, 18432), "F8_E4M3"),
        ("model.layers.3.mlp.gate.weight", (256, 7168), "F32"),
        ("model.layers.3.mlp.gate.e_score_correction_bias", (256,), "F32"),
        ("model.layers.60.mlp.experts.255.gate_proj.weight", (2048, 7168), "F8_E4M3"),
        ("model.layers.60.mlp.shared_experts.down_proj.weight", (7168, 2048), "F8_E4M3"),
        ("model.layers.61.eh_proj.weight", (7168, 14336), "BF16"),
        ("model.layers.61.embed_tokens.weight", (129280, 7168), "BF16"),
        ("model.layers.61.shared_head.norm.weight", (7168,), "F32"),
        ("model.layers.61.shared_head.head.weight", (129280, 7168), "BF16"),
        ("model.layers.61.mlp.experts.0.up_proj.weight_scale_inv", (16, 56), "F32"),
    ],
)
def test_published_shapes_and_types(name: str, shape: tuple[int, ...], dtype: str) -> None:
    tensors = {tensor: (dims, kind) for tensor, dims, kind in published_tensors(V3, fp8=True)}
    assert tensors[name] == (shape, dtype)


def test_layers_below_the_first_moe_layer_have_no_experts() -> None:
    names = {name for name, _, _ in published_tensors(V3)}
    assert "model.layers.2.mlp.gate_proj.weight" in names and "model.layers.2.mlp.gate.weight" not in names
    assert "model.layers.3.mlp.gate_proj.weight" not in names and "model.layers.3.mlp.gate.weight" in names
    assert not [name for name in names if name.startswith("model.layers.62.")]


def test_scales_cover_ragged_blocks() -> None:
    assert scale_shape((576, 7168)) == (5, 56)
    assert scale_shape((1, 129)) == (1, 2)
    assert scale_shape((10, 10), tile=(4, 5)) == (3, 2)


def test_grouped_query_models_have_no_names_here() -> None:
    spec = V3.model_copy(
        update={"attention": Gqa(num_attention_heads=64, num_key_value_heads=8, head_dim=128), "moe": None}
    )
    with pytest.raises(ValueError, match="grouped-query"):
        list(stored_tensors(spec))
