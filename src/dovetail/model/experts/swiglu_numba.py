"""CPU kernels of `swiglu`, forward and backward.

With s = sigmoid(gate): output = gate s up;  grad_gate = grad up s (1 + gate (1 - s));  grad_up = grad gate s.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from dovetail.numerics.cpu.kernels import array, kernel
from dovetail.numerics.cpu.scalars_numba import load, sigmoid, store


@kernel
def _forward(gate_up, output):  # type: ignore[no-untyped-def]
    rows, width = output.shape
    for i in prange(rows):
        gate, up, out = gate_up[i, :width], gate_up[i, width:], output[i]
        for j in range(width):
            g = load(gate, j)
            store(out, j, g * sigmoid(g) * load(up, j))


@kernel
def _backward(grad, gate_up, grad_gate_up, output):  # type: ignore[no-untyped-def]
    rows, width = output.shape
    for i in prange(rows):
        gate, up, out, gr = gate_up[i, :width], gate_up[i, width:], output[i], grad[i]
        grad_gate, grad_up = grad_gate_up[i, :width], grad_gate_up[i, width:]
        for j in range(width):
            g, u, d = load(gate, j), load(up, j), load(gr, j)
            s = sigmoid(g)
            silu = g * s
            store(out, j, silu * u)
            store(grad_gate, j, d * u * s * (np.float32(1.0) + g - silu))
            store(grad_up, j, d * silu)


def forward(gate_up: Tensor) -> Tensor:
    output = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    _forward(_rows(gate_up), _rows(output))
    return output


def backward(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate_up = torch.empty_like(gate_up)
    output = torch.empty_like(grad)
    _backward(_rows(grad), _rows(gate_up), _rows(grad_gate_up), _rows(output))
    return grad_gate_up, output


def _rows(x: Tensor) -> np.ndarray:
    return array(x.view(-1, x.shape[-1]))
