"""`config.json` both ways, against the published file and against transformers' own config classes."""

import copy
import json
from typing import Any

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, LlamaConfig, Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dovetail.catalog.presets import load_model, model_names
from dovetail.spec.hf_config import read_flat, read_hf, unread_keys, write_hf
from dovetail.spec.model import Gqa, Mla, Yarn

# The published DeepSeek-R1 config.json [HFcfg]; DeepSeek-V3's differs in nothing that is read.
PUBLISHED: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def changed(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(PUBLISHED), **changes}


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in PUBLISHED.items() if name != key}


def test_the_published_file_is_the_preset_up_to_the_initialisation() -> None:
    spec = read_hf(PUBLISHED)
    assert spec.initializer_range == 0.02
    assert spec.model_copy(update={"initializer_range": 0.006}) == load_model("deepseek-v3")
    assert unread_keys(PUBLISHED) == []


def test_what_is_written_is_the_published_file() -> None:
    written = write_hf(read_hf(PUBLISHED))
    not_ours = {"auto_map", "quantization_config", "transformers_version"}
    assert written == {key: value for key, value in PUBLISHED.items() if key not in not_ours}


@pytest.mark.parametrize("name", model_names())
def test_every_preset_survives_the_round_trip_through_json(name: str) -> None:
    spec = load_model(name)
    assert read_hf(json.loads(json.dumps(write_hf(spec)))) == spec


def test_scoring_function_is_always_written() -> None:
    """transformers' own files lack it, and llama.cpp then silently takes softmax."""
    assert "scoring_func" not in DeepseekV3Config().to_dict()
    assert write_hf(load_model("quickstart"))["scoring_func"] == "sigmoid"
    assert write_hf(load_model("deepseek-v2-lite"))["scoring_func"] == "softmax"


@pytest.mark.parametrize("name", ["deepseek-v3", "quickstart", "104m", "300m"])
def test_transformers_reads_what_we_write_and_we_read_what_it_writes(name: str) -> None:
    spec = load_model(name)
    theirs = DeepseekV3Config(**write_hf(spec))
    for key, value in write_hf(spec).items():
        if key not in ("rope_theta", "rope_scaling", "torch_dtype", "architectures"):
            assert getattr(theirs, key) == value, key
    assert theirs.rope_parameters["rope_theta"] == spec.rope_theta
    for config in (
        theirs.to_dict(),
        json.loads(theirs.to_json_string()),
        json.loads(theirs.to_json_string(use_diff=False)),
    ):
        assert "rope_theta" not in config
        # the three keys that transformers has no field for come back because it keeps unknown ones
        assert read_hf(config) == spec


def test_a_config_that_transformers_made_alone() -> None:
    theirs = DeepseekV3Config(num_nextn_predict_layers=2, rope_scaling=changed()["rope_scaling"])
    spec = read_hf(theirs.to_dict())
    assert spec.moe and spec.moe.scoring_func == "sigmoid" and spec.moe.topk_method == "noaux_tc"
    assert spec.num_nextn_predict_layers == 2
    assert spec.rope_scaling == load_model("deepseek-v3").rope_scaling
    assert unread_keys(theirs.to_dict()) == []


def test_yarn_scales_the_same_after_the_round_trip() -> None:
    theirs = DeepseekV3Config(**write_hf(read_hf(PUBLISHED)))
    original = DeepseekV3Config(**changed(quantization_config=None))  # a copy, for transformers writes into its tables
    ours, published = (ROPE_INIT_FUNCTIONS["yarn"](config) for config in (theirs, original))
    assert ours[1] == published[1] == 1.0
    assert ours[0].tolist() == published[0].tolist()


def test_absent_mscales_mean_what_the_published_code_takes() -> None:
    bare = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 4096}
    expected = Yarn(factor=4, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=0.0)
    spec = read_hf(changed(rope_scaling=bare))
    assert spec.rope_scaling == expected
    # ... which transformers agrees with: cos and sin carry 0.1 ln 4 + 1
    factor = ROPE_INIT_FUNCTIONS["yarn"](DeepseekV3Config(**write_hf(spec)))[1]
    assert factor == pytest.approx(1.1386294)


def test_null_query_rank_and_null_groups() -> None:
    spec = read_hf(changed(q_lora_rank=None, n_group=None, topk_group=None))
    assert isinstance(spec.attention, Mla) and spec.attention.q_lora_rank is None
    assert spec.moe and (spec.moe.n_group, spec.moe.topk_group) == (1, 1)
    assert write_hf(spec)["q_lora_rank"] is None
    assert DeepseekV3Config(**write_hf(spec)).q_lora_rank is None


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v2-lite"])
def test_v2_through_transformers(name: str) -> None:
    spec = load_model(name)
    theirs = DeepseekV2Config(**write_hf(spec))
    assert (theirs.topk_method, theirs.n_group) == (spec.moe.topk_method, spec.moe.n_group)
    assert read_hf(theirs.to_dict()) == spec
    alone = read_hf(DeepseekV2Config(num_experts_per_tok=6).to_dict())
    assert alone.moe and (alone.moe.topk_method, alone.moe.scoring_func) == ("greedy", "softmax")


def test_a_greedy_gate_looks_at_no_groups_whatever_the_file_says() -> None:
    gate = {"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False}
    config = changed(model_type="deepseek_v2", **gate, n_group=8, topk_group=3)
    spec = read_hf(config)
    assert spec.moe and (spec.moe.n_group, spec.moe.topk_group) == (1, 1)


def test_grouped_query_models_through_transformers() -> None:
    qwen = load_model("qwen2.5-72b")
    assert isinstance(qwen.attention, Gqa) and qwen.attention.attention_bias
    assert read_hf(Qwen2Config(**write_hf(qwen)).to_dict()) == qwen
    llama = load_model("llama-3.1-405b")
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 8192
    theirs = LlamaConfig(**{**write_hf(llama), "rope_scaling": llama3})
    assert read_hf(theirs.to_dict()) == llama  # only counted, so its scaling is not kept


def test_a_model_without_experts() -> None:
    spec = read_hf(changed(n_routed_experts=None))
    assert spec.moe is None and not spec.is_moe_layer(60)
    assert read_hf(write_hf(spec)) == spec
    assert DeepseekV3Config(**write_hf(spec)).first_k_dense_replace == 61  # so transformers builds no experts either


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "num_attention_heads",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "first_k_dense_replace",
    ],
)
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ValueError, match=f"missing key '{key}'"):
        read_hf(without(key))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral' is not one of deepseek_v3"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, only 'silu' is"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"rope_interleave": False}, "rope_interleave = False"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling of type 'linear'"),
        (
            {"rope_scaling": {**PUBLISHED["rope_scaling"], "attention_factor": 1.3}},
            "attention_factor = 1.3 in the rope scaling is not supported, only what .* give, 1; remove it",
        ),
        (
            {"rope_scaling": {**PUBLISHED["rope_scaling"], "mscale_all_dim": 0, "attention_factor": 1.0}},
            "attention_factor = 1.0 .* give, 1.36889;",
        ),
        (
            {"rope_scaling": {**PUBLISHED["rope_scaling"], "factor": 1, "attention_factor": 2.0}},
            "attention_factor = 2.0 .* give, 1;",
        ),
        ({"rope_scaling": {**PUBLISHED["rope_scaling"], "attention_factor": "1"}}, "attention_factor = '1'"),
        ({"rope_scaling": {**PUBLISHED["rope_scaling"], "factor": 0.5}}, "rope_scaling: factor = 0.5"),
        ({"rope_scaling": "yarn"}, 'rope_scaling = \'yarn\': expected an object such as {"type": "yarn"'),
        ({"rope_scaling": [40]}, r"rope_scaling = \[40\]: expected an object"),
        ({"rope_scaling": {"factor": 40}}, "rope_scaling has factor and no type; expected"),
        ({"rope_scaling": {**PUBLISHED["rope_scaling"], "rope_type": "default"}}, "are default and yarn; keep one"),
        ({"rope_theta": 500000.0, "rope_parameters": {"rope_theta": 10000.0}}, "rope_theta = 500000.0, and 10000.0 in"),
        ({"rope_theta": 1}, "rope_theta = 1: input should be greater than 1"),
        ({"num_local_experts": 64}, "n_routed_experts = 256, num_local_experts = 64 contradict each other"),
        ({"model_type": ["deepseek_v3"]}, "is not one of deepseek_v3"),
        ({"model_type": "deepseekv3"}, "is not one of deepseek_v3, .*; architectures names the class of deepseek_v3"),
        ({"model_type": "kimi_k2", "architectures": ["KimiForCausalLM"]}, "model_type 'kimi_k2' is not one of"),
        ({"model_type": "mine"}, "architectures names the class of deepseek_v3: if the model is one, set model_type"),
        ({"model_type": None, "architectures": None}, "no model_type; set it to one of deepseek_v3"),
        ({"eos_token_id": [1, 129280]}, "eos_token_id = 129280 is not a token"),
        ({"rope_scaling": {**PUBLISHED["rope_scaling"], "truncate": False}}, "truncate = False"),
        ({"hidden_size": "7168"}, "hidden_size = '7168': input should be a valid integer"),
        ({"topk_group": 9}, "topk_group = 9 groups cannot be kept of n_group = 8"),
        ({"kv_lora_rank": None}, "kv_lora_rank"),
    ],
)
def test_what_would_compute_something_else_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_hf(changed(**changes))
    assert "\n" not in str(caught.value)


def test_unknown_keys_are_collected_and_not_fatal() -> None:
    config = changed(index_topk=2048, index_n_heads=64)
    assert read_hf(config) == read_hf(PUBLISHED)
    assert unread_keys(config) == ["index_n_heads", "index_topk"]
    misspelt = changed(rope_scaling={**PUBLISHED["rope_scaling"], "betafast": 64, "extra": None}, index_topk=None)
    assert unread_keys(misspelt) == ["rope_scaling.betafast"]


def test_several_end_tokens_are_kept() -> None:
    spec = read_hf(changed(eos_token_id=[5, 6]))
    assert spec.eos_token_id == spec.end_tokens == (5, 6)
    assert json.loads(json.dumps(write_hf(spec)))["eos_token_id"] == [5, 6]
    assert read_hf(PUBLISHED).end_tokens == (1,) and read_hf(changed(eos_token_id=None)).end_tokens == ()


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"num_local_experts": None}, {}),
        ({"num_local_experts": 256}, {}),
        ({"num_experts": 256, "n_routed_experts": None}, {}),
        ({"scoring_func": None, "topk_method": None, "norm_topk_prob": None, "initializer_range": None}, {}),
        ({"hidden_act": "swish", "moe_layer_freq": None}, {}),
        ({"model_type": None}, {}),
        ({"model_type": "kimi_k2"}, {}),
        ({"rope_scaling": {**PUBLISHED["rope_scaling"], "mscale": None}}, {}),
        ({"rope_scaling": {**PUBLISHED["rope_scaling"], "attention_factor": 1.0, "truncate": True}}, {}),
        ({"rope_scaling": {**PUBLISHED["rope_scaling"], "type": "YaRN"}}, {}),
        ({"rope_scaling": {**PUBLISHED["rope_scaling"], "rope_type": "yarn"}}, {}),
        ({"rope_scaling": {**PUBLISHED["rope_scaling"], "factor": 1.0}}, {"rope_scaling": None}),
        ({"rope_scaling": {"type": None, "factor": None}}, {"rope_scaling": None}),
        (
            {"rope_scaling": {**PUBLISHED["rope_scaling"], "mscale_all_dim": 0.0, "attention_factor": 1.3688879454}},
            {"rope_scaling": {**PUBLISHED["rope_scaling"], "mscale_all_dim": 0.0}},
        ),
    ],
)
def test_other_spellings_of_the_same_model_are_read(changes: dict[str, Any], same: dict[str, Any]) -> None:
    assert read_hf(changed(**changes)) == read_hf(changed(**same))


def test_null_takes_the_default_of_its_family() -> None:
    nulls = dict.fromkeys(["scoring_func", "topk_method", "norm_topk_prob", "n_group", "topk_group"])
    spec = read_hf(changed(model_type="deepseek_v2", **nulls))
    assert spec.moe and (spec.moe.topk_method, spec.moe.scoring_func) == ("greedy", "softmax")
    assert spec.moe.norm_topk_prob is False


def test_a_factor_of_one_and_an_attention_factor_compute_the_same_in_transformers() -> None:
    """The reason why they are read."""
    scaling = {**changed()["rope_scaling"], "mscale_all_dim": 0.0}
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](
        DeepseekV3Config(**changed(rope_scaling={**scaling, "factor": 1.0}))
    )
    base = 1.0 / 10000 ** (torch.arange(0, 64, 2).float() / 64)
    assert factor == 1.0 and torch.allclose(frequencies, base, rtol=1e-6)
    told = DeepseekV3Config(**changed(rope_scaling={**scaling, "attention_factor": 1.3688879454}))
    follows = DeepseekV3Config(**changed(rope_scaling=scaling))
    factors = [ROPE_INIT_FUNCTIONS["yarn"](config)[1] for config in (told, follows)]
    assert factors[0] == pytest.approx(factors[1])


def test_flat_tables_are_strict() -> None:
    flat = {key: PUBLISHED[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")}
    flat |= {
        "num_attention_heads": 2,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    }
    assert isinstance(read_flat({**flat, "source": "mine"}).attention, Mla)
    with pytest.raises(ValueError, match=r"run\.toml: unknown key 'kv_lora_rnk'; did you mean kv_lora_rank"):
        read_flat({**flat, "kv_lora_rnk": 8}, where="run.toml")
    with pytest.raises(ValueError, match="model_type = 'gpt2' is not one of"):
        read_flat({**flat, "model_type": "gpt2"})
    with pytest.raises(ValueError, match="model: missing key 'v_head_dim'"):
        read_flat({key: value for key, value in flat.items() if key != "v_head_dim"})
    flat["rope_scaling"] = {"factor": 4.0, "original_max_position_embeddings": 64, "beta": 1.0}
    with pytest.raises(ValueError, match=r"unknown key 'rope_scaling.beta'; did you mean beta_"):
        read_flat(flat)
