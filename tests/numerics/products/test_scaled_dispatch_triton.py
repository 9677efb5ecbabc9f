"""Products of quantised layers on a GPU against those of a CPU on the same operands, and a whole layer both ways."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dovetail.numerics.formats.errors import rowwise_error, tolerance
from dovetail.numerics.linear import Linear
from dovetail.numerics.operands.operands import quantize_blocks, quantize_columns, quantize_rows
from dovetail.numerics.products.scaled import dgrad, fprop, wgrad
from dovetail.spec.precision import BLOCK, COLUMN, ROW, GemmPrecision, Quantization

pytest.importorskip("triton", reason="Triton is published for Linux only")

Draw = Callable[..., Tensor]
OFFSETS = [[0, 0, 0, 0], [0, 5, 5, 6], [0, 130, 130, 171]]
WIDTHS = [(8, 8), (130, 70), (257, 200)]  # inputs, outputs


def products(
    rows: Tensor, grad: Tensor, weight: Tensor, offsets: list[int], rules: tuple[Quantization, ...] = (ROW, COLUMN)
) -> list[Tensor]:
    row, column = rules
    stored = quantize_blocks(weight, BLOCK)
    return [
        fprop(quantize_rows(rows, row), stored, offsets),
        dgrad(quantize_rows(grad, row), stored, offsets),
        wgrad(quantize_columns(grad, offsets, column), quantize_columns(rows, offsets, column), offsets),
    ]


def draws(draw: Draw, offsets: list[int], widths: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, one of them zero, gradient, weights."""
    inputs, outputs = widths
    groups = len(offsets) - 1
    rows = draw(offsets[-1], inputs, dtype=torch.bfloat16)
    rows[3:4] = 0
    return (
        rows,
        draw(offsets[-1], outputs, dtype=torch.bfloat16, scale=1e-3),
        draw(groups, outputs, inputs, dtype=torch.bfloat16, scale=0.02),
    )


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_products_are_those_of_a_cpu_but_for_their_sums(
    offsets: list[int], widths: tuple[int, int], draw: Draw, with_triton: Callable[[], object]
) -> None:
    parts = draws(draw, offsets, widths)
    expected = products(*parts, offsets)
    with with_triton() as device:
        ours = products(*(part.to(device) for part in parts), offsets)
    for mine, cpu, terms in zip(ours, expected, (*widths, offsets[-1] + 1), strict=True):
        assert mine.dtype == torch.bfloat16 and mine.shape == cpu.shape
        # one rounding and one sum on either side
        assert rowwise_error(mine.cpu().flatten(0, -2), cpu.flatten(0, -2)) < 2 * allowed(terms)
    empty = [g for g in range(3) if offsets[g] == offsets[g + 1]]
    assert not ours[2][empty].any()


def allowed(terms: int) -> float:
    """On Hopper a sum keeps 13 fraction bits of its largest term."""
    share = tolerance(torch.bfloat16, terms=terms)
    return share if not torch.cuda.is_available() else share + 2.0**-12


def test_operands_of_another_expert_s_scales_would_be_seen(draw: Draw) -> None:
    """The bound above is tight enough to tell one tile's scale from the next."""
    offsets, (inputs, outputs) = [0, 130, 130, 171], (257, 200)
    rows, _, weight = draws(draw, offsets, (inputs, outputs))
    rows[:, 128:] *= 3
    operand, stored = quantize_rows(rows, ROW), quantize_blocks(weight, BLOCK)
    wrong = replace(operand, scale=operand.scale.roll(1, 1))
    right = fprop(operand, stored, offsets)
    assert rowwise_error(fprop(wrong, stored, offsets), right) > 2 * allowed(inputs)


@pytest.mark.parametrize("format", ["e5m2", "e5m6"])
def test_mixed_formats(format: str, draw: Draw, with_triton: Callable[[], object]) -> None:
    """E5M2 beside E4M3 in one product; what has more bits than FP8 goes tile by tile."""
    offsets, widths = [0, 5, 5, 9], (130, 70)
    parts = draws(draw, offsets, widths)
    rules = (Quantization(format=format), Quantization(format=format, tile="column"))
    expected = products(*parts, offsets, rules)
    with with_triton() as device:
        ours = products(*(part.to(device) for part in parts), offsets, rules)
    for mine, cpu, terms in zip(ours, expected, (*widths, 9), strict=True):
        assert rowwise_error(mine.cpu().flatten(0, -2), cpu.flatten(0, -2)) < 2 * allowed(terms)


SAVED = Quantization(format="e5m6", power_of_two=True)
PRECISIONS = {"plain": GemmPrecision(), "kept in E5M6": GemmPrecision(saved_input=SAVED)}


def run(layer: Linear, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    layer.weight.grad = None
    output = layer(x)
    output.backward(grad)
    assert x.grad is not None and layer.weight.grad is not None
    return [each.detach().cpu().flatten(0, -2) for each in (output, x.grad, layer.weight.grad)]


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("tokens", [1, 150])
def test_a_layer_forward_and_backward(
    tokens: int, precision: GemmPrecision, draw: Draw, with_triton: Callable[[], object]
) -> None:
    layer = Linear(200, 72, torch.bfloat16)
    layer.precision = precision
    x, grad = draw(1, tokens, 200, dtype=torch.bfloat16), draw(1, tokens, 72, dtype=torch.bfloat16, scale=1e-3)
    x[:, 7:9] = 0
    with torch.no_grad():
        layer.weight.copy_(draw(72, 200, scale=0.05))
    expected = run(layer, x, grad)
    with with_triton() as device:
        ours = run(layer.to(device), x.to(device), grad.to(device))
    for mine, cpu, terms in zip(ours, expected, (200, 72, tokens), strict=True):
        assert rowwise_error(mine, cpu) < 2 * allowed(terms)
