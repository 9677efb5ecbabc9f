"""A checkpoint has the name of a class that computes its function, or our own: each key varied, against transformers.

The silently wrong variants are kept: under a published name they load without a word and compute something else.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

from dovetail.catalog.presets import load_model, model_names
from dovetail.convert import describe
from dovetail.model.checkpoint.weights import export_hf, import_hf
from dovetail.model.transformer import Transformer
from dovetail.numerics.formats.errors import network_terms, normwise_error, tolerance
from dovetail.spec.hf_config import read_hf, write_hf
from dovetail.spec.model import Mla, ModelSpec, Moe, Yarn
from dovetail.spec.published import OWN, PUBLISHED, READ, differences, model_type, why_own

SpecFactory = Callable[..., ModelSpec]
ModelFactory = Callable[..., Transformer]
Changes = dict[str, Any]
LENGTH = 24
V2: Changes = {
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
    "num_nextn_predict_layers": 0,
}
YARN: Changes = {"factor": 40.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0}
ONE_GROUP: Changes = {"n_group": 1, "topk_group": 1}


def with_yarn(**changes: float) -> Changes:
    return {"rope_scaling": {**YARN, **changes}}


COMPUTED: dict[str, tuple[str, Changes]] = {
    "all parts": ("deepseek_v3", {}),
    "uncompressed queries": ("deepseek_v3", {"q_lora_rank": None}),
    "one group": ("deepseek_v3", ONE_GROUP),
    "all groups kept": ("deepseek_v3", {"topk_group": 4, "num_experts_per_tok": 5}),
    "one choice": ("deepseek_v3", {"num_experts_per_tok": 1}),
    "weights as they are": ("deepseek_v3", {"norm_topk_prob": False, "routed_scaling_factor": 1.0}),
    "no shared expert": ("deepseek_v3", {"n_shared_experts": 0}),
    "two shared experts": ("deepseek_v3", {"n_shared_experts": 2}),
    "no dense layer": ("deepseek_v3", {"first_k_dense_replace": 0}),
    "experts in MTP only": ("deepseek_v3", {"first_k_dense_replace": 3}),
    "no experts": ("deepseek_v3", {"n_routed_experts": None, "num_nextn_predict_layers": 0}),
    "no MTP": ("deepseek_v3", {"num_nextn_predict_layers": 0}),
    "two MTP modules": ("deepseek_v3", {"num_nextn_predict_layers": 2}),
    "tied embeddings": ("deepseek_v3", {"tie_word_embeddings": True}),
    "another theta": ("deepseek_v3", {"rope_theta": 100.0}),
    "odd widths": ("deepseek_v3", {"num_attention_heads": 3, "v_head_dim": 20, "qk_rope_head_dim": 12}),
    "YaRN": ("deepseek_v3", with_yarn()),
    "YaRN, mscales apart": ("deepseek_v3", with_yarn(mscale=0.5, mscale_all_dim=1.2)),
    "YaRN, mscale alone": ("deepseek_v3", with_yarn(mscale_all_dim=0.0)),
    "YaRN, another range": ("deepseek_v3", with_yarn(beta_fast=2.0, beta_slow=0.25)),
    "V2, groups": ("deepseek_v2", V2),
    "V2, greedy": ("deepseek_v2", {**V2, **ONE_GROUP, "topk_method": "greedy"}),
    "V2, scaled, YaRN": ("deepseek_v2", {**V2, **with_yarn(), "routed_scaling_factor": 16.0, "q_lora_rank": None}),
}
# A class, what keeps it from computing the model, and how it takes the checkpoint under its name all the same.
OURS: dict[str, tuple[str, str, Changes]] = {
    "softmax for sigmoid": ("deepseek_v3", "scoring_func = 'softmax'", "silent", {"scoring_func": "softmax"}),
    "no bias": ("deepseek_v3", "topk_method = 'greedy'", "loud", {"topk_method": "greedy", **ONE_GROUP}),
    "another epsilon": ("deepseek_v3", "rms_norm_eps = 0.001", "silent", {"rms_norm_eps": 1e-3}),
    "mscale alone": ("deepseek_v3", "mscale = 0.707", "silent", with_yarn(mscale=0.707, mscale_all_dim=0.0)),
    "no mscale": ("deepseek_v3", "mscale = 0 and", "silent", with_yarn(mscale=0.0)),
    "no turn fits": (
        "deepseek_v3",
        "beta_slow = 2",
        "silent",
        with_yarn(original_max_position_embeddings=1, beta_slow=2),
    ),
    "all fit": ("deepseek_v3", "beta_fast = 1", "silent", {"rope_theta": 1.5, **with_yarn(beta_fast=1, beta_slow=0.5)}),
    "MTP without experts": (
        "deepseek_v3",
        "num_nextn_predict_layers = 1 without",
        "drafts",
        {"n_routed_experts": None},
    ),
    "V2, normalised": ("deepseek_v2", "norm_topk_prob = True", "silent", {**V2, "norm_topk_prob": True}),
    "V2, sigmoid": ("deepseek_v2", "scoring_func = 'sigmoid'", "silent", {**V2, "scoring_func": "sigmoid"}),
    "V2, another epsilon": ("deepseek_v2", "rms_norm_eps = 0.001", "silent", {**V2, "rms_norm_eps": 1e-3}),
    "V2, three heads": ("deepseek_v2", "num_attention_heads = 3", "loud", {**V2, "num_attention_heads": 3}),
    "V2, MTP": ("deepseek_v2", "num_nextn_predict_layers = 1", "drafts", {**V2, "num_nextn_predict_layers": 1}),
}


def exported(spec: ModelSpec, random_model: ModelFactory, directory: Path) -> Transformer:
    model = random_model(spec)
    export_hf(model, spec, directory)
    return model


def some_tokens(spec: ModelSpec) -> Tensor:
    return torch.randint(0, spec.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def our_logits(model: Transformer) -> Tensor:
    return model.logits(model(some_tokens(model.spec)).hidden)


@torch.no_grad()
def their_logits(directory: Path, spec: ModelSpec) -> Tensor:
    """Of the class that config.json names. ValueError where it says that it cannot have all of the checkpoint."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    state = model.state_dict()
    missing = [key for key in info["missing_keys"] if state[key].numel()]  # no shared expert is one of width 0
    mtp = [f"layers.{spec.num_hidden_layers + depth}." for depth in range(spec.num_nextn_predict_layers)]
    unexpected = [key for key in info["unexpected_keys"] if not any(layer in key for layer in mtp)]
    if missing or unexpected or info["mismatched_keys"]:
        raise ValueError(f"missing {missing}, unexpected {unexpected}, mismatched {info['mismatched_keys']}")
    logits: Tensor = model.eval()(some_tokens(spec)).logits
    return logits


@torch.no_grad()
def their_drafts(directory: Path, hidden: Tensor, spec: ModelSpec) -> list[Tensor]:
    """Output of each of transformers' MTP modules in turn, from the main model's hidden states."""
    main = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    layers = "|".join(str(spec.num_hidden_layers + depth) for depth in range(spec.num_nextn_predict_layers))
    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.({layers})\."]
    drafter = MtpModel.from_pretrained(main, device_map={"": "cpu"}).eval()
    outputs, tokens = [], some_tokens(spec)
    for depth in range(spec.num_nextn_predict_layers):
        hidden, next_tokens = hidden[:, :-1], tokens[:, depth + 1 :]
        positions = torch.arange(1 + depth, LENGTH)[None]
        hidden = drafter.forward_layer(depth, hidden, positions, None, input_ids=next_tokens)
        outputs.append(hidden)
    return outputs


def bound_of(spec: ModelSpec) -> float:
    return tolerance(torch.float32, terms=network_terms(spec, LENGTH))


# ---- What a class computes bears its name ----


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # theirs, without shared experts
@pytest.mark.parametrize("name", COMPUTED)
def test_what_a_class_computes_has_its_name(
    name: str, tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    expected, changes = COMPUTED[name]
    spec = tiny_spec(**changes)
    model = exported(spec, random_model, tmp_path / "out")
    assert model_type(spec) == expected and why_own(spec) is None
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == (expected, [PUBLISHED[expected]])
    assert normwise_error(our_logits(model), their_logits(tmp_path / "out", spec)) < bound_of(spec)


def test_both_mtp_modules_compute_the_same_there(
    tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    spec = tiny_spec(num_nextn_predict_layers=2)
    model = exported(spec, random_model, tmp_path / "out")
    tokens = some_tokens(spec)
    with torch.no_grad():
        first = hidden = model(tokens).hidden
        for depth, theirs in enumerate(their_drafts(tmp_path / "out", first, spec)):
            hidden = model.mtp_forward(depth, hidden[:, :-1].contiguous(), tokens[:, depth + 1 :].contiguous()).hidden
            assert normwise_error(hidden, theirs) < bound_of(spec)
            if depth == 1:  # fed with the main model's states, as a module that is not chained would be, it differs
                unchained = model.mtp_forward(1, first[:, :-2].contiguous(), tokens[:, 2:].contiguous()).hidden
                assert normwise_error(unchained, theirs) > 100 * bound_of(spec)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    changes=st.fixed_dictionaries(
        {
            "scoring_func": st.sampled_from(["sigmoid", "softmax"]),
            "topk_method": st.sampled_from(["noaux_tc", "group_limited_greedy"]),
            "norm_topk_prob": st.booleans(),
            "n_group": st.sampled_from([2, 4]),
            "num_experts_per_tok": st.integers(1, 4),
            "q_lora_rank": st.sampled_from([None, 24]),
            "tie_word_embeddings": st.booleans(),
            "num_nextn_predict_layers": st.integers(0, 2),
        }
    ),
)
def test_whatever_is_named_is_computed(
    changes: Changes, tiny_spec: SpecFactory, random_model: ModelFactory, tmp_path_factory: pytest.TempPathFactory
) -> None:
    spec = tiny_spec(**changes)
    directory = tmp_path_factory.mktemp("drawn") / "out"
    model = exported(spec, random_model, directory)
    if model_type(spec) == OWN:
        assert torch.equal(our_logits(import_hf(directory, dtype=torch.float32)[0]), our_logits(model))
    else:
        assert normwise_error(our_logits(model), their_logits(directory, spec)) < bound_of(spec)


def test_presets_have_published_names() -> None:
    names = {name: model_type(load_model(name)) for name in model_names()}
    assert names.pop("deepseek-v2") == names.pop("deepseek-v2-lite") == "deepseek_v2"
    assert (names.pop("qwen2.5-72b"), names.pop("llama-3.1-405b")) == ("qwen2", "llama")
    assert set(names.values()) == {"deepseek_v3"} and len(names) > 5
    assert not any(map(why_own, map(load_model, model_names())))


# ---- All else bears ours ----


@pytest.mark.parametrize("name", OURS)
def test_all_else_has_our_name_and_under_theirs_would_be_another_model(
    name: str, tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    published, key, manner, changes = OURS[name]
    spec, out = tiny_spec(**changes), tmp_path / "out"
    model = exported(spec, random_model, out)
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == (OWN, ["DovetailForCausalLM"])
    with pytest.raises(ValueError, match=OWN):
        AutoModelForCausalLM.from_pretrained(out)
    again, read = import_hf(out, dtype=torch.float32)
    assert read == spec and torch.equal(our_logits(again), our_logits(model))
    assert any(key in reason for reason in differences(spec, published))
    _, line = describe(out, spec)
    assert "will not load" in line and str(why_own(spec)) in line and "\n" not in line

    (out / "config.json").write_text(
        json.dumps({**config, "model_type": published, "architectures": [PUBLISHED[published]]})
    )
    if manner == "loud":
        with pytest.raises((ValueError, StrictDataclassError)):
            their_logits(out, spec)
        return
    difference = normwise_error(our_logits(model), their_logits(out, spec))
    if manner == "silent":
        assert difference > 10 * bound_of(spec)
    else:  # the main model is the same, its modules are not to be had
        assert difference < bound_of(spec)
        with pytest.raises((RuntimeError, AttributeError), match="weights are missing|num_mtp_layers"):
            their_drafts(out, model(some_tokens(spec)).hidden, spec)


class WarmGate(Moe):
    gate_temperature: float = 1.0


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, "deepseek_v3"), (2.0, OWN)])
def test_a_key_that_no_class_has_takes_the_name_away(temperature: float, expected: str, tiny_spec: SpecFactory) -> None:
    """Whoever adds a key need not think of it. Its default leaves the model as it was."""
    plain = tiny_spec()
    warm = WarmGate(**plain.moe.model_dump(), gate_temperature=temperature)
    spec = plain.model_copy(update={"moe": warm})
    assert model_type(spec) == expected
    assert ("gate_temperature = 2.0, it has no such key" in str(why_own(spec))) == (expected == OWN)


def test_all_keys_that_there_are_have_been_thought_of() -> None:
    records = (ModelSpec, Mla, Moe, Yarn)
    assert {key for record in records for key in record.model_fields} == READ


# ---- In ----


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        ({"scoring_func": "softmax"}, "deepseek_v3", "scoring_func = 'softmax', it has 'sigmoid'"),
        ({"topk_method": "greedy", **ONE_GROUP}, "deepseek_v3", "topk_method = 'greedy', it has 'noaux_tc'"),
        ({**V2, "norm_topk_prob": True}, "deepseek_v2", "norm_topk_prob = True"),
    ],
)
def test_keys_that_readers_of_a_name_disregard_are_refused(
    changes: Changes, name: str, message: str, tiny_spec: SpecFactory
) -> None:
    config = {**write_hf(tiny_spec(**changes)), "model_type": name}
    with pytest.raises(ValueError, match=message) as caught:
        read_hf(config)
    assert "\n" not in str(caught.value) and "set model_type to 'dovetail'" in str(caught.value)
    assert read_hf({**config, "model_type": OWN}) == tiny_spec(**changes)


def test_a_key_of_another_version_is_refused_in_ours(tiny_spec: SpecFactory) -> None:
    config = {**write_hf(tiny_spec(scoring_func="softmax")), "gate_temperature": 2.0}
    with pytest.raises(ValueError, match="gate_temperature not known here"):
        read_hf(config)
