"""What each layer keeps for its backward pass: predicted, counted in the graph, and seen to be alive."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dovetail.catalog.precision import load_recipe
from dovetail.catalog.presets import load_model
from dovetail.cost.memory.activations import microbatch_bytes, saved_by_layer, saved_by_part
from dovetail.model.experts.moe import LocalDispatcher
from dovetail.model.precision import apply_recipe
from dovetail.model.transformer import Transformer, initialize
from dovetail.numerics import capability
from dovetail.spec.model import ModelSpec
from dovetail.spec.precision import GemmPrecision, Quantization, Recipe
from dovetail.train.run.footprint import counting_saved, random_batch
from dovetail.train.step.losses import compute_losses

SpecFactory = Callable[..., ModelSpec]
SEQUENCES, LENGTH = 2, 12
ONE_LAYER = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
SOFTMAX = {"scoring_func": "softmax", "topk_method": "greedy", "n_group": 1, "topk_group": 1, "norm_topk_prob": False}
SPECS: dict[str, dict[str, object]] = {
    "tiny": {},
    "queries not compressed": {"q_lora_rank": None},
    "experts everywhere, two shared": {"first_k_dense_replace": 0, "n_shared_experts": 2},
    "dense and MTP": {"moe": None},
    "one layer, no MTP, tied": {**ONE_LAYER, "tie_word_embeddings": True},
    "two MTP modules, none shared": {"num_nextn_predict_layers": 2, "n_shared_experts": 0},
    "softmax gate": SOFTMAX,
    "ragged tiles": {"hidden_size": 136, "v_head_dim": 18, "intermediate_size": 72, "moe_intermediate_size": 72},
}
ONLY_ATTENTION = Recipe(
    name="attention",
    source="made up",
    sites={
        "attention_down": GemmPrecision(input=Quantization(tile="tensor")),
        "attention_up": GemmPrecision(input=Quantization(format="e5m2"), saved_input=Quantization(format="e3m4")),
    },
)
BF16_SWIGLU = Recipe(
    name="mlp",
    source="made up",
    sites={"mlp_up": GemmPrecision(), "mlp_down": GemmPrecision()},
    expert_output="e4m3",  # sent so, and kept in BF16
)
RECIPES = [*map(load_recipe, ("bf16", "deepseek-v3")), ONLY_ATTENTION, BF16_SWIGLU]


def changed(tiny_spec: SpecFactory, changes: dict[str, object]) -> ModelSpec:
    return tiny_spec().model_copy(update=changes) if "moe" in changes else tiny_spec(**changes)


def build(spec: ModelSpec, recipe: Recipe, recompute: bool = False) -> Transformer:
    """One row per choice of an expert: nothing is padded."""
    model = Transformer(spec, dispatcher=LocalDispatcher(row_multiple=1), recompute=recompute)
    initialize(model, seed=0)
    apply_recipe(model, recipe)
    return model


def counted(model: Transformer) -> dict[str, int]:
    with counting_saved(model) as ledger:
        losses = compute_losses(model, random_batch(model, LENGTH, SEQUENCES), separate_documents=False)
    by_part = ledger.by_part()
    losses.token.backward()  # the graph has lived until here
    return by_part


class Survivors(TorchDispatchMode):
    """All memory that tensors were made in, to see which of it is still there, whoever holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self.sizes.setdefault(StorageWeakRef(each.untyped_storage()), each.untyped_storage().nbytes())
        return result

    def alive(self, *but: Tensor) -> int:
        leave = {StorageWeakRef(each.untyped_storage()) for each in but}
        return sum(size for key, size in self.sizes.items() if not key.expired() and key not in leave)


def surviving(model: Transformer) -> int:
    batch = random_batch(model, LENGTH, SEQUENCES)
    with Survivors() as survivors:
        losses = compute_losses(model, batch, separate_documents=False)
    before = [batch.tokens, batch.document_ids, *model.parameters(), *model.buffers()]  # some results are views of them
    return survivors.alive(*before, losses.token, *losses.mtp, losses.plain, losses.balance, *losses.counts)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("changes", SPECS.values(), ids=SPECS)
def test_every_part_keeps_what_is_predicted_to_the_byte(
    changes: dict[str, object], recipe: Recipe, tiny_spec: SpecFactory
) -> None:
    spec = changed(tiny_spec, changes)
    model = build(spec, recipe)
    predicted = microbatch_bytes(spec, SEQUENCES, LENGTH, recipe)
    assert counted(model) == predicted
    assert surviving(model) == sum(predicted.values())  # no one holds memory that the graph does not show


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("changes", SPECS.values(), ids=SPECS)
def test_recompute_leaves_what_is_predicted_to_the_byte(
    changes: dict[str, object], recipe: Recipe, tiny_spec: SpecFactory
) -> None:
    spec = changed(tiny_spec, changes)
    model = build(spec, recipe, recompute=True)
    assert surviving(model) == sum(microbatch_bytes(spec, SEQUENCES, LENGTH, recipe, recompute=True).values())


def test_the_other_attention_kernel_keeps_the_same(monkeypatch: pytest.MonkeyPatch, tiny_spec: SpecFactory) -> None:
    monkeypatch.setattr(capability, "on_bf16_cpu", lambda *tensors: False)
    recipe = load_recipe("deepseek-v3")
    assert counted(build(tiny_spec(), recipe)) == microbatch_bytes(tiny_spec(), SEQUENCES, LENGTH, recipe)


def test_a_layer_in_another_precision_and_a_tensor_kept_too_many_are_seen(tiny_spec: SpecFactory) -> None:
    spec, recipe = tiny_spec(), load_recipe("deepseek-v3")
    predicted = microbatch_bytes(spec, SEQUENCES, LENGTH, recipe)
    model = build(spec, recipe)
    model.layers["1"].self_attn.o_proj.precision = None
    found = counted(model)
    assert {part for part, size in found.items() if size != predicted[part]} == {"layer 1"}
    codes, plain = 32 // 8 * 12 + 4, 32 * 2  # heads are 2 of 16
    assert found["layer 1"] - predicted["layer 1"] == SEQUENCES * LENGTH * (plain - codes)
    model = build(spec, recipe)
    model.layers["2"].mlp.shared_experts.register_forward_pre_hook(lambda module, inputs: ((inputs[0] * 2).square(),))
    too_many = counted(model)["layer 2"] - predicted["layer 2"]
    assert too_many == SEQUENCES * LENGTH * 2 * spec.hidden_size


def test_the_paper_s_recipe_keeps_codes_and_scales() -> None:
    """By hand, for one layer of the quickstart model: 192 wide, 3 heads of 64 and 96, ranks 64 and 96, 4 of 16."""
    spec = load_model("quickstart")
    bf16, fp8 = (
        {tensor.name: tensor for tensor in saved_by_layer(spec, 1, load_recipe(name)) if "input" in tensor.name}
        for name in ("bf16", "deepseek-v3")
    )
    assert bf16["o_proj input"].bytes == 192 * 2
    assert (fp8["o_proj input"].format, fp8["o_proj input"].bytes) == ("e5m6", 192 // 2 * 3 + 2 * 4)
    assert bf16["kv_a_proj and q_a_proj input"].bytes == 192 * 2
    assert fp8["kv_a_proj and q_a_proj input"].bytes == 192 + 2 * 4
    assert bf16["experts swiglu input"].bytes == 4 * 2 * 64 * 2
    assert fp8["experts swiglu input"].bytes == 4 * (2 * 64 + 4)
    assert fp8["gate input"].bytes == bf16["gate, shared experts input"].bytes == 192 * 2
    assert fp8["attention norm input"] == bf16["attention norm input"]


def test_quickstart_bytes_per_token_and_layer() -> None:
    parts = {name: saved_by_part(load_model("quickstart"), load_recipe(name)) for name in ("bf16", "deepseek-v3")}
    table = [(a.name, a.bytes, b.bytes) for a, b in zip(*parts.values(), strict=True)]
    assert table == [
        ("ends", 524, 524),
        ("layer 0", 6176, 4576),
        ("layer 1", 8676, 7096),
        ("layer 2", 8676, 7096),
        ("layer 3", 8676, 7096),
        ("mtp 0", 10744, 8792),
    ]
