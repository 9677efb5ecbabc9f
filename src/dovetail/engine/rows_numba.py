"""CPU kernels for a few rows at a time: decoding and the verification of drafts.

One call does a whole half of a block, on x [R, dim] FP32 in place. Weights are read once for all rows, straight
from the model's tensors; activations stay FP32. Attention is the absorbed form of `model.mla`, head by head:
query, scores over the cache, mixture of latents and value projection of one head and row need nothing from
another, so they are one parallel loop.

What a row computes does not depend on which rows are beside it: each output is one `dot` in one order. So a
token verified together with others has bit for bit the logits of a token decoded alone.

Letters: R rows, C latent width, E experts, K choices, I width of an expert.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from numba.extending import register_jitable

from dovetail.model.gate_numba import select_row
from dovetail.numerics.cpu_numba import exp, kernel, load, sigmoid, store

OUTPUTS = 16  # outputs per piece of work where experts are summed: long enough runs of each weight


@register_jitable
def dot(weights, x):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for i in range(len(x)):
        total += load(weights, i) * x[i]
    return total


@register_jitable
def mix(factors, rows, total):  # type: ignore[no-untyped-def]
    """total [C] = sum over n of factors[n] * rows[n, :C], four rows at a time to spare loads and stores of total."""
    width = len(total)
    total[:] = np.float32(0.0)
    whole = len(factors) // 4 * 4
    for n in range(0, whole, 4):
        a, b, c, d = factors[n], factors[n + 1], factors[n + 2], factors[n + 3]
        # Sliced after the row is picked: a slice of columns first would lose the unit stride.
        r0, r1, r2, r3 = rows[n, :width], rows[n + 1, :width], rows[n + 2, :width], rows[n + 3, :width]
        for i in range(width):
            total[i] += a * load(r0, i) + b * load(r1, i) + c * load(r2, i) + d * load(r3, i)
    for n in range(whole, len(factors)):
        f, row = factors[n], rows[n, :width]
        for i in range(width):
            total[i] += f * load(row, i)


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
def attend(query, keys, scale, scores, mixed):  # type: ignore[no-untyped-def]
    """mixed [C] = softmax(scale keys query) keys[:, :C] for query [C + rope], keys [S, C + rope]."""
    top = np.float32(-np.inf)
    for s in range(len(scores)):
        scores[s] = dot(keys[s], query) * scale
        top = max(top, scores[s])
    total = np.float32(0.0)
    for s in range(len(scores)):
        scores[s] = exp(scores[s] - top)
        total += scores[s]
    for s in range(len(scores)):
        scores[s] /= total
    mix(scores, keys, mixed)


@kernel
def attention(  # type: ignore[no-untyped-def]
    x, eps, norm_weight, q_a, q_a_norm, q_b, kv_a, kv_a_norm, kv_b, o, cache, slots, positions, cos, sin, scale, heads
):
    """x += attention(norm(x)); cache [slots, capacity, C + rope] gets the rows' entries. q_a has no rows where
    queries are not compressed."""
    rows, dim = x.shape
    rope = 2 * cos.shape[1]
    latent, q_rank = cache.shape[2] - rope, q_a.shape[0]
    head_dim = q_b.shape[0] // heads
    nope, per_head = head_dim - rope, kv_b.shape[0] // heads
    width = per_head - nope
    normed = norm_rows(x, norm_weight, eps)
    low = np.empty((rows, q_rank + latent + rope), dtype=np.float32)
    for n in prange(low.shape[1]):
        weights = q_a[n] if n < q_rank else kv_a[n - q_rank]
        for r in range(rows):
            low[r, n] = dot(weights, normed[r])
    queries = norm_rows(low[:, :q_rank].copy(), q_a_norm, eps) if q_rank else normed
    entry = np.empty(latent + rope, dtype=np.float32)
    for r in range(rows):
        norm(low[r, q_rank : q_rank + latent], kv_a_norm, eps, entry[:latent])
        rotate(low[r, q_rank + latent :], cos[r], sin[r], entry[latent:])
        to = cache[slots[r], positions[r]]
        for i in range(len(entry)):
            store(to, i, entry[i])
    values = np.empty((rows, heads * width), dtype=np.float32)
    for item in prange(heads * rows):
        h, r = item // rows, item % rows
        q = np.empty(head_dim, dtype=np.float32)
        for i in range(head_dim):
            q[i] = dot(q_b[h * head_dim + i], queries[r])
        absorbed = np.empty(latent + rope, dtype=np.float32)
        mix(q[:nope], kv_b[h * per_head : h * per_head + nope], absorbed[:latent])
        rotate(q[nope:], cos[r], sin[r], absorbed[latent:])
        keys = cache[slots[r], : positions[r] + 1]
        mixed = np.empty(latent, dtype=np.float32)
        attend(absorbed, keys, scale, np.empty(len(keys), dtype=np.float32), mixed)
        for i in range(width):
            values[r, h * width + i] = dot(kv_b[h * per_head + nope + i], mixed)
    for n in prange(dim):
        for r in range(rows):
            x[r, n] += dot(o[n], values[r])


@kernel
def dense(x, eps, norm_weight, gate_up, down):  # type: ignore[no-untyped-def]
    """x += down(swiglu(gate_up(norm(x))))."""
    rows, dim = x.shape
    width = down.shape[1]
    normed = norm_rows(x, norm_weight, eps)
    act = np.empty((rows, width), dtype=np.float32)
    for n in prange(width):
        for r in range(rows):
            gate = dot(gate_up[n], normed[r])
            act[r, n] = gate * sigmoid(gate) * dot(gate_up[width + n], normed[r])
    for n in prange(dim):
        for r in range(rows):
            x[r, n] += dot(down[n], act[r])


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
    select_row(scores + bias, ids, groups, kept_groups, best)
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
    for e in prange(num_experts):
        for r in range(rows):
            logits[r, e] = dot(router[e], normed[r])
    ids = np.empty((rows, choices), dtype=np.int64)
    weights = np.empty((rows, choices), dtype=np.float32)
    for r in range(rows):
        route_row(logits[r], bias, ids[r], weights[r], gate)
    used, starts, pairs = group_pairs(ids, num_experts)
    act = np.empty((rows * choices, width), dtype=np.float32)
    shared = np.empty((rows, shared_width), dtype=np.float32)
    for n in prange(len(used) * width + shared_width):
        if n < len(used) * width:
            i, j = n // width, n % width
            w = gate_up[used[i]]
            for p in range(starts[i], starts[i + 1]):
                row = normed[pairs[p] // choices]
                g = dot(w[j], row)
                act[pairs[p], j] = g * sigmoid(g) * dot(w[width + j], row)
        else:
            j = n - len(used) * width
            for r in range(rows):
                g = dot(shared_gate_up[j], normed[r])
                shared[r, j] = g * sigmoid(g) * dot(shared_gate_up[shared_width + j], normed[r])
    for block in prange((dim + OUTPUTS - 1) // OUTPUTS):
        first, last = block * OUTPUTS, min((block + 1) * OUTPUTS, dim)
        for i in range(len(used)):
            w = down[used[i]]
            for n in range(first, last):
                for p in range(starts[i], starts[i + 1]):
                    r = pairs[p] // choices
                    x[r, n] += weights.flat[pairs[p]] * dot(w[n], act[pairs[p]])
        for n in range(first, last):
            for r in range(rows):
                x[r, n] += dot(shared_down[n], shared[r])


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
        for r in range(rows):
            out[r, n] = dot(eh_proj[n], both[r])
    return out


@kernel
def embed(embedding, tokens):  # type: ignore[no-untyped-def]
    out = np.empty((len(tokens), embedding.shape[1]), dtype=np.float32)
    for r in range(len(tokens)):
        for i in range(out.shape[1]):
            out[r, i] = load(embedding[tokens[r]], i)
    return out


@kernel
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
        for r in range(rows):
            logits[r, n] = dot(weights[n], wide[r])
