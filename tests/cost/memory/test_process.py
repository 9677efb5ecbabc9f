"""Memory predictions against what our own model holds; what it keeps for its backward pass: test_activations."""

import pytest
import torch

from dovetail.catalog.precision import load_recipe
from dovetail.catalog.presets import load_model
from dovetail.cost.memory import process
from dovetail.cost.memory.activations import microbatch_bytes
from dovetail.model.transformer import Transformer

QUICKSTART = load_model("quickstart")


def test_weight_bytes_are_those_of_the_model() -> None:
    with torch.device("meta"):
        model = Transformer(QUICKSTART)
    assert process.weight_bytes(QUICKSTART) == sum(each.nbytes for each in [*model.parameters(), *model.buffers()])


def test_training_state_per_parameter() -> None:
    with torch.device("meta"):
        model = Transformer(QUICKSTART)
    trained = sum(each.numel() for each in model.parameters())
    narrow = sum(each.numel() for each in model.parameters() if each.dtype == torch.bfloat16)
    held = process.training_memory(QUICKSTART, tokens=2048)
    assert held.master_weights == 4 * narrow
    assert held.gradients == held.moments == held.moving_average == 4 * trained
    assert held.state == held.weights + 4 * narrow + 12 * trained
    assert process.training_memory(QUICKSTART, 2048, recipe=load_recipe("bf16-fp32-moments")).moments == 8 * trained
    lean = process.training_memory(QUICKSTART, tokens=2048, moving_average=False, gradient_bytes=2)
    assert (lean.moving_average, lean.gradients) == (0, 2 * trained)


def test_activations_are_those_of_the_recipe_and_one_chunk_of_logits() -> None:
    for recipe in (load_recipe("bf16"), load_recipe("deepseek-v3")):
        held = process.training_memory(QUICKSTART, tokens=2048, recipe=recipe)
        saved = sum(microbatch_bytes(QUICKSTART, 1, 2048, recipe).values())
        assert held.activations == saved + 2 * 2048 * QUICKSTART.vocab_size
        chunked = process.training_memory(QUICKSTART, tokens=2048, recipe=recipe, loss_chunk=1000)
        assert chunked.activations == saved + 2 * 1000


def test_recompute_leaves_out_norms_and_up_projections_and_the_band_holds_the_estimate() -> None:
    full = process.training_memory(QUICKSTART, tokens=2048)
    lean = process.training_memory(QUICKSTART, tokens=2048, recompute=True)
    per_layer = 2 * 192 + 96 + 64 + 3 * (96 + 96 + 64)  # results of two norms of H, two of the ranks; q, k, v
    per_layer -= 32  # the rotated key, which makes k again
    assert lean.state == full.state
    mtp_tokens, joined = 2047, 2 * 192
    assert full.activations - lean.activations == 2 * (4 * 2048 * per_layer + mtp_tokens * (per_layer + joined))
    low, high = full.band
    assert full.state < low < full.total < high


def test_generation_is_weights_and_cache() -> None:
    held = process.generation_memory(QUICKSTART, batch=8, context=1024)
    assert held.cache == 8 * 1024 * 4 * 96 * 2
    assert process.generation_memory(QUICKSTART, 8, 1024, mtp=True).cache == 8 * 1024 * 5 * 96 * 2
    assert held.total == held.cache + process.weight_bytes(QUICKSTART)


def test_grouped_query_models_are_only_counted() -> None:
    with pytest.raises(ValueError, match="grouped-query attention"):
        process.training_memory(load_model("qwen2.5-72b"), tokens=1)
