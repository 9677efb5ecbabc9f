"""CPU kernels of `tiled`: attention, expanded for prompts and absorbed for short rows.

What each row computes is summed in an order that depends on its own position alone: which rows are beside it, in this
pass or in earlier ones, changes no bit.

Letters: T queries, S keys, H heads, D = nope + rope, C latent width.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from numba.extending import register_jitable

from dovetail.engine.steps.rows_numba import key_places
from dovetail.numerics.cpu.dot_tiles_numba import multiply, room
from dovetail.numerics.cpu.kernels import kernel
from dovetail.numerics.cpu.mixtures_numba import mix_rows
from dovetail.numerics.cpu.softmax_numba import softmax_row
from dovetail.numerics.cpu.tiles_numba import PANEL
from dovetail.numerics.panels.panels import panels

STEP = 64  # queries at a time
HEADS = 8  # of a short row that attend together: each key is loaded once for them
KEYS = 32  # that are scored at a time, at most
MANY = 4  # rows that keep all threads busy without sharing out the heads of each


@kernel
def attend(q, kv, rope_key, positions, scale, out, splits):  # type: ignore[no-untyped-def]
    """out [T, H, V] of q [T, H, D], rotated, over kv [S, H, nope + V] and rope_key [S, rope].

    positions [T] ascend; query t sees keys 0 .. positions[t]. A head's steps go to `splits` tasks in turn.
    """
    length, heads, dim = q.shape
    num_keys, rope = rope_key.shape
    nope, v_dim = dim - rope, out.shape[2]
    stride = heads * (nope + v_dim)
    flat_q, flat_kv, flat_out = q.reshape(-1), kv.reshape(-1), out.reshape(-1)
    for task in prange(heads * splits):
        h, split = task // splits, task % splits
        whole = np.empty((num_keys, dim), np.uint16)
        for s in range(num_keys):
            whole[s, :nope] = kv[s, h, :nope]
            whole[s, nope:] = rope_key[s]
        keys = np.empty(panels.right_size(dim, num_keys), np.uint32)
        values = np.empty(panels.right_size(num_keys, v_dim), np.uint32)
        panels.pack_right(whole.reshape(-1), 0, dim, True, dim, num_keys, keys)
        panels.pack_right(flat_kv, h * (nope + v_dim) + nope, stride, False, num_keys, v_dim, values)
        width = (num_keys + PANEL - 1) // PANEL * PANEL
        scores, weights = np.empty((STEP, width), np.float32), np.empty((STEP, width), np.uint16)
        packed = np.empty(max(panels.left_size(dim, STEP), panels.left_size(width, STEP)), np.uint32)
        panels.take_tiles()
        for start in range(split * STEP, length, splits * STEP):
            rows = min(STEP, length - start)
            end = positions[start + rows - 1] + 1
            seen = (end + PANEL - 1) // PANEL * PANEL
            panels.pack_left(flat_q, (start * heads + h) * dim, heads * dim, True, dim, rows, packed)
            panels.float_product(packed, dim, keys, panels.panel_size(dim), rows, end, scores, False)
            for i in range(rows):
                softmax_row(scores, i * width, seen, scale, 0, positions[start + i] + 1, weights, i * width)
            panels.pack_left(weights.reshape(-1), 0, width, True, end, rows, packed)
            at = (start * heads + h) * v_dim
            panels.product(packed, end, values, panels.panel_size(num_keys), rows, v_dim, flat_out, at, heads * v_dim)
        panels.give_tiles()


@register_jitable
def rows_from(first, count, width):  # type: ignore[no-untyped-def]
    """Where rows that lie together begin."""
    starts = np.empty(count, np.int64)
    for s in range(count):
        starts[s] = (first + s) * width
    return starts


@register_jitable
def score_keys(queries, at, count, keys, entry, page, table, num_keys, scores, lanes):  # type: ignore[no-untyped-def]
    """scores[i, s] of `count` queries and the first keys of a sequence, whose pages `table` names."""
    width = scores.shape[1]
    for begin in range(0, num_keys, page):
        place, end = table[begin // page] * page - begin, min(begin + page, num_keys)
        for s in range(begin, end, KEYS):
            here, first = min(KEYS, end - s), (place + s) * entry
            multiply(queries, at, count, keys, first, here, entry, scores.reshape(-1), s, width, lanes)


@kernel
def attend_latents(queries, keys, page, tables, slots, positions, latent, scale):  # type: ignore[no-untyped-def]
    """Queries [R, H, entry] over the keys [., entry] that their rows see -> mixtures of latents [H, R, latent]."""
    rows, heads, entry = queries.shape
    groups = (heads + HEADS - 1) // HEADS
    if rows < MANY:
        groups = max(groups, min(heads, 2))
    mixed = np.empty((heads, rows, latent), np.uint16)
    flat, flat_keys, flat_mixed = queries.reshape(-1), keys.reshape(-1), mixed.reshape(-1)
    for item in prange(rows * groups):
        r, group = item // groups, item % groups
        start, stop = group * heads // groups, (group + 1) * heads // groups
        count, num_keys, table = stop - start, positions[r] + 1, tables[slots[r]]
        width = (num_keys + PANEL - 1) // PANEL * PANEL
        scores, weights = np.empty((count, width), np.float32), np.empty((count, width), np.uint16)
        lanes = np.empty(room(count, KEYS, entry), np.float32)
        score_keys(flat, (r * heads + start) * entry, count, flat_keys, entry, page, table, num_keys, scores, lanes)
        for h in range(count):
            softmax_row(scores, h * width, width, scale, 0, num_keys, weights, h * width)
        starts = key_places(table, num_keys, page) * entry
        to = (start * rows + r) * latent
        mix_rows(
            weights.reshape(-1), 0, width, count, flat_keys, starts, num_keys, latent, flat_mixed, to, rows * latent
        )
    return mixed


@kernel
def attend_absorbed(q, kv_b, entries, page, tables, slots, positions, scale, out):  # type: ignore[no-untyped-def]
    """out [R, H, V] of q [R, H, D], rotated; row r sees positions 0 .. positions[r] of slots[r], whose pages tables
    [slots, .] name. Scores and sums are FP32; queries in the space of the cache, weights of keys and mixtures of
    latents are rounded to BF16."""
    rows, heads, dim = q.shape
    v_dim, entry = out.shape[2], entries.shape[1]
    nope = len(kv_b) // heads - v_dim
    latent = entry - (dim - nope)
    flat_weights, flat_out = kv_b.reshape(-1), out.reshape(-1)
    absorbed = np.empty((rows, heads, entry), np.uint16)
    flat_absorbed = absorbed.reshape(-1)
    for h in prange(heads):
        mine = np.zeros((rows, nope + nope % 2), np.uint16)
        mine[:, :nope] = q[:, h, :nope]
        absorbed[:, h, latent:] = q[:, h, nope:]
        starts = rows_from(h * (nope + v_dim), nope, latent)
        flat_mine, stride = mine.reshape(-1), mine.shape[1]
        mix_rows(
            flat_mine, 0, stride, rows, flat_weights, starts, nope, latent, flat_absorbed, h * entry, heads * entry
        )
    mixed = attend_latents(absorbed, entries, page, tables, slots, positions, latent, scale).reshape(-1)
    for h in prange(heads):
        first = (h * (nope + v_dim) + nope) * latent
        lanes = np.empty(room(rows, v_dim, latent), np.float32)
        at, ldc = h * v_dim, heads * v_dim
        multiply(mixed, h * rows * latent, rows, flat_weights, first, v_dim, latent, flat_out, at, ldc, lanes)
