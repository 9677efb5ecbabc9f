"""The dense feed-forward layer, which is also that of shared experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dovetail.model.experts.quantized_mlp import MlpPrecision, quantized_mlp
from dovetail.model.experts.swiglu import swiglu, swiglu_backward
from dovetail.numerics.weight_gradients import WeightGradients, now_or_later


class DenseMlp(nn.Module):
    """down(swiglu(gate_up(x))); gate and up are one matrix, gate rows first."""

    def __init__(self, dim: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(dim, 2 * width, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(width, dim, bias=False, dtype=dtype)
        self.precision: MlpPrecision | None = None  # BF16 or FP32 until a recipe says otherwise
        self.later: WeightGradients | None = None

    def forward(self, x: Tensor) -> Tensor:
        gate_up, down = self.gate_up_proj.weight, self.down_proj.weight
        if self.precision is None:
            return _Mlp.apply(x, gate_up, down, self.later)
        rows = x.flatten(0, -2)
        return quantized_mlp(rows, gate_up, down, [0, len(rows)], self.precision, later=self.later).view_as(x)


class _Mlp(torch.autograd.Function):
    """The two GEMMs and the SwiGLU between them, keeping x and the SwiGLU's input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, later: WeightGradients | None) -> Tensor:
        hidden = F.linear(x, gate_up)
        ctx.save_for_backward(x, gate_up, down, hidden)
        ctx.parameters, ctx.later = (gate_up, down), later
        return F.linear(swiglu(hidden), down)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, gate_up, down, hidden = ctx.saved_tensors
        grad_hidden, act = swiglu_backward(grad @ down, hidden)

        def outer(left: Tensor, right: Tensor) -> Tensor:
            return left.flatten(0, -2).t() @ right.flatten(0, -2)

        grad_x = grad_hidden @ gate_up
        grad_gate_up = now_or_later(ctx.later, ctx.parameters[0], lambda: outer(grad_hidden, x))
        grad_down = now_or_later(ctx.later, ctx.parameters[1], lambda: outer(grad, act))
        return grad_x, grad_gate_up, grad_down, None
