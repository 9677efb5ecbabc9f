"""Linear layers and SwiGLU feed-forwards in a recipe's precision, as autograd functions.

Forward and backward products run on quantised operands; weights stay BF16 and are quantised for each use. For the
backward pass a layer keeps its input in a small format too, a feed-forward also its SwiGLU's input, whose output is
made again [V3 §3.3.3]. Gradients come out in BF16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dovetail.numerics.formats.quantized import Quantized
from dovetail.numerics.operands.operands import (
    keep,
    quantize_and_keep,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
    retile,
)
from dovetail.numerics.products.accumulators import FP32, Accumulator, HopperAccumulator
from dovetail.numerics.products.scaled import dgrad, fprop, wgrad
from dovetail.numerics.weight_gradients import WeightGradients, now_or_later
from dovetail.spec.precision import GemmPrecision

Input = tuple[Quantized, Quantized]  # as fprop takes it, and as it is kept


class Linear(nn.Linear):
    """A linear layer without bias, in BF16 or FP32 until it is given a `precision`."""

    def __init__(self, n_in: int, n_out: int, dtype: torch.dtype) -> None:
        super().__init__(n_in, n_out, bias=False, dtype=dtype)
        self.precision: GemmPrecision | None = None
        self.later: WeightGradients | None = None

    def forward(self, x: Tensor, quantized: Input | None = None) -> Tensor:
        """`quantized`: x as `quantize_for` gave it, where several layers take it; it is kept once then."""
        if self.precision is not None:
            return quantized_linear(x, self.weight, self.precision, quantized, self.later)
        if self.later is not None:
            return _PlainLinear.apply(x, self.weight, self.later)
        return F.linear(x, self.weight)


class _PlainLinear(torch.autograd.Function):
    """What torch does for F.linear, bit for bit, with the weight's gradient apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, later: WeightGradients) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.parameter, ctx.later = weight, later
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors

        def make() -> Tensor:
            return grad.flatten(0, -2).t() @ x.flatten(0, -2)

        return grad @ weight, now_or_later(ctx.later, ctx.parameter, make), None


def quantize_for(x: Tensor, *layers: Linear) -> Input | None:
    """x [..., K] for layers of one precision; None where they are not quantised, or not alike."""
    precision = layers[0].precision
    if precision is None or any(layer.precision != precision for layer in layers):
        return None
    return operand_and_kept(x.detach().flatten(0, -2).contiguous(), precision)


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    precision: GemmPrecision,
    quantized: Input | None = None,
    later: WeightGradients | None = None,
) -> Tensor:
    """x [..., K] BF16, weight [N, K] -> [..., N]."""
    output: Tensor = _Linear.apply(x.flatten(0, -2), weight, precision, quantized, later)
    return output.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        precision: GemmPrecision,
        quantized: Input | None,
        later: WeightGradients | None,
    ) -> Tensor:
        rows, kept = quantized or operand_and_kept(x.contiguous(), precision)
        save(ctx, [kept], weight)
        ctx.precision, ctx.parameter, ctx.later = precision, weight, later
        return output_of(rows, weight[None], [0, len(x)], precision)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        (kept,), (weight,) = saved(ctx)
        grad, offsets, precision = grad.contiguous(), [0, len(grad)], ctx.precision
        grad_x = input_gradient(grad, weight[None], offsets, precision)

        def make() -> Tensor:
            return weight_gradient(grad, kept, offsets, precision)[0]

        return grad_x, now_or_later(ctx.later, ctx.parameter, make), None, None, None


def wide_linear(x: Tensor, weight: Tensor, later: WeightGradients | None = None) -> Tensor:
    """x [N, K] in any dtype, weight [M, K] in a wider one -> [N, M] in the wider one; x is kept as it is."""
    output: Tensor = _WideLinear.apply(x, weight, later)
    return output


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, later: WeightGradients | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.parameter, ctx.later = weight, later
        return F.linear(x.to(weight.dtype), weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_weight = now_or_later(ctx.later, ctx.parameter, lambda: grad.t() @ x.to(weight.dtype))
        return (grad @ weight).to(x.dtype), grad_weight, None


def operand_and_kept(x: Tensor, precision: GemmPrecision) -> Input:
    """The input as fprop takes it, and as it is kept."""
    if precision.saved_input is None:
        return quantize_and_keep(x, precision.input)
    return quantize_rows(x, precision.input), keep(x, precision.saved_input)


def output_of(rows: Quantized, weight: Tensor, offsets: Sequence[int], precision: GemmPrecision) -> Tensor:
    """Rows [R, K] as fprop takes them and stacked weights [G, N, K] -> [R, N]."""
    return fprop(rows, quantize_blocks(weight, precision.weight), offsets, accumulator_of(precision))


def input_gradient(grad: Tensor, weight: Tensor, offsets: Sequence[int], precision: GemmPrecision) -> Tensor:
    """Of grad [R, N] and stacked weights [G, N, K] -> [R, K]."""
    stacked = quantize_blocks(weight, precision.weight)
    return dgrad(quantize_rows(grad, precision.grad), stacked, offsets, accumulator_of(precision))


def weight_gradient(grad: Tensor, kept: Quantized | Tensor, offsets: Sequence[int], precision: GemmPrecision) -> Tensor:
    """Of grad [R, N] and the input [R, K], as it was kept or made again (BF16) -> [G, N, K]."""
    in_columns = retile if isinstance(kept, Quantized) else quantize_columns
    rows = in_columns(kept, offsets, precision.wgrad_input)
    return wgrad(quantize_columns(grad, offsets, precision.wgrad_grad), rows, offsets, accumulator_of(precision))


def accumulator_of(precision: GemmPrecision) -> Accumulator:
    """What adds a layer's products; FP32 by tiles of 128."""
    return FP32 if precision.accumulator == "fp32" else HopperAccumulator(precision.promotion)


def save(ctx: Any, kept: Sequence[Quantized], *tensors: Tensor) -> None:
    """Through save_for_backward, so that hooks on saved tensors see them."""
    parts = [part for each in kept for part in (each.data, each.scale)]
    ctx.save_for_backward(*parts, *tensors)
    ctx.kept = [{"tile": each.tile, "format": each.format, "columns": each.columns} for each in kept]


def saved(ctx: Any) -> tuple[list[Quantized], tuple[Tensor, ...]]:
    tensors, count = ctx.saved_tensors, len(ctx.kept)
    pairs = zip(tensors[0 : 2 * count : 2], tensors[1 : 2 * count : 2], ctx.kept, strict=True)
    return [Quantized(data=data, scale=scale, **rest) for data, scale, rest in pairs], tensors[2 * count :]
