"""CPU kernels around the score GEMMs of `attention._BlockAttention`.

scores [heads, queries, keys] of the queries from `start` on, in place; query t sees keys first[t] .. t.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from torch import Tensor

from dovetail.numerics.cpu_numba import array, exp, kernel, load, store


@kernel
def _softmax(scores, start, scale, first, log_sum, row):  # type: ignore[no-untyped-def]
    heads, queries, keys = scores.shape
    per_sequence = heads // first.shape[0]
    for h in prange(heads):
        wide = row[h]
        for i in range(queries):
            s = scores[h, i]
            lo, hi = first[h // per_sequence, start + i], start + i + 1
            top = np.float32(-np.inf)
            for j in range(lo, hi):
                wide[j] = load(s, j) * scale
                top = max(top, wide[j])
            total = np.float32(0.0)
            for j in range(lo, hi):
                e = exp(wide[j] - top)
                wide[j] = e
                total += e
            inverse = np.float32(1.0) / total
            for j in range(lo):
                store(s, j, np.float32(0.0))
            for j in range(lo, hi):
                store(s, j, wide[j] * inverse)
            for j in range(hi, keys):
                store(s, j, np.float32(0.0))
            log_sum[h, start + i] = top + np.log(total)


@kernel
def _softmax_backward(scores, grad, start, scale, first, log_sum):  # type: ignore[no-untyped-def]
    heads, queries, keys = scores.shape
    per_sequence = heads // first.shape[0]
    for h in prange(heads):
        for i in range(queries):
            s, g = scores[h, i], grad[h, i]
            lo, hi = first[h // per_sequence, start + i], start + i + 1
            shift = log_sum[h, start + i]
            dot = np.float32(0.0)
            for j in range(lo, hi):
                p = exp(load(s, j) * scale - shift)
                store(s, j, p)
                dot += p * load(g, j)
            for j in range(lo):
                store(s, j, np.float32(0.0))
                store(g, j, np.float32(0.0))
            for j in range(lo, hi):
                store(g, j, load(s, j) * (load(g, j) - dot) * scale)
            for j in range(hi, keys):
                store(s, j, np.float32(0.0))
                store(g, j, np.float32(0.0))


def softmax(scores: Tensor, start: int, scale: float, first: Tensor, log_sum: Tensor) -> None:
    """scores become probabilities; log_sum[:, start:...] their log-sum-exp (FP32)."""
    row = np.empty((scores.shape[0], scores.shape[2]), dtype=np.float32)
    _softmax(array(scores), start, np.float32(scale), array(first), array(log_sum), row)


def softmax_backward(
    scores: Tensor, grad: Tensor, start: int, scale: float, first: Tensor, log_sum: Tensor
) -> None:
    """scores become probabilities, and grad (of the probabilities) the gradient of the unscaled scores."""
    _softmax_backward(array(scores), array(grad), start, np.float32(scale), array(first), array(log_sum))
