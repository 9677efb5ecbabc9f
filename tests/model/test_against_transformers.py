"""Against transformers in FP32: logits and the gradient of every published tensor equal to rounding.

Both get the same random weights in memory, through the published names. Each wrong variant below moves the
logits far beyond the bound, so the comparison would have seen it.
"""

import re
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dovetail.model.attention import mla, rope
from dovetail.model.checkpoint.weights import to_published
from dovetail.model.transformer import Transformer
from dovetail.numerics.formats.errors import network_terms, normwise_error, tolerance
from dovetail.spec.hf_config import write_hf
from dovetail.spec.model import ModelSpec

SpecFactory = Callable[..., ModelSpec]
ModelFactory = Callable[..., Transformer]
V2 = {"model_type": "deepseek_v2", "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 16.0}
GREEDY = {**V2, "topk_method": "greedy", "n_group": 1, "topk_group": 1}
YARN = {"factor": 40.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0}
SHAPES: dict[str, dict[str, object]] = {
    "all parts": {},
    "uncompressed queries": {"q_lora_rank": None},
    "one group": {"n_group": 1, "topk_group": 1},
    "all groups, more experts": {"n_group": 2, "topk_group": 2, "n_routed_experts": 12, "num_experts_per_tok": 5},
    "no shared expert": {"n_shared_experts": 0},
    "two shared experts": {"n_shared_experts": 2},
    "no dense layer": {"first_k_dense_replace": 0},
    "dense layers only": {"first_k_dense_replace": 3},
    "unnormalised weights": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "YaRN 1/1": {"rope_scaling": YARN},
    "YaRN 0.707/0.707": {"rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
    "YaRN without mscale_all_dim": {"rope_scaling": {**YARN, "mscale_all_dim": 0.0}},
    "other widths": {"qk_nope_head_dim": 8, "qk_rope_head_dim": 12, "v_head_dim": 20, "num_attention_heads": 3},
    "V2 greedy": {**GREEDY, "n_shared_experts": 2, "q_lora_rank": None},
    "V2 greedy, YaRN": {**GREEDY, "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
    "V2 group-limited": {**V2, "topk_method": "group_limited_greedy"},
}
LENGTH = 24


def published_view(theirs: Mapping[str, Tensor], name: str) -> Tensor:
    """The part of transformers' tensors, whose experts are stacked, that a published name means."""
    expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
    if expert is None:
        return theirs[name]
    experts, number, part = expert.groups()
    if part == "down":
        return theirs[f"{experts}.down_proj"][int(number)]
    return theirs[f"{experts}.gate_up_proj"][int(number)].chunk(2)[part == "up"]


def their_model(model: Transformer) -> PreTrainedModel:
    config = AutoConfig.for_model(**write_hf(model.spec))
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    state = theirs.state_dict()
    for name, tensor in to_published(model.state_dict(), model.spec):
        published_view(state, name).copy_(tensor)
    return theirs


def some_tokens(spec: ModelSpec) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, spec.vocab_size, (2, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def our_logits(model: Transformer) -> Tensor:
    return model.logits(model(some_tokens(model.spec)[0].contiguous()).hidden)


def their_logits(theirs: PreTrainedModel, spec: ModelSpec) -> Tensor:
    logits: Tensor = theirs(some_tokens(spec)[0]).logits
    return logits


def bound_of(spec: ModelSpec) -> float:
    return tolerance(torch.float32, terms=network_terms(spec, LENGTH))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # theirs, without shared experts
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients(shape: str, tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    spec = tiny_spec(num_nextn_predict_layers=0, **SHAPES[shape])
    model = random_model(spec)
    theirs = their_model(model)
    logits, their = our_logits(model), their_logits(theirs, spec)
    assert normwise_error(logits, their) < bound_of(spec)

    targets = some_tokens(spec)[1].flatten()
    for each in (logits, their):
        F.cross_entropy(each.flatten(0, 1), targets).backward()
    gradients = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    gradients |= {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    their_gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in theirs.named_parameters()
    }
    compared = 0
    for name, ours in to_published(gradients, spec):
        if not name.endswith("e_score_correction_bias"):
            # there and back, and a sum over the tokens; an expert's gradient may be small beside its terms
            bound = 3 * bound_of(spec)
            assert normwise_error(ours, published_view(their_gradients, name)) < bound, name
            compared += 1
    assert compared > 20


def test_the_bias_chooses_there_as_here(tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    """transformers reads the bias for selection only; without it the logits are others."""
    spec = tiny_spec(num_nextn_predict_layers=0)
    model = random_model(spec)
    theirs = their_model(model)
    for buffer in theirs.buffers():
        if buffer.shape == (8,):
            buffer.zero_()
    with torch.no_grad():
        assert normwise_error(our_logits(model), their_logits(theirs, spec)) > 100 * bound_of(spec)


def _half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


@pytest.mark.parametrize("variant", ["half-split key", "no temperature", "temperature once", "plain frequencies"])
def test_wrong_variants_are_seen(
    variant: str, tiny_spec: SpecFactory, random_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny_spec(num_nextn_predict_layers=0, rope_scaling=YARN)
    temperature = rope.yarn_mscale(40.0, 1.0)
    scale = {"no temperature": 24**-0.5, "temperature once": 24**-0.5 * temperature}
    if variant == "half-split key":
        monkeypatch.setattr(mla, "rotate", _half_split)
    elif variant in scale:
        monkeypatch.setattr(mla, "attention_scale", lambda *_: scale[variant])
    else:
        plain = tiny_spec()
        monkeypatch.setattr(rope, "frequencies", lambda _, dim, right=rope.frequencies: right(plain, dim))
    model = random_model(spec)
    theirs = their_model(model)
    with torch.no_grad():
        assert normwise_error(our_logits(model), their_logits(theirs, spec)) > 100 * bound_of(spec)
