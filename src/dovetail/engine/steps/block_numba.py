"""CPU kernels of `tiled`: what stands around attention in a block, with AVX-512 BF16.

Activations are BF16 between operations, as in `model`; each operation computes in FP32 and rounds once. Products are
batch-invariant. What a row computes depends on no other row.

Letters: R rows, H heads, D = nope + rope, C latent width, E experts, K choices, I width of an expert.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from numba.extending import register_jitable

from dovetail.engine.steps.row_experts_numba import group_pairs, route_row
from dovetail.engine.steps.rows_numba import norm as norm_row
from dovetail.engine.steps.rows_numba import rotate
from dovetail.numerics.cpu.dots_numba import products
from dovetail.numerics.cpu.kernels import kernel, serial_kernel
from dovetail.numerics.cpu.scalars_numba import copy, load, sigmoid, store
from dovetail.numerics.products.invariant_numba import alone, both, linear, linear_twice

FEW = 4  # rows that one thread is done with before others have woken up


@kernel
def norm(x, weight, eps):  # type: ignore[no-untyped-def]
    out = np.empty_like(x)
    if len(x) <= FEW:
        for r in range(len(x)):
            norm_row(x[r], weight, eps, out[r])
    else:
        for r in prange(len(x)):
            norm_row(x[r], weight, eps, out[r])
    return out


@register_jitable
def keep_row(both, weight, eps, cos, sin, entry):  # type: ignore[no-untyped-def]
    """entry = [norm(latent); rotated key] of both, which has them side by side."""
    latent = len(both) - 2 * len(cos)
    norm_row(both[:latent], weight, eps, entry[:latent])
    entry[latent:] = both[latent:]
    rotate(entry[latent:], cos, sin, entry[latent:])


@register_jitable
def rotate_heads(queries, heads, cos, sin):  # type: ignore[no-untyped-def]
    dim = len(queries) // heads
    for h in range(heads):
        turned = queries[(h + 1) * dim - 2 * len(cos) : (h + 1) * dim]
        rotate(turned, cos, sin, turned)


@kernel
def project(  # type: ignore[no-untyped-def]
    x, wanted, eps, norm_weight, q_a, q_a_norm, q_b, kv_a, kv_a_norm, cos, sin, places, entries, heads, threads
):
    """entries[places] get the latents and rotary keys of x [R, dim] -> rotated queries [W, H, D] of the rows wanted
    [W]. q_a has no rows where queries are not compressed."""
    normed = norm(x, norm_weight, eps)
    few = normed if len(wanted) == len(x) else normed[wanted]
    if len(q_a):
        low, latents = linear_twice(few, q_a, normed, kv_a, threads)
        queries = linear(norm(low, q_a_norm, eps), q_b, threads)
    else:
        queries, latents = linear_twice(few, q_b, normed, kv_a, threads)
    if len(x) <= FEW:
        for r in range(len(x)):
            keep_row(latents[r], kv_a_norm, eps, cos[r], sin[r], entries[places[r]])
        for w in range(len(wanted)):
            rotate_heads(queries[w], heads, cos[wanted[w]], sin[wanted[w]])
    else:
        for r in prange(len(x)):
            keep_row(latents[r], kv_a_norm, eps, cos[r], sin[r], entries[places[r]])
        for w in prange(len(wanted)):
            rotate_heads(queries[w], heads, cos[wanted[w]], sin[wanted[w]])
    return queries.reshape((len(wanted), heads, -1))


# Loops that store are compiled without fast arithmetic, for the reason that `scale_row` gives.


@register_jitable(fastmath=False)
def add(x, y):  # type: ignore[no-untyped-def]
    for i in range(len(x)):
        store(x, i, load(x, i) + load(y, i))


@kernel
def add_rows(x, y):  # type: ignore[no-untyped-def]
    if len(x) <= FEW:
        for r in range(len(x)):
            add(x[r], y[r])
    else:
        for r in prange(len(x)):
            add(x[r], y[r])


@serial_kernel
def add_product(x, y, weight, threads):  # type: ignore[no-untyped-def]
    """x += y weight^T."""
    add_rows(x, linear(y, weight, threads))


@register_jitable(fastmath=False)
def gated_row(gate, up, out):  # type: ignore[no-untyped-def]
    for i in range(len(out)):
        g = load(gate, i)
        store(out, i, g * sigmoid(g) * load(up, i))


@kernel
def gated(both):  # type: ignore[no-untyped-def]
    """SwiGLU of [R, 2 I], gates first -> [R, I]."""
    width = both.shape[1] // 2
    act = np.empty((len(both), width), np.uint16)
    if len(both) <= FEW:
        for r in range(len(both)):
            gated_row(both[r, :width], both[r, width:], act[r])
    else:
        for r in prange(len(both)):
            gated_row(both[r, :width], both[r, width:], act[r])
    return act


@register_jitable(fastmath=False)
def weigh_row(total, weight, x):  # type: ignore[no-untyped-def]
    """total += weight * x, in FP32."""
    for i in range(len(total)):
        total[i] += weight * load(x, i)


@register_jitable(fastmath=False)
def round_row(x):  # type: ignore[no-untyped-def]
    out = np.empty(len(x), np.uint16)
    for i in range(len(x)):
        store(out, i, x[i])
    return out


@serial_kernel
def dense(x, eps, norm_weight, gate_up, down, threads):  # type: ignore[no-untyped-def]
    """x += down(swiglu(gate_up(norm(x))))."""
    add_rows(x, linear(gated(linear(norm(x, norm_weight, eps), gate_up, threads)), down, threads))


@kernel
def join(embedded, hidden, eps, enorm, hnorm, eh_proj, threads):  # type: ignore[no-untyped-def]
    """The input of an MTP module's block [R, dim]: eh_proj([enorm(embedded); hnorm(hidden)])."""
    rows, dim = hidden.shape
    pairs = np.empty((rows, 2 * dim), np.uint16)
    for r in prange(rows):
        norm_row(embedded[r], enorm, eps, pairs[r, :dim])
        norm_row(hidden[r], hnorm, eps, pairs[r, dim:])
    return linear(pairs, eh_proj, threads)


@kernel
def gathered(x, rows):  # type: ignore[no-untyped-def]
    """x[rows]."""
    out = np.empty((len(rows), x.shape[1]), np.uint16)
    if len(rows) <= FEW * FEW:
        for r in range(len(rows)):
            copy(x[rows[r]], out[r])
    else:
        for r in prange(len(rows)):
            copy(x[rows[r]], out[r])
    return out


@register_jitable
def route_one(normed, router, bias, ids, weights, gate):  # type: ignore[no-untyped-def]
    wide, logits = np.empty((1, len(normed)), np.float32), np.empty((1, len(router)), np.float32)
    for i in range(len(normed)):
        wide[0, i] = load(normed, i)
    products(router, 0, len(router), wide, 0, 1, logits, 0, len(router))
    route_row(logits[0], bias, ids, weights, gate)


@register_jitable
def combine_one(x, routed, where, weights, shared):  # type: ignore[no-untyped-def]
    """x += the weighted sum of rows where[k] of routed, rounded, + shared."""
    total = np.zeros(len(x), np.float32)
    for k in range(len(weights)):
        weigh_row(total, weights[k], routed[where[k]])
    out = round_row(total)
    add(out, shared)
    add(x, out)


@kernel
def experts(  # type: ignore[no-untyped-def]
    x, eps, norm_weight, router, bias, gate_up, down, shared_gate_up, shared_down, ids, gate, threads
):
    """x += routed + shared experts of norm(x); router [E, dim], gate_up [E, 2I, dim], down [E, dim, I]; ids [R, K]
    become the experts chosen."""
    rows, choices = ids.shape
    normed, weights = norm(x, norm_weight, eps), np.empty((rows, choices), np.float32)
    if rows <= FEW:
        for r in range(rows):
            route_one(normed[r], router, bias, ids[r], weights[r], gate)
    else:
        for r in prange(rows):
            route_one(normed[r], router, bias, ids[r], weights[r], gate)
    used, bounds, pairs = group_pairs(ids, len(router))
    where = np.empty(len(pairs), np.int64)
    for p in range(len(pairs)):
        where[pairs[p]] = p
    width, shared_width = gate_up.shape[1], len(shared_gate_up)
    inner, shared_inner = np.empty((len(pairs), width), np.uint16), np.empty((rows, shared_width), np.uint16)
    chosen = gathered(normed, pairs // choices)
    both(chosen, gate_up, used, bounds, inner, normed, alone(shared_gate_up), shared_inner, threads)
    routed, shared = np.empty((len(pairs), x.shape[1]), np.uint16), np.empty((rows, x.shape[1]), np.uint16)
    both(gated(inner), down, used, bounds, routed, gated(shared_inner), alone(shared_down), shared, threads)
    if rows <= FEW:
        for r in range(rows):
            combine_one(x[r], routed, where[r * choices : (r + 1) * choices], weights[r], shared[r])
    else:
        for r in prange(rows):
            combine_one(x[r], routed, where[r * choices : (r + 1) * choices], weights[r], shared[r])
