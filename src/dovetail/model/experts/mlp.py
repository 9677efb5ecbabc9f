"""The dense feed-forward layer, also that of shared experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dovetail.model.experts.quantized_mlp import MlpPrecision, quantized_mlp
from dovetail.model.experts.swiglu import swiglu, swiglu_backward


class DenseMlp(nn.Module):
    """down(swiglu(gate_up(x))); gate and up are one matrix, gate rows first."""

    def __init__(self, dim: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(dim, 2 * width, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(width, dim, bias=False, dtype=dtype)
        self.precision: MlpPrecision | None = None  # BF16 or FP32 until a recipe says otherwise

    def forward(self, x: Tensor) -> Tensor:
        gate_up, down = self.gate_up_proj.weight, self.down_proj.weight
        if self.precision is None:
            return _Mlp.apply(x, gate_up, down)
        rows = x.flatten(0, -2)
        return quantized_mlp(rows, gate_up[None], down[None], [0, len(rows)], self.precision).view_as(x)


class _Mlp(torch.autograd.Function):
    """The two GEMMs and the SwiGLU between them, keeping x and the SwiGLU's input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        hidden = F.linear(x, gate_up)
        ctx.save_for_backward(x, gate_up, down, hidden)
        return F.linear(swiglu(hidden), down)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, gate_up, down, hidden = ctx.saved_tensors
        grad_hidden, act = swiglu_backward(grad @ down, hidden)
        rows = grad_hidden.flatten(0, -2)
        return (
            grad_hidden @ gate_up,
            rows.t() @ x.flatten(0, -2),
            grad.flatten(0, -2).t() @ act.flatten(0, -2),
        )
