"""CPU kernels of `prompts`, with AVX-512 BF16.

What each row computes is summed in an order that depends on its own position alone: which rows are beside it, in this
pass or in earlier ones, changes no bit.

Letters: T queries, S keys, H heads, D = nope + rope, C latent width.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from dovetail.numerics.cpu.kernels import kernel
from dovetail.numerics.cpu.scalars_numba import load, scale_row, store
from dovetail.numerics.cpu.softmax_numba import softmax_row
from dovetail.numerics.products.grouped_numba import LANES, PANEL, float_product, pack, packed_size, product

STEP = 64  # queries at a time


@kernel
def remember(both, weight, eps, cos, sin, places, entries):  # type: ignore[no-untyped-def]
    """entries[places[r]] = [norm(both[r, :C]); rotated both[r, C:]] in BF16."""
    rows, width = both.shape
    half = cos.shape[1]
    latent = width - 2 * half
    for r in prange(rows):
        row, to = both[r], entries[places[r]]
        total = np.float32(0.0)
        for i in range(latent):
            value = load(row, i)
            total += value * value
        factor = np.float32(1.0) / np.sqrt(total / np.float32(latent) + eps)
        scale_row(row[:latent], factor, weight, to)
        for j in range(half):
            even, odd = load(row, latent + 2 * j), load(row, latent + 2 * j + 1)
            store(to, latent + 2 * j, even * cos[r, j] - odd * sin[r, j])
            store(to, latent + 2 * j + 1, even * sin[r, j] + odd * cos[r, j])


@kernel
def rotate(q, cos, sin):  # type: ignore[no-untyped-def]
    """The rotary part of q [T, H, D], in place."""
    rows, heads, dim = q.shape
    half = cos.shape[1]
    for r in prange(rows):
        for h in range(heads):
            x = q[r, h, dim - 2 * half :]
            for j in range(half):
                even, odd = load(x, 2 * j), load(x, 2 * j + 1)
                store(x, 2 * j, even * cos[r, j] - odd * sin[r, j])
                store(x, 2 * j + 1, even * sin[r, j] + odd * cos[r, j])


@kernel
def attend(q, kv, rope_key, positions, scale, out, splits):  # type: ignore[no-untyped-def]
    """out [T, H, V] of q [T, H, D], rotated, over kv [S, H, nope + V] and rope_key [S, rope].

    positions [T] ascend; query t sees keys 0 .. positions[t]. A head's steps go to `splits` tasks in turn.
    """
    length, heads, dim = q.shape
    num_keys, rope = rope_key.shape
    nope, v_dim = dim - rope, out.shape[2]
    pairs, stride = (dim + 1) // 2, heads * (nope + v_dim)
    flat_q, flat_kv, flat_out = q.reshape(-1), kv.reshape(-1), out.reshape(-1)
    for task in prange(heads * splits):
        h, split = task // splits, task % splits
        whole = np.empty((num_keys, dim), np.uint16)
        for s in range(num_keys):
            whole[s, :nope] = kv[s, h, :nope]
            whole[s, nope:] = rope_key[s]
        keys = np.empty(packed_size(dim, num_keys), np.uint32)
        values = np.empty(packed_size(num_keys, v_dim), np.uint32)
        pack(whole.reshape(-1), 0, dim, True, dim, num_keys, keys, PANEL)
        pack(flat_kv, h * (nope + v_dim) + nope, stride, False, num_keys, v_dim, values, PANEL)
        width = (num_keys + PANEL - 1) // PANEL * PANEL
        scores, weights = np.empty((STEP, width), np.float32), np.empty((STEP, width), np.uint16)
        packed = np.empty(max(packed_size(dim, STEP), packed_size(width, STEP)), np.uint32)
        for start in range(split * STEP, length, splits * STEP):
            rows = min(STEP, length - start)
            end = positions[start + rows - 1] + 1
            seen = (end + PANEL - 1) // PANEL * PANEL
            pack(flat_q, (start * heads + h) * dim, heads * dim, True, dim, rows, packed, LANES)
            float_product(packed, pairs, keys, PANEL * pairs, rows, end, scores, False)
            for i in range(rows):
                softmax_row(scores, i * width, seen, scale, 0, positions[start + i] + 1, weights, i * width)
            pack(weights.reshape(-1), 0, width, True, end, rows, packed, LANES)
            at = (start * heads + h) * v_dim
            product(
                packed,
                (end + 1) // 2,
                values,
                0,
                PANEL * ((num_keys + 1) // 2),
                rows,
                v_dim,
                flat_out,
                at,
                heads * v_dim,
            )
