"""SwiGLU: silu(gate) * up, of one tensor that holds gate and up side by side.

The output is not kept for the backward pass: `swiglu_backward` makes it anew beside the gradient, as the
V3 training does [V3 §3.3.3].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dovetail.model import swiglu_numba
from dovetail.numerics.cpu_numba import takes


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2 * width], gate first -> [..., width]; FP32 inside, rounded once.

    Called inside autograd functions, whose backward pass is `swiglu_backward`: on a CPU it records no graph.
    """
    if takes(gate_up):
        return swiglu_numba.forward(gate_up.contiguous())
    return swiglu_reference(gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    wide = gate_up.float() if gate_up.dtype != torch.float64 else gate_up
    gate, up = wide.chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of gate_up, and the recomputed output."""
    if takes(grad, gate_up):
        return swiglu_numba.backward(grad.contiguous(), gate_up.contiguous())
    return swiglu_backward_reference(grad, gate_up)


def swiglu_backward_reference(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = gate_up.detach().requires_grad_()
        output = swiglu_reference(leaf)
    (grad_gate_up,) = torch.autograd.grad(output, leaf, grad)
    return grad_gate_up, output.detach()


class DenseMlp(nn.Module):
    """down(swiglu(gate_up(x))); gate and up are one matrix, gate rows first."""

    def __init__(self, dim: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(dim, 2 * width, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(width, dim, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _Mlp.apply(x, self.gate_up_proj.weight, self.down_proj.weight)


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
