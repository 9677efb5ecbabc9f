"""CPU kernels of `causal`, for whole heads with BF16 instructions, forward and backward.

A step of queries is multiplied by the keys it may see, its softmax taken, and the result multiplied by the values
before the next step begins: scores never leave the core's own caches, and none is computed right of the step's last
query. Scores stay in FP32; probabilities are rounded to BF16, as the reference has it.

q, k [B, H, T, dim], v [B, H, T, v_dim] flat; grads of the same layout; the output is [B, T, H, v_dim].
"""

from __future__ import annotations

import numpy as np
from numba import prange
from numba.extending import register_jitable

from dovetail.numerics.cpu.kernels import kernel
from dovetail.numerics.cpu.scalars_numba import store
from dovetail.numerics.cpu.softmax_numba import softmax_backward_row, softmax_row
from dovetail.numerics.cpu.tiles_numba import LINE, PANEL, prefetch
from dovetail.numerics.panels.panels import panels

STEP = 64  # queries at a time


@register_jitable(forceinline=True)
def _whole(count, multiple):  # type: ignore[no-untyped-def]
    return (count + multiple - 1) // multiple * multiple


@register_jitable(forceinline=True)
def _fetch_row(x, row, width):  # type: ignore[no-untyped-def]
    """Ask for a row of x: the next head's comes from memory while this one is computed."""
    for column in range(0, width, LINE):
        prefetch(x, row * width + column)


@kernel
def forward(q, k, v, scale, first, out, log_sum, shape, splits):  # type: ignore[no-untyped-def]
    """out and log_sum [B * H, T]; shape = (B, H, T, dim, v_dim). A head's steps go to `splits` tasks in turn."""
    batch, heads, length, dim, v_dim = shape
    for task in prange(batch * heads * splits):
        h, split = task // splits, task % splits
        sequence, head = h // heads, h % heads
        keys, values = (
            np.empty(panels.right_size(dim, length), np.uint32),
            np.empty(panels.right_size(length, v_dim), np.uint32),
        )
        panels.pack_right(k, h * length * dim, dim, True, dim, length, keys)
        panels.pack_right(v, h * length * v_dim, v_dim, False, length, v_dim, values)
        width = _whole(length, PANEL)
        scores, weights = np.empty((STEP, width), np.float32), np.empty((STEP, width), np.uint16)
        packed = np.empty(max(panels.left_size(dim, STEP), panels.left_size(width, STEP)), np.uint32)
        panels.take_tiles()
        for start in range(split * STEP, length, splits * STEP):
            rows = min(STEP, length - start)
            end = start + rows
            seen = _whole(end, PANEL)
            panels.pack_left(q, (h * length + start) * dim, dim, True, dim, rows, packed)
            panels.float_product(packed, dim, keys, panels.panel_size(dim), rows, end, scores, False)
            for i in range(rows):
                if splits == 1 and h + 1 < batch * heads:
                    _fetch_row(q, (h + 1) * length + start + i, dim)
                    _fetch_row(k, (h + 1) * length + start + i, dim)
                    _fetch_row(v, (h + 1) * length + start + i, v_dim)
                lo, hi, at = np.int64(first[sequence, start + i]), start + i + 1, i * width
                top, total = softmax_row(scores, at, seen, scale, lo, hi, weights, at)
                log_sum[h, start + i] = top + np.log(total)
            panels.pack_left(weights.reshape(-1), 0, width, True, end, rows, packed)
            at = ((sequence * length + start) * heads + head) * v_dim
            panels.product(packed, end, values, panels.panel_size(length), rows, v_dim, out, at, heads * v_dim)
        panels.give_tiles()


@register_jitable
def _round(source, out, at, rows, columns):  # type: ignore[no-untyped-def]
    for i in range(rows):
        row, wide = out[at + i * columns : at + (i + 1) * columns], source[i, :columns]
        for j in range(columns):
            store(row, j, wide[j])


@kernel
def backward(grad, q, k, v, scale, first, log_sum, grad_q, grad_k, grad_v, shape):  # type: ignore[no-untyped-def]
    """Gradients of q, k, v; grad [B, H, T, v_dim]; those of k and v are summed in FP32 over the steps."""
    batch, heads, length, dim, v_dim = shape
    for h in prange(batch * heads):
        at, v_at, width = h * length * dim, h * length * v_dim, _whole(length, PANEL)
        keys, keys_t = (
            np.empty(panels.right_size(dim, length), np.uint32),
            np.empty(panels.right_size(length, dim), np.uint32),
        )
        values = np.empty(panels.right_size(v_dim, length), np.uint32)
        panels.pack_right(k, at, dim, True, dim, length, keys)
        panels.pack_right(k, at, dim, False, length, dim, keys_t)
        panels.pack_right(v, v_at, v_dim, True, v_dim, length, values)
        scores, grad_weights = np.empty((STEP, width), np.float32), np.empty((STEP, width), np.float32)
        weights, grad_scores = np.empty((STEP, width), np.uint16), np.empty((STEP, width), np.uint16)
        sum_k = np.zeros((width, _whole(dim, PANEL)), np.float32)
        sum_v = np.zeros((width, _whole(v_dim, PANEL)), np.float32)
        left = np.empty(max(panels.left_size(max(dim, v_dim), STEP), panels.left_size(width, STEP)), np.uint32)
        left_t = np.empty(panels.left_size(STEP, width), np.uint32)
        right = np.empty(panels.right_size(STEP, max(dim, v_dim)), np.uint32)
        panels.take_tiles()
        for start in range(0, length, STEP):
            rows = min(STEP, length - start)
            end, row_at, v_row_at = start + rows, at + start * dim, v_at + start * v_dim
            seen = _whole(end, PANEL)
            panels.pack_left(q, row_at, dim, True, dim, rows, left)
            panels.float_product(left, dim, keys, panels.panel_size(dim), rows, end, scores, False)
            panels.pack_left(grad, v_row_at, v_dim, True, v_dim, rows, left)
            panels.float_product(left, v_dim, values, panels.panel_size(v_dim), rows, end, grad_weights, False)
            for i in range(rows):
                if h + 1 < batch * heads:
                    following = (h + 1) * length + start + i
                    _fetch_row(q, following, dim)
                    _fetch_row(k, following, dim)
                    _fetch_row(v, following, v_dim)
                    _fetch_row(grad, following, v_dim)
                lo, hi, shift = np.int64(first[h // heads, start + i]), start + i + 1, log_sum[h, start + i]
                softmax_backward_row(
                    scores, grad_weights, i * width, seen, scale, shift, lo, hi, weights, grad_scores, i * width
                )
            panels.pack_left(grad_scores.reshape(-1), 0, width, True, end, rows, left)
            panels.product(left, end, keys_t, panels.panel_size(length), rows, dim, grad_q, row_at, dim)
            panels.pack_left(grad_scores.reshape(-1), 0, width, False, rows, end, left_t)
            panels.pack_right(q, row_at, dim, False, rows, dim, right)
            panels.float_product(left_t, rows, right, panels.panel_size(rows), end, dim, sum_k, True)
            panels.pack_left(weights.reshape(-1), 0, width, False, rows, end, left_t)
            panels.pack_right(grad, v_row_at, v_dim, False, rows, v_dim, right)
            panels.float_product(left_t, rows, right, panels.panel_size(rows), end, v_dim, sum_v, True)
        panels.give_tiles()
        _round(sum_k, grad_k, at, length, dim)
        _round(sum_v, grad_v, v_at, length, v_dim)
