"""CPU kernels of `tiled`: attention, expanded for prompts and absorbed for short rows.

What each row computes is summed in an order that depends on its own position alone: which rows are beside it, in this
pass or in earlier ones, changes no bit.

Letters: T queries, S keys, H heads, D = nope + rope, C latent width.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from dovetail.engine.steps.rows_numba import attend_latents
from dovetail.numerics.cpu.dots_numba import mix, products
from dovetail.numerics.cpu.kernels import kernel
from dovetail.numerics.cpu.scalars_numba import load, store
from dovetail.numerics.cpu.softmax_numba import softmax_row
from dovetail.numerics.products.grouped_numba import LANES, PANEL, float_product, pack, packed_size, product

STEP = 64  # queries at a time


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


@kernel
def attend_absorbed(q, kv_b, entries, page, tables, slots, positions, scale, out):  # type: ignore[no-untyped-def]
    """out [R, H, V] of q [R, H, D], rotated; row r sees positions 0 .. positions[r] of slots[r], whose pages tables
    [slots, .] name. Scores and sums are FP32."""
    rows, heads, dim = q.shape
    v_dim, entry = out.shape[2], entries.shape[1]
    nope = len(kv_b) // heads - v_dim
    latent = entry - (dim - nope)
    absorbed = np.empty((rows * heads, entry), np.float32)
    for h in prange(heads):
        wide, moved = np.empty((rows, nope), np.float32), np.empty((rows, latent), np.float32)
        for r in range(rows):
            for i in range(nope):
                wide[r, i] = load(q[r, h], i)
        mix(wide, 0, rows, nope, kv_b, h * (nope + v_dim), latent, moved, 0)
        for r in range(rows):
            absorbed[r * heads + h, :latent] = moved[r]
            for i in range(dim - nope):
                absorbed[r * heads + h, latent + i] = load(q[r, h], nope + i)
    mixed = attend_latents(absorbed, entries, page, tables, slots, positions, latent, scale)
    for h in prange(heads):
        values = np.empty((rows, v_dim), np.float32)
        products(kv_b, h * (nope + v_dim) + nope, v_dim, mixed, h * rows, rows, values, 0, v_dim)
        for r in range(rows):
            for i in range(v_dim):
                store(out[r, h], i, values[r, i])
