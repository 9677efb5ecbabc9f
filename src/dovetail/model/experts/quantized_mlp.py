"""Up, SwiGLU and down in a recipe's precision, for dense layers and for all experts.

SwiGLU and quantisation are two steps on a GPU too. One kernel for both would round the exponential otherwise than torch
does, and the backward pass needs column tiles that begin anew with every group of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.model.experts.swiglu import swiglu, swiglu_backward
from dovetail.numerics.formats.quantize import dequantize
from dovetail.numerics.linear import Input, input_gradient, operand_and_kept, output_of, save, saved, weight_gradient
from dovetail.numerics.operands.operands import keep, quantize_rows
from dovetail.numerics.weight_gradients import WeightGradients, now_or_later
from dovetail.spec.precision import GemmPrecision, Quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpPrecision:
    up: GemmPrecision
    down: GemmPrecision
    saved_swiglu: Quantization | None  # how the SwiGLU's input is kept; None: in BF16


def quantized_mlp(
    rows: Tensor,
    gate_up: Tensor,
    down: Tensor,
    offsets: Sequence[int],
    precision: MlpPrecision,
    quantized: Input | None = None,
    later: WeightGradients | None = None,
) -> Tensor:
    """rows [R, K] sorted by group, gate_up [G, 2I, K], down [G, K, I] -> [R, K]; of a single group also [2I, K], [K,
    I]. `quantized`: the rows as the recipe's input, where they are that already; `rows` then only carries their
    gradient."""
    output: Tensor = _Mlp.apply(rows, gate_up, down, offsets, precision, quantized, later)
    return output


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        gate_up: Tensor,
        down: Tensor,
        offsets: Sequence[int],
        precision: MlpPrecision,
        quantized: Input | None,
        later: WeightGradients | None,
    ) -> Tensor:
        operand, kept_rows = quantized or operand_and_kept(rows.contiguous(), precision.up)
        hidden = output_of(operand, _stacked(gate_up), offsets, precision.up)
        output = output_of(quantize_rows(swiglu(hidden), precision.down.input), _stacked(down), offsets, precision.down)
        if precision.saved_swiglu is None:
            save(ctx, [kept_rows], gate_up, down, hidden)
        else:
            save(ctx, [kept_rows, keep(hidden, precision.saved_swiglu)], gate_up, down)
        ctx.offsets, ctx.precision = offsets, precision
        ctx.parameters, ctx.later = (gate_up, down), later
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, (gate_up, down, *rest) = saved(ctx)
        hidden = rest[0] if rest else dequantize(kept[1], torch.bfloat16)
        precision, offsets, grad = ctx.precision, ctx.offsets, grad.contiguous()

        def make_down() -> Tensor:
            # The output is made again as the forward pass made it: the one that comes beside the gradient is grouped
            # otherwise, and differs in the last bit of one value in 100,000.
            return weight_gradient(grad, swiglu(hidden), offsets, precision.down).view_as(down)

        grad_down = now_or_later(ctx.later, ctx.parameters[1], make_down)
        grad_hidden, _ = swiglu_backward(input_gradient(grad, _stacked(down), offsets, precision.down), hidden)

        def make_gate_up() -> Tensor:
            return weight_gradient(grad_hidden, kept[0], offsets, precision.up).view_as(gate_up)

        grad_gate_up = now_or_later(ctx.later, ctx.parameters[0], make_gate_up)
        grad_rows = input_gradient(grad_hidden, _stacked(gate_up), offsets, precision.up)
        return grad_rows, grad_gate_up, grad_down, None, None, None, None


def _stacked(weight: Tensor) -> Tensor:
    return weight if weight.ndim == 3 else weight[None]
