"""CPU kernels of `optim`: the AdamW update of a parameter in one pass, and the sum of squares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import prange
from torch import Tensor

from dovetail.numerics.cpu.kernels import array, kernel
from dovetail.numerics.cpu.scalars_numba import load, store

BLOCK = 4096  # elements per piece of work; fixed, so that sums do not depend on the thread count


@kernel
def _update(parameter, master, moment1, moment2, grad, scalars):  # type: ignore[no-untyped-def]
    lr, decay, inverse2, scale = scalars[0], scalars[1], scalars[2], scalars[3]
    beta1, beta2, eps, rest1, rest2 = scalars[4], scalars[5], scalars[6], scalars[7], scalars[8]
    n = master.shape[0]
    for block in prange((n + BLOCK - 1) // BLOCK):
        start = block * BLOCK
        stop = min(start + BLOCK, n)
        p, w, m, v, g = (
            parameter[start:stop],
            master[start:stop],
            moment1[start:stop],
            moment2[start:stop],
            grad[start:stop],
        )
        for i in range(stop - start):
            x = load(g, i) * scale
            a = beta1 * load(m, i) + rest1 * x
            b = beta2 * load(v, i) + rest2 * x * x
            value = w[i] - w[i] * decay - lr * a / (np.sqrt(b * inverse2) + eps)
            store(m, i, a)
            store(v, i, b)
            w[i] = value
            store(p, i, value)


@kernel
def _sum_of_squares(values, partial):  # type: ignore[no-untyped-def]
    n = values.shape[0]
    for block in prange(partial.shape[0]):
        total = np.float32(0.0)
        for i in range(block * BLOCK, min((block + 1) * BLOCK, n)):
            x = load(values, i)
            total += x * x
        partial[block] = total


def update(written: Sequence[Tensor], gradient: Tensor, factors: Sequence[float]) -> None:
    """written: parameter, master, both moments. factors: learning rate / (1 - b1^t), learning rate * weight decay,
    1 / (1 - b2^t), gradient scale; beta1, beta2, eps."""
    beta1, beta2 = factors[4:6]
    rest = 1.0 - beta1, 1.0 - beta2  # in FP64: in FP32, 1 - 0.999 is wrong by 5e-5 of itself
    scalars = np.array([*factors, *rest], dtype=np.float32)
    _update(*(array(x.detach().view(-1)) for x in (*written, gradient.contiguous())), scalars)


def sum_of_squares(gradient: Tensor) -> Tensor:
    """FP32 within a block, FP64 across."""
    flat = gradient.detach().contiguous().view(-1)
    partial = torch.empty((flat.numel() + BLOCK - 1) // BLOCK, dtype=torch.float32)
    _sum_of_squares(array(flat), array(partial))
    return partial.double().sum()
