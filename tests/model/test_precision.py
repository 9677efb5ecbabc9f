"""A recipe on a model: layers against their dequantised selves, what is kept, and wrong variants that are seen."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dovetail.catalog.precision import load_recipe
from dovetail.model.experts.mlp import DenseMlp
from dovetail.model.experts.moe import Experts
from dovetail.model.precision import apply_recipe
from dovetail.model.transformer import Transformer
from dovetail.numerics.formats.errors import normwise_error, unit_roundoff
from dovetail.numerics.formats.quantize import dequantize, quantize
from dovetail.numerics.formats.quantized import transposed
from dovetail.numerics.linear import Linear, quantized_linear
from dovetail.numerics.products.accumulators import HopperAccumulator
from dovetail.numerics.products.scaled_reference import product
from dovetail.spec.model import ModelSpec
from dovetail.spec.precision import GemmPrecision, Quantization, Recipe

Draw = Callable[..., Tensor]
SpecFactory = Callable[..., ModelSpec]
E4M3_ROUNDOFF = 2.0**-4


def gradients(function: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


@pytest.mark.parametrize("shape", [(7, 40, 24), (3, 5, 130, 300)], ids=str)
def test_a_quantised_linear_is_near_the_exact_one(shape: tuple[int, ...], draw: Draw) -> None:
    """Two operands, each wrong by a sixteenth at most, and errors that average out over a sum."""
    *batch, n_in, n_out = shape
    x, weight = draw(*batch, n_in, dtype=torch.bfloat16), draw(n_out, n_in, dtype=torch.bfloat16, scale=0.02)
    grad = draw(*batch, n_out, dtype=torch.bfloat16)
    ours = gradients(lambda x, w: quantized_linear(x, w, GemmPrecision()), [x, weight], grad)
    truth = gradients(lambda x, w: x @ w.t(), [x.double(), weight.double()], grad.double())
    for mine, right in zip(ours, truth, strict=True):
        assert mine.dtype == torch.bfloat16
        assert unit_roundoff(torch.bfloat16) < normwise_error(mine, right) < E4M3_ROUNDOFF


def test_a_linear_without_precision_is_nn_linear(draw: Draw) -> None:
    layer, x = Linear(12, 8, torch.bfloat16), draw(5, 12, dtype=torch.bfloat16)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight))


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v3.1"])
def test_a_model_trains_near_its_bf16_self(
    name: str, tiny_spec: SpecFactory, random_model: Callable[..., Transformer]
) -> None:
    everyone = {"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}  # none changes sides
    spec = tiny_spec(hidden_size=160, moe_intermediate_size=48, initializer_range=0.02, **everyone)
    tokens = torch.arange(48).view(2, 24) % 96
    results = []
    for recipe in ("bf16", name):
        model = random_model(spec, dtype=torch.bfloat16)
        apply_recipe(model, load_recipe(recipe))
        hidden = model(tokens).hidden
        hidden = hidden + model.mtp_forward(0, hidden, tokens).hidden
        hidden.float().square().mean().backward()
        grads = {key: each.grad for key, each in model.named_parameters() if each.grad is not None}
        results.append((hidden.detach(), grads))
    (plain, plain_grads), (ours, grads) = results
    assert grads.keys() == plain_grads.keys()
    assert not torch.equal(ours, plain)
    assert (ours.double() - plain.double()).norm() < 2 * E4M3_ROUNDOFF * plain.double().norm()
    for key, grad in grads.items():
        assert grad.isfinite().all(), key


@pytest.mark.parametrize("promotion", [128, None])
def test_a_layer_multiplies_as_its_accumulator_does(promotion: int | None, draw: Draw) -> None:
    """All three products of a layer with formats that differ, against the references on what it quantises."""
    e5m2 = Quantization(format="e5m2"), Quantization(format="e5m2", tile="column")
    precision = GemmPrecision(accumulator="hopper", promotion=promotion, grad=e5m2[0], wgrad_grad=e5m2[1])
    x, weight = draw(150, 300, dtype=torch.bfloat16), draw(140, 300, dtype=torch.bfloat16)
    grad = draw(150, 140, dtype=torch.bfloat16)
    ours = gradients(lambda x, w: quantized_linear(x, w, precision), [x, weight], grad)
    accumulator, dtype = HopperAccumulator(promotion), torch.bfloat16
    rows, block = quantize(x.float(), (1, 128)), quantize(weight.float(), (128, 128))
    columns = quantize(dequantize(rows), (128, 1))  # as the layer keeps its input
    grads = [quantize(grad.float(), tile, "e5m2") for tile in ((1, 128), (128, 1))]
    assert torch.equal(ours[0], product(rows, block, accumulator, dtype))
    assert torch.equal(ours[1], product(grads[0], transposed(block), accumulator, dtype))
    assert torch.equal(ours[2], product(transposed(grads[1]), transposed(columns), accumulator, dtype))
    tiles = gradients(lambda x, w: quantized_linear(x, w, GemmPrecision()), [x, weight], grad)
    assert not any(torch.equal(mine, other) for mine, other in zip(ours, tiles, strict=True))


def test_experts_and_dense_layers_agree_on_one_group(draw: Draw) -> None:
    recipe = load_recipe("deepseek-v3")
    dense, experts = DenseMlp(40, 24, torch.bfloat16), Experts(1, 40, 24, torch.bfloat16)
    for parameter in dense.parameters():
        parameter.data = draw(*parameter.shape, dtype=torch.bfloat16, scale=0.1)
    experts.gate_up_proj.data, experts.down_proj.data = (each.data[None] for each in dense.parameters())
    apply_recipe(torch.nn.ModuleList([dense, experts]), recipe.model_copy(update={"sites": same_sites(recipe)}))
    x = draw(30, 40, dtype=torch.bfloat16)
    assert torch.equal(dense(x), experts(x, [0, 30]))


def same_sites(recipe: Recipe) -> dict[str, GemmPrecision]:
    return {"mlp_up": GemmPrecision(), "mlp_down": GemmPrecision()} | {
        "expert_up": GemmPrecision(),
        "expert_down": GemmPrecision(),
    }


def test_a_recipe_that_cannot_run_is_refused(tiny_spec: SpecFactory) -> None:
    recipe = load_recipe("deepseek-v3")
    with pytest.raises(ValueError, match="use dtype bfloat16"):
        apply_recipe(Transformer(tiny_spec(), dtype=torch.float32), recipe)
    model = Transformer(tiny_spec(), dtype=torch.bfloat16)
    half = recipe.model_copy(update={"sites": {"expert_up": GemmPrecision()}})
    with pytest.raises(ValueError, match="expert_up and expert_down"):
        apply_recipe(model, half)
    with pytest.raises(ValueError, match="did you mean deepseek-v3"):
        load_recipe("deepseek-v33")


@pytest.mark.parametrize("promotion", [None, 256])
def test_only_a_tensor_core_is_promoted_otherwise(promotion: int | None) -> None:
    assert GemmPrecision(accumulator="hopper", promotion=promotion).promotion == promotion
    words = f'promotion = {promotion or "never"} with accumulator fp32.*accumulator = "hopper"'
    with pytest.raises(ValueError, match=words):
        GemmPrecision(promotion=promotion)
    with pytest.raises(ValueError, match="multiple of 32"):
        GemmPrecision(accumulator="hopper", promotion=48)


def test_tiles_that_do_not_lie_along_k_are_refused() -> None:
    with pytest.raises(ValueError, match="k runs along the row"):
        GemmPrecision(input=Quantization(tile="column"))
    with pytest.raises(ValueError, match="k runs along the tokens"):
        GemmPrecision(wgrad_grad=Quantization(tile="row"))
    with pytest.raises(ValueError, match="used along both sides"):
        GemmPrecision(weight=Quantization(tile="row"))
