"""CPU kernels for a few rows at a time: the feed-forward of a block, dense or of experts.

See `rows_numba`, whose promise they keep.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from numba.extending import register_jitable

from dovetail.engine.steps.rows_numba import BLOCK, blocks, norm_rows, product_block
from dovetail.model.experts.gate_numba import select_row
from dovetail.numerics.cpu.dots_numba import products
from dovetail.numerics.cpu.kernels import kernel
from dovetail.numerics.cpu.scalars_numba import exp, sigmoid

OUTPUTS = 64  # most outputs per piece of work where experts are summed: long runs of each expert's weights


@kernel
def dense(x, eps, norm_weight, gate_up, down):  # type: ignore[no-untyped-def]
    """x += down(swiglu(gate_up(norm(x))))."""
    rows, dim = x.shape
    width = down.shape[1]
    normed = norm_rows(x, norm_weight, eps)
    act = np.empty((2 * rows, width), dtype=np.float32)  # gates of all rows, then ups
    for block in prange(blocks(width)):
        swiglu(gate_up, 0, normed, 0, rows, act, rows, block)
    out = np.empty((rows, dim), dtype=np.float32)
    for block in prange(blocks(dim)):
        product_block(down, block, act[:rows], out, 0)
    x += out


@register_jitable
def swiglu(weights, gate, x, first, count, act, spare, block):  # type: ignore[no-untyped-def]
    """act[first + i, n] for i < count and n of a block, of x[first + i] and two matrices that lie one after the other.

    Row n of the first is weights[gate + n]. Rows of act from `spare` on are room to work in."""
    width = act.shape[1]
    begin = block * BLOCK
    num = min(BLOCK, width - begin)
    products(weights, gate + begin, num, x, first, count, act, first * width + begin, width)
    products(weights, gate + width + begin, num, x, first, count, act, (spare + first) * width + begin, width)
    for i in range(first, first + count):
        for n in range(begin, begin + num):
            g = act[i, n]
            act[i, n] = g * sigmoid(g) * act[spare + i, n]


@register_jitable
def route_row(scores, bias, ids, weights, gate):  # type: ignore[no-untyped-def]
    """scores [E] become sigmoid or softmax; ids and weights [K] of the chosen. `gate`: see `engine.steps.fused`."""
    groups, kept_groups, best, is_sigmoid, is_normed, factor = gate
    if is_sigmoid:
        for e in range(len(scores)):
            scores[e] = sigmoid(scores[e])
    else:
        top, total = scores.max(), np.float32(0.0)
        for e in range(len(scores)):
            scores[e] = exp(scores[e] - top)
            total += scores[e]
        for e in range(len(scores)):
            scores[e] /= total
    worth, kept = np.empty(groups, np.float32), np.empty(groups, np.bool_)
    select_row(scores + bias, ids, kept_groups, best, worth, kept)
    total = np.float32(1e-20)
    for k in range(len(ids)):
        weights[k] = scores[ids[k]]
        total += weights[k]
    for k in range(len(ids)):
        weights[k] *= factor / total if is_normed else factor


@register_jitable
def group_pairs(ids, num_experts):  # type: ignore[no-untyped-def]
    """Experts in use, and the pairs (row K + choice) of each: pairs[starts[i] : starts[i + 1]]."""
    counts = np.zeros(num_experts, dtype=np.int64)
    for pair in range(ids.size):
        counts[ids.flat[pair]] += 1
    used = np.nonzero(counts)[0]
    starts = np.zeros(len(used) + 1, dtype=np.int64)
    place = np.empty(num_experts, dtype=np.int64)
    for i in range(len(used)):
        place[used[i]] = starts[i]
        starts[i + 1] = starts[i] + counts[used[i]]
    pairs = np.empty(ids.size, dtype=np.int64)
    for pair in range(ids.size):
        e = ids.flat[pair]
        pairs[place[e]] = pair
        place[e] += 1
    return used, starts, pairs


@kernel
def experts(  # type: ignore[no-untyped-def]
    x, eps, norm_weight, router, bias, gate_up, down, shared_gate_up, shared_down, ids, gate
):
    """x += routed + shared experts of norm(x); router [E, dim], gate_up [E, 2I, dim], down [E, dim, I]; ids [R, K]
    become the experts chosen."""
    (rows, dim), choices = x.shape, ids.shape[1]
    num_experts, width, shared_width = down.shape[0], down.shape[2], shared_down.shape[1]
    normed = norm_rows(x, norm_weight, eps)
    logits = np.empty((rows, num_experts), dtype=np.float32)
    products(router, 0, num_experts, normed, 0, rows, logits, 0, num_experts)
    weights = np.empty((rows, choices), dtype=np.float32)
    for r in range(rows):
        route_row(logits[r], bias, ids[r], weights[r], gate)
    used, starts, pairs = group_pairs(ids, num_experts)
    num_pairs = len(pairs)
    grouped = np.empty((num_pairs, dim), dtype=np.float32)  # inputs in the order of `pairs`
    for p in range(num_pairs):
        grouped[p] = normed[pairs[p] // choices]
    act = np.empty((2 * num_pairs, width), dtype=np.float32)
    shared = np.empty((2 * rows, shared_width), dtype=np.float32)
    up_rows, down_rows = gate_up.reshape((-1, dim)), down.reshape((-1, width))
    routed_blocks = len(used) * blocks(width)
    for n in prange(routed_blocks + blocks(shared_width)):
        if n < routed_blocks:
            i, block = n // blocks(width), n % blocks(width)
            count = starts[i + 1] - starts[i]
            swiglu(up_rows, used[i] * 2 * width, grouped, starts[i], count, act, num_pairs, block)
        else:
            swiglu(shared_gate_up, 0, normed, 0, rows, shared, rows, n - routed_blocks)
    piece = min(OUTPUTS, (dim + 7) // 8)  # but at least eight pieces, for the threads
    for block in prange((dim + piece - 1) // piece):
        first, last = block * piece, min((block + 1) * piece, dim)
        out = np.empty((max(num_pairs, rows), last - first), dtype=np.float32)
        for i in range(len(used)):
            num, count = last - first, starts[i + 1] - starts[i]
            products(down_rows, used[i] * dim + first, num, act, starts[i], count, out, starts[i] * num, num)
        # A row's choices are added in the order of their experts' numbers, whatever other rows chose.
        for p in range(num_pairs):
            weight, to = weights.flat[pairs[p]], x[pairs[p] // choices, first:last]
            for n in range(last - first):
                to[n] += weight * out[p, n]
        if shared_width:
            products(shared_down, first, last - first, shared, 0, rows, out, 0, last - first)
            x[:, first:last] += out[:rows]
