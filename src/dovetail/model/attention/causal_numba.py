"""CPU kernels of `causal` that work on scores between torch's products.

scores [heads, queries, keys] of the queries from `start` on, in place; query t sees keys first[t] .. t.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from torch import Tensor

from dovetail.numerics.cpu.kernels import array, kernel
from dovetail.numerics.cpu.scalars_numba import exp, from_ordered, load, ordered, store

STEP = 64  # keys are visited in whole steps of this many, so that the vector code has no ragged end


@kernel
def _softmax(scores, start, scale, first, log_sum, row):  # type: ignore[no-untyped-def]
    heads, queries, keys = scores.shape
    per_sequence = heads // first.shape[0]
    for h in prange(heads):
        for i in range(queries):
            lo, hi = np.int64(first[h // per_sequence, start + i]), start + i + 1
            begin, end = lo // STEP * STEP, min((hi + STEP - 1) // STEP * STEP, keys)
            s, wide = scores[h, i, begin:end], row[h, begin:end]
            for j in range(len(s)):
                wide[j] = load(s, j) * scale
            wide[: lo - begin] = -np.inf
            wide[hi - begin :] = -np.inf
            key = ordered(np.float32(-np.inf))
            for j in range(len(s)):
                key = max(key, ordered(wide[j]))
            top = from_ordered(key)
            total = np.float32(0.0)
            for j in range(len(s)):
                e = exp(wide[j] - top)  # a masked key leaves at most 1e-38
                wide[j] = e
                total += e
            inverse = np.float32(1.0) / total
            for j in range(len(s)):
                store(s, j, wide[j] * inverse)
            scores[h, i, :lo] = 0
            scores[h, i, hi:] = 0
            log_sum[h, start + i] = top + np.log(total)


@kernel
def _softmax_backward(scores, grad, start, scale, first, log_sum, row):  # type: ignore[no-untyped-def]
    heads, queries, keys = scores.shape
    per_sequence = heads // first.shape[0]
    for h in prange(heads):
        for i in range(queries):
            lo, hi = np.int64(first[h // per_sequence, start + i]), start + i + 1
            begin, end = lo // STEP * STEP, min((hi + STEP - 1) // STEP * STEP, keys)
            s, g, wide = scores[h, i, begin:end], grad[h, i, begin:end], row[h, begin:end]
            shift = log_sum[h, start + i]
            for j in range(len(s)):
                wide[j] = exp(load(s, j) * scale - shift)
            wide[: lo - begin] = np.float32(0.0)
            wide[hi - begin :] = np.float32(0.0)
            dot = np.float32(0.0)
            for j in range(len(s)):
                dot += wide[j] * load(g, j)
            for j in range(len(s)):
                p = wide[j]
                store(s, j, p)
                store(g, j, p * (load(g, j) - dot) * scale)
            scores[h, i, :begin] = 0
            scores[h, i, end:] = 0
            grad[h, i, :begin] = 0
            grad[h, i, end:] = 0


def _rows(scores: Tensor) -> np.ndarray:
    """One FP32 row of working space per head."""
    return np.empty((scores.shape[0], scores.shape[2]), dtype=np.float32)


def softmax(scores: Tensor, start: int, scale: float, first: Tensor, log_sum: Tensor) -> None:
    """scores become probabilities; log_sum[:, start:...] their log-sum-exp (FP32)."""
    _softmax(array(scores), start, np.float32(scale), array(first), array(log_sum), _rows(scores))


def softmax_backward(scores: Tensor, grad: Tensor, start: int, scale: float, first: Tensor, log_sum: Tensor) -> None:
    """scores become probabilities, and grad (of the probabilities) the gradient of the unscaled scores."""
    _softmax_backward(array(scores), array(grad), start, np.float32(scale), array(first), array(log_sum), _rows(scores))
