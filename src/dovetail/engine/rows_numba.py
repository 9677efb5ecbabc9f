"""CPU kernels for a few rows at a time: decoding and the verification of drafts.

One call does a whole half of a block, on x [R, dim] FP32 in place. Weights are read once for all rows, straight
from the model's tensors; activations stay FP32. Attention is the absorbed form of `model.attention.mla`.

What a row computes does not depend on which rows are beside it: `dots` and `mix` promise it for one output, and
sums over experts go by the experts' numbers. So a token verified together with others has bit for bit the logits
of a token decoded alone.

Letters: R rows, C latent width, E experts, K choices, I width of an expert.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from numba.extending import register_jitable

from dovetail.model.experts.gate_numba import select_row
from dovetail.numerics.cpu.dots_numba import dots, mix
from dovetail.numerics.cpu.kernels import kernel, serial_kernel
from dovetail.numerics.cpu.scalars_numba import exp, from_ordered, load, ordered, sigmoid, store

HEADS = 4  # heads of a row that attend together
OUTPUTS = 64  # most outputs per piece of work where experts are summed: long runs of each expert's weights


@register_jitable
def norm(x, weight, eps, out):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for i in range(len(x)):
        total += x[i] * x[i]
    r = np.float32(1.0) / np.sqrt(total / np.float32(len(x)) + eps)
    for i in range(len(x)):
        out[i] = x[i] * r * weight[i]


@register_jitable
def rotate(x, cos, sin, out):  # type: ignore[no-untyped-def]
    for i in range(len(cos)):
        even, odd = x[2 * i], x[2 * i + 1]
        out[2 * i] = even * cos[i] - odd * sin[i]
        out[2 * i + 1] = even * sin[i] + odd * cos[i]


@register_jitable
def norm_rows(x, weight, eps):  # type: ignore[no-untyped-def]
    out = np.empty_like(x)
    for r in range(x.shape[0]):
        norm(x[r], weight, eps, out[r])
    return out


@register_jitable
def soften(scores, scale):  # type: ignore[no-untyped-def]
    """scores become softmax(scale * scores)."""
    key = ordered(np.float32(-np.inf))
    for s in range(len(scores)):
        scores[s] *= scale
        key = max(key, ordered(scores[s]))
    top, total = from_ordered(key), np.float32(0.0)
    for s in range(len(scores)):
        scores[s] = exp(scores[s] - top)
        total += scores[s]
    for s in range(len(scores)):
        scores[s] /= total


@kernel
def attention(  # type: ignore[no-untyped-def]
    x, eps, norm_weight, q_a, q_a_norm, q_b, kv_a, kv_a_norm, kv_b, o, cache, slots, positions, cos, sin, scale, heads
):
    """x += attention(norm(x)); cache [slots, capacity, C + rope] gets the rows' entries. q_a has no rows where
    queries are not compressed."""
    rows, dim = x.shape
    rope = 2 * cos.shape[1]
    entry, q_rank = cache.shape[2], q_a.shape[0]
    latent = entry - rope
    head_dim = q_b.shape[0] // heads
    nope, per_head = head_dim - rope, kv_b.shape[0] // heads
    width = per_head - nope
    normed = norm_rows(x, norm_weight, eps)
    low = np.empty((rows, q_rank + entry), dtype=np.float32)
    for n in prange(q_rank + entry):
        if n < q_rank:
            dots(q_a, n, normed, 0, rows, low, n, q_rank + entry)
        else:
            dots(kv_a, n - q_rank, normed, 0, rows, low, n, q_rank + entry)
    compressed = norm_rows(low[:, :q_rank].copy(), q_a_norm, eps) if q_rank else normed
    new = np.empty(entry, dtype=np.float32)
    for r in range(rows):
        norm(low[r, q_rank : q_rank + latent], kv_a_norm, eps, new[:latent])
        rotate(low[r, q_rank + latent :], cos[r], sin[r], new[latent:])
        to = cache[slots[r], positions[r]]
        for i in range(entry):
            store(to, i, new[i])
    # Queries in the space of the cache, one head at a time for all rows: [rows * heads, entry].
    absorbed = np.empty((rows * heads, entry), dtype=np.float32)
    for h in prange(heads):
        q = np.empty((rows, head_dim), dtype=np.float32)
        for i in range(head_dim):
            dots(q_b, h * head_dim + i, compressed, 0, rows, q, i, head_dim)
        moved = np.empty((rows, latent), dtype=np.float32)
        mix(q, 0, rows, nope, kv_b, h * per_head, latent, moved, 0)
        for r in range(rows):
            absorbed[r * heads + h, :latent] = moved[r]
            rotate(q[r, nope:], cos[r], sin[r], absorbed[r * heads + h, latent:])
    # A few heads at a time, so that each key is loaded once for all of them.
    keys = cache.reshape((-1, entry))
    groups = max(min(heads, 2), (heads + HEADS - 1) // HEADS)
    mixed = np.empty((heads * rows, latent), dtype=np.float32)
    for item in prange(rows * groups):
        r, group = item // groups, item % groups
        start, stop = group * heads // groups, (group + 1) * heads // groups
        num_keys, row = positions[r] + 1, slots[r] * cache.shape[1]
        scores = np.empty((stop - start, num_keys), dtype=np.float32)
        for s in range(num_keys):
            dots(keys, row + s, absorbed, r * heads + start, stop - start, scores, s, num_keys)
        for h in range(stop - start):
            soften(scores[h], scale)
        out = np.empty((stop - start, latent), dtype=np.float32)
        mix(scores, 0, stop - start, num_keys, keys, row, latent, out, 0)
        for h in range(stop - start):
            mixed[(start + h) * rows + r] = out[h]
    values = np.empty((rows, heads * width), dtype=np.float32)
    for n in prange(heads * width):
        h, i = n // width, n % width
        dots(kv_b, h * per_head + nope + i, mixed, h * rows, rows, values, n, heads * width)
    out = np.empty((rows, dim), dtype=np.float32)
    for n in prange(dim):
        dots(o, n, values, 0, rows, out, n, dim)
    x += out


@kernel
def dense(x, eps, norm_weight, gate_up, down):  # type: ignore[no-untyped-def]
    """x += down(swiglu(gate_up(norm(x))))."""
    rows, dim = x.shape
    width = down.shape[1]
    normed = norm_rows(x, norm_weight, eps)
    act = np.empty((2 * rows, width), dtype=np.float32)  # gates of all rows, then ups
    for n in prange(width):
        swiglu(gate_up, n, width + n, normed, 0, rows, act, rows, n)
    out = np.empty((rows, dim), dtype=np.float32)
    for n in prange(dim):
        dots(down, n, act, 0, rows, out, n, dim)
    x += out


@register_jitable
def swiglu(weights, gate, up, x, first, count, act, spare, n):  # type: ignore[no-untyped-def]
    """act[first + i, n] for i < count, of x[first + i] and the weights' rows `gate` and `up`; rows of act from
    `spare` on are room to work in."""
    width = act.shape[1]
    dots(weights, gate, x, first, count, act, first * width + n, width)
    dots(weights, up, x, first, count, act, (spare + first) * width + n, width)
    for i in range(first, first + count):
        g = act[i, n]
        act[i, n] = g * sigmoid(g) * act[spare + i, n]


@register_jitable
def route_row(scores, bias, ids, weights, gate):  # type: ignore[no-untyped-def]
    """scores [E] become sigmoid or softmax; ids and weights [K] of the chosen. `gate`: see `engine.fused`."""
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
    x, eps, norm_weight, router, bias, gate_up, down, shared_gate_up, shared_down, choices, gate
):
    """x += routed + shared experts of norm(x); router [E, dim], gate_up [E, 2I, dim], down [E, dim, I]."""
    rows, dim = x.shape
    num_experts, width, shared_width = down.shape[0], down.shape[2], shared_down.shape[1]
    normed = norm_rows(x, norm_weight, eps)
    logits = np.empty((rows, num_experts), dtype=np.float32)
    for e in range(num_experts):
        dots(router, e, normed, 0, rows, logits, e, num_experts)
    ids = np.empty((rows, choices), dtype=np.int64)
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
    for n in prange(len(used) * width + shared_width):
        if n < len(used) * width:
            i, j = n // width, n % width
            row = used[i] * 2 * width + j
            swiglu(up_rows, row, row + width, grouped, starts[i], starts[i + 1] - starts[i], act, num_pairs, j)
        else:
            j = n - len(used) * width
            swiglu(shared_gate_up, j, shared_width + j, normed, 0, rows, shared, rows, j)
    piece = min(OUTPUTS, (dim + 7) // 8)  # but at least eight pieces, for the threads
    for block in prange((dim + piece - 1) // piece):
        first, last = block * piece, min((block + 1) * piece, dim)
        out = np.empty((max(num_pairs, rows), last - first), dtype=np.float32)
        for i in range(len(used)):
            for n in range(first, last):
                at = starts[i] * (last - first) + n - first
                count = starts[i + 1] - starts[i]
                dots(down_rows, used[i] * dim + n, act, starts[i], count, out, at, last - first)
        # A row's choices are added in the order of their experts' numbers, whatever other rows chose.
        for p in range(num_pairs):
            weight, to = weights.flat[pairs[p]], x[pairs[p] // choices, first:last]
            for n in range(last - first):
                to[n] += weight * out[p, n]
        if shared_width:
            for n in range(first, last):
                dots(shared_down, n, shared, 0, rows, out, n - first, last - first)
            x[:, first:last] += out[:rows]


@kernel
def join(embedding, hidden, tokens, eps, enorm, hnorm, eh_proj):  # type: ignore[no-untyped-def]
    """The input of an MTP module's block: eh_proj([enorm(embedding[tokens]); hnorm(hidden)])."""
    rows, dim = hidden.shape
    both = np.empty((rows, 2 * dim), dtype=np.float32)
    wide = np.empty(dim, dtype=np.float32)
    for r in range(rows):
        for i in range(dim):
            wide[i] = load(embedding[tokens[r]], i)
        norm(wide, enorm, eps, both[r, :dim])
        for i in range(dim):
            wide[i] = load(hidden[r], i)
        norm(wide, hnorm, eps, both[r, dim:])
    out = np.empty((rows, dim), dtype=np.float32)
    for n in prange(dim):
        dots(eh_proj, n, both, 0, rows, out, n, dim)
    return out


@serial_kernel
def embed(embedding, tokens):  # type: ignore[no-untyped-def]
    out = np.empty((len(tokens), embedding.shape[1]), dtype=np.float32)
    for r in range(len(tokens)):
        for i in range(out.shape[1]):
            out[r, i] = load(embedding[tokens[r]], i)
    return out


@serial_kernel
def finish(x, weight, eps, out):  # type: ignore[no-untyped-def]
    """out = norm(x), rounded to the model's format."""
    normed = norm_rows(x, weight, eps)
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            store(out[r], i, normed[r, i])


@kernel
def head(hidden, weights, logits):  # type: ignore[no-untyped-def]
    """logits [R, vocab] FP32 of hidden [R, dim] in the model's format."""
    rows, dim = hidden.shape
    wide = np.empty((rows, dim), dtype=np.float32)
    for r in range(rows):
        for i in range(dim):
            wide[r, i] = load(hidden[r], i)
    for n in prange(weights.shape[0]):
        dots(weights, n, wide, 0, rows, logits, n, weights.shape[0])
