"""Exact counts, against the published numbers, the tensor list, our model and torch's own FLOP counter."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dovetail.catalog.presets import load_model
from dovetail.cost import count
from dovetail.model.experts.moe import LocalDispatcher
from dovetail.model.transformer import Transformer, initialize
from dovetail.spec.model import Gqa, Mla, ModelSpec
from dovetail.spec.tensors import stored_tensors

V3 = load_model("deepseek-v3")
MLA_PRESETS = ["deepseek-v3", "deepseek-v2", "deepseek-v2-lite", "quickstart", "20m", "104m", "300m", "1b"]


def test_deepseek_v3_by_part() -> None:
    """[V3 §4.2] and arithmetic on its published tensors."""
    assert count.attention_parameters(V3) == 187_107_328
    assert count.layer_parameters(V3, 0).dense_ffn == 396_361_728
    assert count.expert_parameters(V3) == 44_040_192
    assert count.layer_parameters(V3, 3).gate == 1_835_264
    assert count.layer_parameters(V3, 3).total == 11_507_286_272
    assert count.mtp_parameters(V3) == 11_610_068_224
    parameters = count.parameters(V3)
    assert parameters.embedding == parameters.head == 926_679_040
    assert parameters.total == 671_026_419_200
    assert parameters.active_body == 35_698_932_224
    assert parameters.active == 36_625_618_432
    assert parameters.active_with_embedding == 37_552_297_472


def test_the_quoted_685_billion_hold_copies_of_embedding_and_head() -> None:
    parameters = count.parameters(V3)
    assert round((parameters.total_with_mtp + 2 * parameters.embedding) / 1e9, 2) == 684.49


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("deepseek-v2", 235_741_434_880, 20_851_512_320),
        ("deepseek-v2-lite", 15_706_484_224, 2_451_435_008),
        ("qwen2.5-72b", 72_706_203_648, 71_460_495_360),
        ("llama-3.1-405b", 405_853_388_800, 403_752_042_496),
    ],
)
def test_other_published_models(name: str, total: int, active: int) -> None:
    parameters = count.parameters(load_model(name))
    assert (parameters.total, parameters.active) == (total, active)


@pytest.mark.parametrize("name", MLA_PRESETS)
def test_counts_are_those_of_the_tensor_list(name: str) -> None:
    spec = load_model(name)
    listed = sum(math.prod(tensor.shape) for tensor in stored_tensors(spec) if not tensor.copy_of)
    assert count.parameters(spec).total_with_mtp == listed


def test_a_tied_head_is_counted_once_but_computed() -> None:
    tied = V3.model_copy(update={"tie_word_embeddings": True})
    assert count.parameters(tied).total == count.parameters(V3).total - 926_679_040
    assert count.parameters(tied).active == count.parameters(V3).active


def test_checkpoint_tensors_of_the_published_files() -> None:
    assert count.checkpoint_tensors(V3, fp8=True) == 91_991


@pytest.mark.parametrize(
    ("name", "expected"), [("deepseek-v3", 70_272), ("qwen2.5-72b", 327_680), ("llama-3.1-405b", 516_096)]
)
def test_cache_bytes_per_token(name: str, expected: int) -> None:
    assert count.cache_bytes_per_token(load_model(name)) == expected


def test_cache_of_mtp_layers_and_of_eight_bits() -> None:
    assert count.cache_bytes_per_token(V3, mtp=True) == 576 * 62 * 2
    assert count.cache_bytes_per_token(V3, bytes_per_element=1) == 35_136


def test_training_flop_per_token_at_4096() -> None:
    assert round(count.training_flop_per_token(V3, 4096) / 1e9, 2) == 250.46
    assert round(count.training_flop_per_token(V3, 4096, causal=False) / 1e9, 1) == 281.2
    assert round(3 * count.attention_flop_per_token(V3, 4096) / 1e9, 2) == 30.70
    assert round(count.training_flop_per_token(load_model("deepseek-v2"), 4096) / 1e9) == 155
    assert round(count.training_flop_per_token(load_model("qwen2.5-72b"), 4096) / 1e9, 1) == 444.9
    assert round(count.training_flop_per_token(load_model("llama-3.1-405b"), 4096) / 1e9, 1) == 2473.2


def test_forward_is_a_third_and_mtp_is_extra() -> None:
    assert 3 * count.forward_flop_per_token(V3, 4096) == count.training_flop_per_token(V3, 4096)
    extra = count.forward_flop_per_token(V3, 4096, mtp=True) - count.forward_flop_per_token(V3, 4096)
    assert extra == pytest.approx(count.mtp_flop_per_token(V3, 4096))
    assert count.mtp_flop_per_token(load_model("deepseek-v2"), 4096) == 0


def small(**changes: object) -> ModelSpec:
    return load_model("quickstart").model_copy(update=changes)


@pytest.mark.parametrize(
    "spec",
    [
        load_model("quickstart"),
        small(num_nextn_predict_layers=2),
        small(moe=None),
        small(tie_word_embeddings=True, num_nextn_predict_layers=0),
        small(attention=load_model("quickstart").attention.model_copy(update={"q_lora_rank": None})),
    ],
    ids=["quickstart", "two-mtp", "dense", "tied", "full-query"],
)
def test_our_model_has_the_parameters_that_are_counted(spec: ModelSpec) -> None:
    with torch.device("meta"):
        model = Transformer(spec)
    held = sum(each.numel() for each in [*model.parameters(), *model.buffers()])
    assert held == count.parameters(spec).total_with_mtp


@pytest.mark.parametrize("mtp", [False, True])
def test_flop_are_those_that_torch_counts(mtp: bool) -> None:
    """Exactly, but for the vectors: the rule counts two FLOP per parameter of norms and gate biases too."""
    spec, tokens = load_model("quickstart"), 32
    assert isinstance(spec.attention, Mla) and spec.attention.q_lora_rank and spec.moe
    model = Transformer(spec, dtype=torch.float32, dispatcher=LocalDispatcher(row_multiple=1))
    initialize(model, seed=0)
    ids = torch.arange(tokens)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = model(ids)
        model.logits(output.hidden)
        if mtp:
            model.logits(model.mtp_forward(0, output.hidden, ids).hidden)
    vectors = sum(each.numel() for each in [*model.parameters(), *model.buffers()] if each.dim() == 1)
    if not mtp:
        vectors -= sum(each.numel() for each in [*model.mtp.parameters(), *model.mtp.buffers()] if each.dim() == 1)
    counted = tokens * (count.forward_flop_per_token(spec, tokens, causal=False, mtp=mtp) - 2 * vectors)
    assert counter.get_total_flops() == counted


def test_grouped_query_attention_with_and_without_biases() -> None:
    body = {"vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 12}
    plain = Gqa(num_attention_heads=4, num_key_value_heads=2, head_dim=2)
    spec = ModelSpec(**body, attention=plain)
    assert count.attention_parameters(spec) == 8 * 8 + 2 * (8 * 4) + 8 * 8
    biased = ModelSpec(**body, attention=plain.model_copy(update={"attention_bias": True}))
    assert count.attention_parameters(biased) - count.attention_parameters(spec) == 8 + 4 + 4
