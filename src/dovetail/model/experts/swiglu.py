"""SwiGLU: silu(gate) * up, of one tensor that holds gate and up side by side.

The output is not kept for the backward pass: `swiglu_backward` makes it anew beside the gradient, as the
V3 training does [V3 §3.3.3].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.model.experts import swiglu_numba
from dovetail.numerics import capability


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2 * width], gate first -> [..., width]; FP32 inside, rounded once.

    Called inside autograd functions, whose backward pass is `swiglu_backward`: on a CPU it records no graph.
    """
    if capability.on_cpu(gate_up):
        return swiglu_numba.forward(gate_up.contiguous())
    return swiglu_reference(gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    wide = gate_up.float() if gate_up.dtype != torch.float64 else gate_up
    gate, up = wide.chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of gate_up, and the recomputed output."""
    if capability.on_cpu(grad, gate_up):
        return swiglu_numba.backward(grad.contiguous(), gate_up.contiguous())
    return swiglu_backward_reference(grad, gate_up)


def swiglu_backward_reference(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = gate_up.detach().requires_grad_()
        output = swiglu_reference(leaf)
    (grad_gate_up,) = torch.autograd.grad(output, leaf, grad)
    return grad_gate_up, output.detach()
