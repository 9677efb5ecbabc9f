"""Memory predictions against what our own model holds and keeps."""

import pytest
import torch

from dovetail.catalog.presets import load_model
from dovetail.cost import memory
from dovetail.model.moe import LocalDispatcher
from dovetail.model.transformer import Transformer, initialize

QUICKSTART = load_model("quickstart")


def test_weight_bytes_are_those_of_the_model() -> None:
    with torch.device("meta"):
        model = Transformer(QUICKSTART)
    assert memory.weight_bytes(QUICKSTART) == sum(each.nbytes for each in [*model.parameters(), *model.buffers()])


def test_training_state_per_parameter() -> None:
    with torch.device("meta"):
        model = Transformer(QUICKSTART)
    trained = sum(each.numel() for each in model.parameters())
    narrow = sum(each.numel() for each in model.parameters() if each.dtype == torch.bfloat16)
    held = memory.training_memory(QUICKSTART, tokens=2048)
    assert held.master_weights == 4 * narrow
    assert held.gradients == held.moments == held.moving_average == 4 * trained
    assert held.state == held.weights + 4 * narrow + 12 * trained
    lean = memory.training_memory(QUICKSTART, tokens=2048, moving_average=False, gradient_bytes=2)
    assert (lean.moving_average, lean.gradients) == (0, 2 * trained)


@pytest.mark.parametrize("has_query_rank", [True, False])
@pytest.mark.parametrize("has_experts", [True, False])
def test_activations_are_what_the_model_keeps_for_its_backward_pass(has_query_rank: bool, has_experts: bool) -> None:
    spec = QUICKSTART if has_experts else QUICKSTART.model_copy(update={"moe": None})
    if not has_query_rank:
        attention = spec.attention.model_copy(update={"q_lora_rank": None})
        spec = spec.model_copy(update={"attention": attention})
    model = Transformer(spec, dispatcher=LocalDispatcher(row_multiple=1))
    initialize(model, seed=0)
    tokens = torch.randint(0, spec.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    ours = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(tokens)
        model.mtp_forward(0, output.hidden, tokens)
    expected = tokens.numel() * memory.activation_bytes_per_token(spec)
    assert sum(kept.values()) == pytest.approx(expected, rel=0.05)


def test_recompute_leaves_out_norms_and_up_projections_and_the_band_holds_the_estimate() -> None:
    full = memory.training_memory(QUICKSTART, tokens=2048)
    lean = memory.training_memory(QUICKSTART, tokens=2048, recompute=True)
    per_layer = 2 * 192 + 96 + 64 + 3 * (96 + 96 + 64)  # two norms of H, two of the ranks; q, k, v
    assert lean.state == full.state
    assert full.activations - lean.activations == 2048 * 5 * per_layer * 2
    low, high = full.band
    assert full.state < low < full.total < high


def test_generation_is_weights_and_cache() -> None:
    held = memory.generation_memory(QUICKSTART, batch=8, context=1024)
    assert held.cache == 8 * 1024 * 4 * 96 * 2
    assert memory.generation_memory(QUICKSTART, 8, 1024, mtp=True).cache == 8 * 1024 * 5 * 96 * 2
    assert held.total == held.cache + memory.weight_bytes(QUICKSTART)


def test_grouped_query_models_are_only_counted() -> None:
    with pytest.raises(ValueError, match="grouped-query attention"):
        memory.training_memory(load_model("qwen2.5-72b"), tokens=1)
