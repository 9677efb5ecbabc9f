"""Up, SwiGLU and down in a recipe's precision, for dense layers and for all experts at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.model.swiglu import swiglu, swiglu_backward
from dovetail.numerics.linear import gemm_backward, gemm_forward, save, saved
from dovetail.numerics.operands import keep
from dovetail.spec.precision import GemmPrecision, Quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpPrecision:
    up: GemmPrecision
    down: GemmPrecision
    saved_swiglu: Quantization | None  # how the SwiGLU's input is kept; None: in BF16


def quantized_mlp(
    rows: Tensor, gate_up: Tensor, down: Tensor, offsets: Sequence[int], precision: MlpPrecision
) -> Tensor:
    """rows [R, K] sorted by group, gate_up [G, 2I, K], down [G, K, I] -> [R, K]."""
    output: Tensor = _Mlp.apply(rows, gate_up, down, offsets, precision)
    return output


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, gate_up: Tensor, down: Tensor, offsets: Sequence[int], precision: MlpPrecision
    ) -> Tensor:
        hidden, kept_rows = gemm_forward(rows.contiguous(), gate_up, offsets, precision.up)
        output, _ = gemm_forward(swiglu(hidden), down, offsets, precision.down)
        if precision.saved_swiglu is None:
            save(ctx, [kept_rows], gate_up, down, hidden)
        else:
            save(ctx, [kept_rows, keep(hidden, precision.saved_swiglu)], gate_up, down)
        ctx.offsets, ctx.precision = offsets, precision
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        kept, (gate_up, down, *rest) = saved(ctx)
        hidden = rest[0] if rest else kept[1].restore()
        precision, offsets, grad = ctx.precision, ctx.offsets, grad.contiguous()
        # The output of the SwiGLU is needed for the gradient of `down`, and made again beside its gradient.
        act = swiglu(hidden)
        grad_act, grad_down = gemm_backward(grad, act, down, offsets, precision.down)
        grad_hidden, _ = swiglu_backward(grad_act, hidden)
        grad_rows, grad_gate_up = gemm_backward(grad_hidden, kept[0], gate_up, offsets, precision.up)
        return grad_rows, grad_gate_up, grad_down, None, None
