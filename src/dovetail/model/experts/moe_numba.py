"""CPU kernels of `moe`, which move tokens to expert rows and back.

`combine` sums over a token's rows in FP32; with weights of one it is also the backward pass of `gather`. A row of -1 is
that of a choice whose expert is not here: it counts as none.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from dovetail.numerics.cpu.kernels import array, kernel, serial_kernel
from dovetail.numerics.cpu.scalars_numba import load, store


@serial_kernel
def _place(ids, starts, row_ids, token_ids):  # type: ignore[no-untyped-def]
    token_ids[:] = -1
    next_row = starts.copy()
    for n in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            if ids[n, k] < 0:
                row_ids[n, k] = -1
                continue
            row = next_row[ids[n, k]]
            next_row[ids[n, k]] += 1
            row_ids[n, k] = row
            token_ids[row] = n


@kernel
def _gather(x, token_ids, rows):  # type: ignore[no-untyped-def]
    dim = x.shape[1]
    for r in prange(rows.shape[0]):
        n = token_ids[r]
        to = rows[r]
        if n >= 0:
            source = x[n]
            for j in range(dim):
                to[j] = source[j]
        else:
            for j in range(dim):
                to[j] = 0


@kernel
def _combine(rows, weights, row_ids, output):  # type: ignore[no-untyped-def]
    dim = rows.shape[1]
    choices = row_ids.shape[1]
    for n in prange(output.shape[0]):
        total = np.zeros(dim, dtype=np.float32)
        for k in range(choices):
            if row_ids[n, k] < 0:
                continue
            row, w = rows[row_ids[n, k]], weights[n, k]
            for j in range(dim):
                total[j] += w * load(row, j)
        out = output[n]
        for j in range(dim):
            store(out, j, total[j])


@kernel
def _combine_backward(grad, rows, weights, row_ids, token_ids, grad_rows, grad_weights):  # type: ignore[no-untyped-def]
    dim = rows.shape[1]
    choices = row_ids.shape[1]
    for n in prange(grad.shape[0]):
        g = grad[n]
        for k in range(choices):
            r = row_ids[n, k]
            if r < 0:
                grad_weights[n, k] = 0
                continue
            row, out, w = rows[r], grad_rows[r], weights[n, k]
            dot = np.float32(0.0)
            for j in range(dim):
                v = load(g, j)
                dot += v * load(row, j)
                store(out, j, w * v)
            grad_weights[n, k] = dot
    for r in prange(token_ids.shape[0]):
        if token_ids[r] < 0:
            out = grad_rows[r]
            for j in range(dim):
                out[j] = 0


def place(ids: Tensor, starts: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """row_ids [N, K] and token_ids [num_rows] (-1: padding); starts [E] is each expert's first row; ids [N, K]."""
    row_ids = torch.empty_like(ids)
    token_ids = torch.empty(num_rows, dtype=torch.int64)
    _place(array(ids), array(starts), array(row_ids), array(token_ids))
    return row_ids, token_ids


def gather(x: Tensor, token_ids: Tensor) -> Tensor:
    rows = x.new_empty(token_ids.shape[0], x.shape[1])
    _gather(array(x), array(token_ids), array(rows))
    return rows


def combine(rows: Tensor, weights: Tensor, row_ids: Tensor) -> Tensor:
    output = rows.new_empty(row_ids.shape[0], rows.shape[1])
    _combine(array(rows), array(weights), array(row_ids), array(output))
    return output


def combine_backward(
    grad: Tensor, rows: Tensor, weights: Tensor, row_ids: Tensor, token_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows (zero in padding) and of the weights."""
    grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(weights)
    _combine_backward(*(array(x) for x in (grad, rows, weights, row_ids, token_ids, grad_rows, grad_weights)))
    return grad_rows, grad_weights
