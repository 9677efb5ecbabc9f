"""CPU kernels of `norm`, one row at a time.

With r = 1/sqrt(mean(x^2) + eps) and g = grad * weight:
    grad_x = r * (g - x * r^2 * mean(g * x)),  grad_weight = sum over rows of grad * x * r.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from dovetail.numerics.cpu.kernels import array, kernel
from dovetail.numerics.cpu.scalars_numba import load, store

CHUNKS = 16  # partial sums of grad_weight; fixed, so that the result does not depend on the thread count


@kernel
def _forward(x, weight, eps, y, scale):  # type: ignore[no-untyped-def]
    rows, dim = x.shape
    for i in prange(rows):
        xi, yi = x[i], y[i]
        total = np.float32(0.0)
        for j in range(dim):
            v = load(xi, j)
            total += v * v
        r = np.float32(1.0) / np.sqrt(total / np.float32(dim) + eps)
        scale[i] = r
        for j in range(dim):
            store(yi, j, load(xi, j) * r * weight[j])


@kernel
def _backward(grad, x, weight, scale, grad_x, partial):  # type: ignore[no-untyped-def]
    rows, dim = x.shape
    chunks = partial.shape[0]
    for c in prange(chunks):
        acc = partial[c]
        for j in range(dim):
            acc[j] = np.float32(0.0)
        for i in range(c * rows // chunks, (c + 1) * rows // chunks):
            gi, xi, oi, r = grad[i], x[i], grad_x[i], scale[i]
            dot = np.float32(0.0)
            for j in range(dim):
                gx = load(gi, j) * load(xi, j)
                dot += gx * weight[j]
                acc[j] += gx * r
            factor = r * r * r * dot / np.float32(dim)
            for j in range(dim):
                store(oi, j, load(gi, j) * weight[j] * r - load(xi, j) * factor)


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dim = x.shape[-1]
    y = torch.empty_like(x)
    scale = torch.empty(x.numel() // dim, dtype=torch.float32)
    _forward(array(x.view(-1, dim)), array(weight), np.float32(eps), array(y.view(-1, dim)), array(scale))
    return y, scale


def backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    dim = x.shape[-1]
    grad_x = torch.empty_like(x)
    partial = torch.empty(CHUNKS, dim, dtype=torch.float32)
    _backward(
        array(grad.view(-1, dim)),
        array(x.view(-1, dim)),
        array(weight),
        array(scale),
        array(grad_x.view(-1, dim)),
        array(partial),
    )
    return grad_x, partial.sum(0)
