"""Putting weight gradients off changes when they are made, and no bit of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dovetail.catalog.precision import load_recipe
from dovetail.model.precision import apply_recipe
from dovetail.model.transformer import Transformer
from dovetail.numerics.weight_gradients import WeightGradients
from dovetail.spec.model import ModelSpec

SpecFactory = Callable[..., ModelSpec]
Build = Callable[..., Transformer]


def loss_of(model: Transformer, tokens: Tensor) -> Tensor:
    hidden = model(tokens).hidden
    drafted = model.mtp_forward(0, hidden, tokens.roll(-1, 1)).hidden
    return hidden.float().square().mean() + drafted.float().mean()


def gradients(model: Transformer) -> dict[str, Tensor]:
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("recipe", ["fp32", "bf16", "deepseek-v3", "v3-hopper"])
def test_later_is_now(recipe: str, recompute: bool, tiny_spec: SpecFactory, random_model: Build) -> None:
    model = random_model(tiny_spec(), torch.float32 if recipe == "fp32" else torch.bfloat16)
    model.recompute = recompute
    if recipe not in ("fp32", "bf16"):
        apply_recipe(model, load_recipe(recipe))
    tokens = torch.arange(26).view(2, 13) % 96
    loss_of(model, tokens).backward()
    now = gradients(model)

    later = WeightGradients()
    model.put_off_weight_gradients(later)
    loss_of(model, tokens).backward()
    at_once = {name for name, each in model.named_parameters() if each.grad is not None}
    assert at_once == {name for name in now if "norm" in name or name == "embed_tokens.weight"}
    later.make()
    found = gradients(model)
    assert found.keys() == now.keys()
    assert all(torch.equal(found[name], now[name]) for name in now)
    assert len(later) == 0

    model.put_off_weight_gradients(None)
    loss_of(model, tokens).backward()
    assert all(torch.equal(each, now[name]) for name, each in gradients(model).items())


def test_micro_batches_are_kept_apart(tiny_spec: SpecFactory, random_model: Build) -> None:
    """The input half of the second runs before the weight half of the first; gradients add up as they do in order."""
    model = random_model(tiny_spec())
    first, second = torch.arange(8).view(1, 8), torch.arange(40, 48).view(1, 8)
    for tokens in (first, second):
        loss_of(model, tokens).backward()
    expected = gradients(model)
    later = WeightGradients()
    model.put_off_weight_gradients(later)
    loss_of(model, first).backward()
    of_first = later.take()
    loss_of(model, second).backward()
    of_first.make()
    incomplete = model.layers["0"].self_attn.o_proj.weight.grad.clone()
    later.make()
    found = gradients(model)
    assert not torch.equal(incomplete, found["layers.0.self_attn.o_proj.weight"])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
