"""What a model may be, and the numbers in each refusal."""

from typing import Any

import pytest

from dovetail.catalog.presets import load_model
from dovetail.spec.model import Gqa, Mla, ModelSpec, Moe, Yarn

MLA = {
    "num_attention_heads": 2,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
MOE = {"n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 8}
BODY = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}


def test_the_smallest_spec_and_its_derived_dimensions() -> None:
    spec = ModelSpec(**BODY, attention=Mla(**MLA), moe=Moe(**MOE, first_k_dense_replace=1))
    assert isinstance(spec.attention, Mla)
    assert (spec.attention.qk_head_dim, spec.attention.cache_dim) == (12, 12)
    assert [spec.is_moe_layer(layer) for layer in range(3)] == [False, True, True]
    assert spec.num_moe_layers == 1
    assert Gqa(num_attention_heads=8, num_key_value_heads=2, head_dim=4).cache_dim == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_group": 3}, r"n_routed_experts = 16 does not divide into n_group = 3"),
        ({"n_group": 4, "topk_group": 5}, r"topk_group = 5 groups cannot be kept of n_group = 4"),
        (
            {"n_group": 8, "topk_group": 1},
            r"num_experts_per_tok = 4 is more than the 2 experts in topk_group = 1",
        ),
        ({"num_experts_per_tok": 17}, r"num_experts_per_tok = 17 is more than the 16 experts"),
        ({"topk_method": "greedy", "n_group": 2}, r"set n_group = 1 and topk_group = 1, not 2 and 1"),
        ({"n_group": 16, "topk_group": 4}, r"n_routed_experts = 16 in n_group = 16 groups leaves 1 in each"),
        ({"routed_scaling_factor": 0.0}, r"greater than 0"),
        ({"n_expert": 3}, r"n_expert"),
    ],
)
def test_gates_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Moe(**{**MOE, **change})


def test_a_group_limited_softmax_gate_may_have_one_expert_per_group() -> None:
    one = {"n_group": 16, "topk_group": 4, "topk_method": "group_limited_greedy", "scoring_func": "softmax"}
    assert not Moe(**{**MOE, **one}).has_bias


def test_models_that_cannot_be() -> None:
    mla = Mla(**MLA)
    with pytest.raises(ValueError, match="qk_rope_head_dim = 3 is odd"):
        Mla(**{**MLA, "qk_rope_head_dim": 3})
    with pytest.raises(ValueError, match="num_attention_heads = 8 is not a multiple of num_key_value_heads = 3"):
        Gqa(num_attention_heads=8, num_key_value_heads=3, head_dim=4)
    with pytest.raises(ValueError, match="first_k_dense_replace = 3 is more than num_hidden_layers = 2"):
        ModelSpec(**BODY, attention=mla, moe=Moe(**MOE, first_k_dense_replace=3))
    with pytest.raises(ValueError, match="eos_token_id = 32 is not a token: vocab_size = 32"):
        ModelSpec(**BODY, attention=mla, eos_token_id=32)
    gqa = Gqa(num_attention_heads=8, num_key_value_heads=2, head_dim=4)
    with pytest.raises(ValueError, match="no experts, no MTP"):
        ModelSpec(**BODY, attention=gqa, num_nextn_predict_layers=1)
    with pytest.raises(ValueError, match="greater than 1"):
        Yarn(factor=1.0, original_max_position_embeddings=16)
    with pytest.raises(ValueError, match="beta_slow"):
        Yarn(factor=2.0, original_max_position_embeddings=16, beta_slow=0.0)


def test_specs_are_frozen_and_hashable() -> None:
    spec = load_model("quickstart")
    with pytest.raises(ValueError, match="frozen"):
        spec.hidden_size = 1
    assert hash(spec) == hash(spec.model_copy())
