"""The measured step: nothing is left behind, parameters are not counted, padding is."""

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dovetail.cost.count import training_flop_per_token
from dovetail.cost.memory.activations import microbatch_bytes
from dovetail.model.experts.moe import LocalDispatcher
from dovetail.model.transformer import Block, Transformer, initialize
from dovetail.numerics import capability
from dovetail.spec.model import ModelSpec
from dovetail.train.run.footprint import counting_saved, measure_step

SpecFactory = Callable[..., ModelSpec]


def build(spec: ModelSpec, row_multiple: int = 1, recompute: bool = False) -> Transformer:
    model = Transformer(spec, dispatcher=LocalDispatcher(row_multiple=row_multiple), recompute=recompute)
    initialize(model, seed=0)
    return model


def test_a_measured_step_leaves_no_gradients_and_no_hooks(tiny_spec: SpecFactory) -> None:
    model = build(tiny_spec())
    first, second = (measure_step(model, length=8, batch_size=2) for _ in range(2))
    assert first == second
    assert first.saved_bytes == sum(microbatch_bytes(tiny_spec(), 2, 8).values())
    assert first.gradient_bytes == sum(each.nbytes for each in model.parameters())
    assert all(each.grad is None for each in model.parameters())
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in [model.embed_tokens, *blocks])


def test_padded_expert_rows_are_seen_in_the_layers_that_have_experts(tiny_spec: SpecFactory) -> None:
    predicted = microbatch_bytes(tiny_spec(), 2, 8)
    measured = measure_step(build(tiny_spec(), row_multiple=64), length=8, batch_size=2).saved
    assert {part for part, size in measured.items() if size > predicted[part]} == {"layer 1", "layer 2", "mtp 0"}
    assert {part for part, size in measured.items() if size < predicted[part]} == set()


def test_memory_that_is_given_back_before_the_backward_pass_does_not_count(tiny_spec: SpecFactory) -> None:
    model = build(tiny_spec())
    weight = torch.nn.Parameter(torch.ones(3))
    with counting_saved(model) as ledger:
        kept = (weight * 2).square()
        dropped = (weight * 3).square()
        assert ledger.by_part() == {"ends": 2 * 12}
        del dropped
    assert ledger.by_part() == {"ends": 12}
    assert kept.grad_fn is not None


def test_a_model_that_recomputes_cannot_be_counted_so(tiny_spec: SpecFactory) -> None:
    with pytest.raises(ValueError, match="recompute = true"):
        measure_step(build(tiny_spec(), recompute=True), length=8, batch_size=2)


def test_all_products_are_counted_whatever_runs_them(
    tiny_spec: Callable[..., ModelSpec], random_model: Callable[..., Transformer]
) -> None:
    model, length = random_model(tiny_spec(), dtype=torch.bfloat16), 64
    predicted = training_flop_per_token(model.spec, length, causal=False, mtp=True)
    measured = measure_step(model, length, 2).flop_per_token
    assert measured == measure_step(model.float(), length, 2).flop_per_token
    # Scores are made again in the backward pass; an MTP module has a position less than the rule gives it.
    assert predicted < measured < 1.05 * predicted
    assert all(each.grad is None for each in model.parameters())


@pytest.mark.skipif(not capability.has_bf16_instructions(), reason="needs AVX-512 BF16")
def test_torch_does_not_see_our_kernels(
    tiny_spec: Callable[..., ModelSpec], random_model: Callable[..., Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is why FLOP are not counted on the BF16 step itself."""
    monkeypatch.setattr(capability, "has_amx", lambda: False)
    counts = []
    for dtype in (torch.bfloat16, torch.float32):
        model = random_model(tiny_spec(), dtype=dtype)
        with FlopCounterMode(display=False) as counter:
            model(torch.arange(64)[None])
        counts.append(counter.get_total_flops())
    assert counts[0] < 0.8 * counts[1]
