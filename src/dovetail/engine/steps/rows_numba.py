"""CPU kernels for a few rows at a time: decoding and the verification of drafts.

Here are attention, the head and what lies between; feed-forwards are in `row_experts_numba`.

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

from dovetail.numerics.cpu.dots_numba import dots, mix, products
from dovetail.numerics.cpu.kernels import kernel, serial_kernel
from dovetail.numerics.cpu.scalars_numba import exp, from_ordered, load, ordered, scale_row, store

HEADS = 4  # heads of a row that attend together
BLOCK = 16  # outputs per piece of work


@register_jitable
def norm(x, weight, eps, out):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for i in range(len(x)):
        value = load(x, i)
        total += value * value
    scale_row(x, np.float32(1.0) / np.sqrt(total / np.float32(len(x)) + eps), weight, out)


@register_jitable(fastmath=False)  # for the reason that `scale_row` gives
def rotate(x, cos, sin, out):  # type: ignore[no-untyped-def]
    """`out` may be x."""
    for i in range(len(cos)):
        even, odd = load(x, 2 * i), load(x, 2 * i + 1)
        store(out, 2 * i, even * cos[i] - odd * sin[i])
        store(out, 2 * i + 1, even * sin[i] + odd * cos[i])


@register_jitable
def norm_rows(x, weight, eps):  # type: ignore[no-untyped-def]
    out = np.empty_like(x)
    for r in range(x.shape[0]):
        norm(x[r], weight, eps, out[r])
    return out


@register_jitable(forceinline=True)
def blocks(outputs):  # type: ignore[no-untyped-def]
    return (outputs + BLOCK - 1) // BLOCK


@register_jitable
def product_block(w, block, x, out, column):  # type: ignore[no-untyped-def]
    """out[:, column + n] = x w[n] for the n of a block; x and w [., K], contiguous."""
    begin = block * BLOCK
    num = min(BLOCK, w.shape[0] - begin)
    products(w, begin, num, x, 0, x.shape[0], out, column + begin, out.shape[1])


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


@register_jitable
def key_places(table, num_keys, page):  # type: ignore[no-untyped-def]
    """Where the first positions of a sequence lie among all positions of all pages."""
    places = np.empty(num_keys, dtype=np.int64)
    for first in range(0, num_keys, page):
        place = table[first // page] * page
        for i in range(min(page, num_keys - first)):
            places[first + i] = place + i
    return places


@kernel
def attend_latents(queries, keys, page, tables, slots, positions, latent, scale):  # type: ignore[no-untyped-def]
    """Queries [R H, entry] over the keys [., entry] that their rows see -> mixtures of latents [H R, latent]."""
    rows = len(slots)
    heads = len(queries) // rows
    # A few heads at a time, so that each key is loaded once for all of them.
    groups = max(min(heads, 2), (heads + HEADS - 1) // HEADS)
    mixed = np.empty((heads * rows, latent), dtype=np.float32)
    for item in prange(rows * groups):
        r, group = item // groups, item % groups
        start, stop = group * heads // groups, (group + 1) * heads // groups
        num_keys = positions[r] + 1
        places = key_places(tables[slots[r]], num_keys, page)
        scores = np.empty((stop - start, num_keys), dtype=np.float32)
        for s in range(num_keys):
            dots(keys, places[s], queries, r * heads + start, stop - start, scores, s, num_keys)
        for h in range(stop - start):
            soften(scores[h], scale)
        out = np.empty((stop - start, latent), dtype=np.float32)
        mix(scores, 0, stop - start, num_keys, keys, places, latent, out, 0)
        for h in range(stop - start):
            mixed[(start + h) * rows + r] = out[h]
    return mixed


@kernel
def attention(  # type: ignore[no-untyped-def]
    x,
    eps,
    norm_weight,
    q_a,
    q_a_norm,
    q_b,
    kv_a,
    kv_a_norm,
    kv_b,
    o,
    cache,
    tables,
    slots,
    positions,
    cos,
    sin,
    scale,
    heads,
):
    """x += attention(norm(x)); cache [pages, page, C + rope] gets the rows' entries, in the pages that tables
    [slots, .] name. q_a has no rows where queries are not compressed."""
    rows, dim = x.shape
    rope = 2 * cos.shape[1]
    page, entry, q_rank = cache.shape[1], cache.shape[2], q_a.shape[0]
    latent = entry - rope
    head_dim = q_b.shape[0] // heads
    nope, per_head = head_dim - rope, kv_b.shape[0] // heads
    width = per_head - nope
    normed = norm_rows(x, norm_weight, eps)
    low = np.empty((rows, q_rank + entry), dtype=np.float32)
    query_blocks = blocks(q_rank)
    for block in prange(query_blocks + blocks(entry)):
        if block < query_blocks:
            product_block(q_a, block, normed, low, 0)
        else:
            product_block(kv_a, block - query_blocks, normed, low, q_rank)
    compressed = norm_rows(low[:, :q_rank].copy(), q_a_norm, eps) if q_rank else normed
    new = np.empty(entry, dtype=np.float32)
    for r in range(rows):
        norm(low[r, q_rank : q_rank + latent], kv_a_norm, eps, new[:latent])
        rotate(low[r, q_rank + latent :], cos[r], sin[r], new[latent:])
        to = cache[tables[slots[r], positions[r] // page], positions[r] % page]
        for i in range(entry):
            store(to, i, new[i])
    # Queries in the space of the cache, one head at a time for all rows: [rows * heads, entry].
    absorbed = np.empty((rows * heads, entry), dtype=np.float32)
    for h in prange(heads):
        q = np.empty((rows, head_dim), dtype=np.float32)
        products(q_b, h * head_dim, head_dim, compressed, 0, rows, q, 0, head_dim)
        moved = np.empty((rows, latent), dtype=np.float32)
        mix(q, 0, rows, nope, kv_b, h * per_head, latent, moved, 0)
        for r in range(rows):
            absorbed[r * heads + h, :latent] = moved[r]
            rotate(q[r, nope:], cos[r], sin[r], absorbed[r * heads + h, latent:])
    keys = cache.reshape((-1, entry))
    mixed = attend_latents(absorbed, keys, page, tables, slots, positions, latent, scale)
    values = np.empty((rows, heads * width), dtype=np.float32)
    for item in prange(heads * blocks(width)):
        h, begin = item // blocks(width), item % blocks(width) * BLOCK
        num = min(BLOCK, width - begin)
        products(
            kv_b, h * per_head + nope + begin, num, mixed, h * rows, rows, values, h * width + begin, heads * width
        )
    out = np.empty((rows, dim), dtype=np.float32)
    for block in prange(blocks(dim)):
        product_block(o, block, values, out, 0)
    x += out


@kernel
def join(embedding, hidden, tokens, eps, enorm, hnorm, eh_proj):  # type: ignore[no-untyped-def]
    """The input of an MTP module's block: eh_proj([enorm(embedding[tokens]); hnorm(hidden)])."""
    rows, dim = hidden.shape
    both = np.empty((rows, 2 * dim), dtype=np.float32)
    for r in range(rows):
        norm(embedding[tokens[r]], enorm, eps, both[r, :dim])
        norm(hidden[r], hnorm, eps, both[r, dim:])
    out = np.empty((rows, dim), dtype=np.float32)
    for block in prange(blocks(dim)):
        product_block(eh_proj, block, both, out, 0)
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
    for block in prange(blocks(weights.shape[0])):
        product_block(weights, block, wide, logits, 0)
