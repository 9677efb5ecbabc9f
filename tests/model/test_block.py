"""A block by its four parts is the block, bit for bit, also where the graph is cut between them."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from dovetail.catalog.precision import load_recipe
from dovetail.model.block import Block
from dovetail.model.experts.gate import Routing
from dovetail.model.experts.moe import Dispatched, LocalDispatcher, gather_reference
from dovetail.model.precision import apply_recipe
from dovetail.model.transformer import Transformer
from dovetail.numerics.linear import operand_and_kept
from dovetail.spec.model import ModelSpec

SpecFactory = Callable[..., ModelSpec]
Draw = Callable[..., Tensor]
Build = Callable[..., Transformer]


@dataclass
class Cut:
    """Records whose tensors are leaves of a new graph, and the tensors that they were cut off from."""

    before: list[Tensor] = field(default_factory=list)
    after: list[Tensor] = field(default_factory=list)

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.requires_grad:
            self.before.append(value)
            self.after.append(value.detach().requires_grad_())
            return self.after[-1]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            parts = {each.name: self(getattr(value, each.name)) for each in dataclasses.fields(value)}
            return dataclasses.replace(value, **parts)
        return value

    def backward(self) -> None:
        pairs = [(x, y.grad) for x, y in zip(self.before, self.after, strict=True) if y.grad is not None]
        torch.autograd.backward([x for x, _ in pairs], [grad for _, grad in pairs])


def run_whole(block: Block, model: Transformer, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    output, _ = block(x, model.context(torch.zeros(x.shape[:2]), None, None, None, False), model.dispatcher)
    output.backward(grad)
    return [output, x.grad, *take_gradients(block)]


def run_in_parts(block: Block, model: Transformer, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    context = model.context(torch.zeros(x.shape[:2]), None, None, None, False)
    cuts = [Cut(), Cut(), Cut()]
    attended = cuts[0](block.attend(x, context))
    dispatched = cuts[1](block.dispatch(attended, model.dispatcher))
    computed = cuts[2](block.compute(attended, dispatched))
    output = block.combine(attended, dispatched, computed, model.dispatcher)
    output.backward(grad)
    for cut in reversed(cuts):
        cut.backward()
    return [output, x.grad, *take_gradients(block)]


def take_gradients(block: Block) -> list[Tensor]:
    gradients = [parameter.grad for parameter in block.parameters()]
    block.zero_grad()
    return gradients


@pytest.mark.parametrize("recipe", ["fp32", "bf16", "deepseek-v3"])
@pytest.mark.parametrize("layer", ["0", "1"], ids=["dense", "experts"])
def test_parts_are_the_block(layer: str, recipe: str, tiny_spec: SpecFactory, random_model: Build, draw: Draw) -> None:
    dtype = torch.float32 if recipe == "fp32" else torch.bfloat16
    model = random_model(tiny_spec(), dtype)
    if recipe == "deepseek-v3":
        apply_recipe(model, load_recipe(recipe))
    x, grad = (draw(2, 9, 32, dtype=dtype) for _ in range(2))
    whole, parts = (run(model.layers[layer], model, x, grad) for run in (run_whole, run_in_parts))
    for ours, theirs in zip(parts, whole, strict=True):
        assert torch.equal(ours, theirs)


def test_without_its_exchange_a_block_is_another(tiny_spec: SpecFactory, random_model: Build, draw: Draw) -> None:
    """The wrong variant: the gradient of dispatch is dropped, as by a schedule that forgets to send it back."""
    model = random_model(tiny_spec())
    block, x = model.layers["1"], draw(1, 9, 32).requires_grad_()
    attended = block.attend(x, model.context(torch.zeros(1, 9), None, None, None, False))
    cut = Cut()
    dispatched = cut(block.dispatch(attended, model.dispatcher))
    computed = block.compute(attended, dispatched)
    block.combine(attended, dispatched, computed, model.dispatcher).sum().backward()
    without = x.grad.clone()
    x.grad = None
    block(x, model.context(torch.zeros(1, 9), None, None, None, False), model.dispatcher)[0].sum().backward()
    assert not torch.allclose(without, x.grad)


class QuantisingDispatcher:
    """Sends each token once in the recipe's format: what lies in `rows` is worth nothing but for its gradient."""

    def __init__(self, precision: Any) -> None:
        self.local, self.precision = LocalDispatcher(row_multiple=1), precision

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        plain = self.local.dispatch(x, routing)
        sent, kept = operand_and_kept(x.detach(), self.precision)
        token_ids = plain.way_back.token_ids
        arrived = [
            dataclasses.replace(each, data=each.data[token_ids], scale=each.scale[token_ids]) for each in (sent, kept)
        ]
        noise = plain.rows + (torch.rand_like(plain.rows) - plain.rows).detach()
        return dataclasses.replace(plain, rows=noise, quantized=tuple(arrived))

    def combine(self, rows: Tensor, dispatched: Dispatched, routing: Routing) -> Tensor:
        return self.local.combine(rows, dispatched, routing)


def test_experts_take_rows_that_came_quantised(tiny_spec: SpecFactory, random_model: Build, draw: Draw) -> None:
    """Quantising a token before it is copied to its experts' rows is quantising the rows, bit for bit."""
    model = random_model(tiny_spec(), torch.bfloat16)
    apply_recipe(model, load_recipe("deepseek-v3"))
    block = model.layers["1"]
    x, grad = (draw(2, 9, 32, dtype=torch.bfloat16) for _ in range(2))
    model.dispatcher = LocalDispatcher(row_multiple=1)
    plain = run_whole(block, model, x, grad)
    model.dispatcher = QuantisingDispatcher(block.mlp.experts.precision.up)
    for ours, theirs in zip(run_whole(block, model, x, grad), plain, strict=True):
        assert torch.equal(ours, theirs)


def test_gather_repeats_rows(draw: Draw) -> None:
    x = draw(4, 3)
    assert torch.equal(gather_reference(x, torch.tensor([2, -1, 2])), torch.stack((x[2], torch.zeros(3), x[2])))
