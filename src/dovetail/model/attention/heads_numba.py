"""CPU kernels of `heads`: one pass over q and kv, and one back."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from dovetail.numerics.cpu.kernels import array, kernel
from dovetail.numerics.cpu.scalars_numba import copy, load, store


@kernel
def _split(q, kv, rope_key, cos, sin, out_q, out_k, out_v):  # type: ignore[no-untyped-def]
    batch, heads, length, dim = out_q.shape
    half = cos.shape[2]
    nope = dim - 2 * half
    for item in prange(batch * length):
        b, t = item // length, item % length
        key, c, s = rope_key[b, t], cos[b, t], sin[b, t]
        for h in range(heads):
            copy(q[b, t, h], out_q[b, h, t, :nope])
            copy(kv[b, t, h], out_k[b, h, t, :nope])
            copy(key, out_k[b, h, t, nope:])
            copy(kv[b, t, h, nope:], out_v[b, h, t])
            x, y = q[b, t, h, nope:], out_q[b, h, t, nope:]
            for j in range(half):
                even, odd = load(x, 2 * j), load(x, 2 * j + 1)
                store(y, 2 * j, even * c[j] - odd * s[j])
                store(y, 2 * j + 1, even * s[j] + odd * c[j])


@kernel
def _join(grad_q, grad_k, grad_v, cos, sin, out_q, out_kv, out_key):  # type: ignore[no-untyped-def]
    batch, heads, length, dim = grad_q.shape
    half = cos.shape[2]
    nope = dim - 2 * half
    for item in prange(batch * length):
        b, t = item // length, item % length
        c, s = cos[b, t], sin[b, t]
        total = np.zeros(2 * half, dtype=np.float32)
        for h in range(heads):
            out_q[b, t, h, :nope] = grad_q[b, h, t, :nope]
            out_kv[b, t, h, :nope] = grad_k[b, h, t, :nope]
            out_kv[b, t, h, nope:] = grad_v[b, h, t]
            x, y, z = grad_q[b, h, t, nope:], out_q[b, t, h, nope:], grad_k[b, h, t, nope:]
            for j in range(half):
                even, odd = load(x, 2 * j), load(x, 2 * j + 1)
                store(y, 2 * j, even * c[j] + odd * s[j])
                store(y, 2 * j + 1, odd * c[j] - even * s[j])
            for j in range(2 * half):
                total[j] += load(z, j)
        for j in range(2 * half):
            store(out_key[b, t], j, total[j])


def split(q: Tensor, kv: Tensor, rope_key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, dim = q.shape
    width = kv.shape[-1] - (dim - rope_key.shape[-1])
    out_q, out_k = (q.new_empty(batch, heads, length, dim) for _ in range(2))
    out_v = q.new_empty(batch, heads, length, width)
    _split(*(array(x) for x in (q, kv, rope_key, cos, sin, out_q, out_k, out_v)))
    return out_q, out_k, out_v


def join(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """The gradients of q, kv and rope_key from those of the heads."""
    batch, heads, length, dim = grad_q.shape
    rope = 2 * cos.shape[-1]
    out_q = torch.empty(batch, length, heads, dim, dtype=grad_q.dtype)
    out_kv = torch.empty(batch, length, heads, dim - rope + grad_v.shape[-1], dtype=grad_q.dtype)
    out_key = torch.empty(batch, length, rope, dtype=grad_q.dtype)
    _join(*(array(x) for x in (grad_q, grad_k, grad_v, cos, sin, out_q, out_kv, out_key)))
    return out_q, out_kv, out_key
