"""CPU kernels of `flows`: max-min rates, the bytes of links, and a transpose.

Legend: L links, B bundles, F flows. An item is a link (id < L) or a bundle (id - L). The `state` of a flow is 1 while
its rate is wanted, and 0 otherwise. The first kernel follows `flows.fill_reference` line by line, with a heap of links
whose keys may be too low: a link's share of what is left only grows as others are filled, so the least true share is
found by computing the least key again.
"""

from __future__ import annotations

import heapq

import numpy as np

from dovetail.kernel_cache import compiled

AGAIN = 1e-3  # a sum that has shrunk to this share is computed anew, because subtraction loses digits
SAME = 1e-12  # a share that differs from its key by less than this counts as equal


@compiled()
def fill(left, routes, bundles, flows_of, bundles_of, wanted, state, rates, level):  # type: ignore[no-untyped-def]
    """Write the `rates` of the flows `wanted` within `left` bytes/s per link, which is reduced by what they take.
    No rate is below `level`, except on links that have nothing left."""
    num_links = len(left)
    offsets, items, shares = routes
    load = np.zeros(num_links + len(bundles[0]) - 1)
    for f in wanted:
        state[f] = 1
        for p in range(offsets[f], offsets[f + 1]):
            load[items[p]] += shares[p] if len(shares) else 1.0
    _spread(load, bundles, num_links)
    trusted = load[:num_links].copy()
    taken = np.zeros(len(bundles[0]) - 1)
    dropped = np.zeros(len(bundles[0]) - 1)
    touched = np.zeros(len(bundles[0]) - 1, dtype=np.int32)
    heap = [(max(left[link], 0.0) / load[link], link) for link in range(num_links) if load[link] > 0]
    heapq.heapify(heap)
    while len(heap):
        key, link = heapq.heappop(heap)
        if load[link] < AGAIN * trusted[link]:
            load[link] = _load(link, routes, bundles, flows_of, bundles_of, state, num_links)
            trusted[link] = load[link]
        if load[link] <= 0:
            continue
        share = max(left[link], 0.0) / load[link]
        if share > key * (1 + SAME):
            heapq.heappush(heap, (share, link))
            continue
        level = max(level, share) if share > 0 else level
        rate = level if share > 0 else 0.0
        num_touched = _fix(
            flows_of, link, rate, routes, num_links, state, rates, left, load, taken, dropped, touched, 0
        )
        for q in range(bundles_of[0][link], bundles_of[0][link + 1]):
            num_touched = _fix(
                flows_of,
                num_links + bundles_of[1][q],
                rate,
                routes,
                num_links,
                state,
                rates,
                left,
                load,
                taken,
                dropped,
                touched,
                num_touched,
            )
        for index in range(num_touched):
            b = touched[index]
            for q in range(bundles[0][b], bundles[0][b + 1]):
                left[bundles[1][q]] -= bundles[2][q] * taken[b]
                load[bundles[1][q]] -= bundles[2][q] * dropped[b]
            taken[b] = 0.0
            dropped[b] = 0.0


@compiled()
def _fix(  # type: ignore[no-untyped-def]
    flows_of, item, rate, routes, num_links, state, rates, left, load, taken, dropped, touched, num_touched
):
    """Give `rate` to the flows over `item` that still want one, and note their bundles, whose links follow later."""
    offsets, items, shares = routes
    for q in range(flows_of[0][item], flows_of[0][item + 1]):
        f = flows_of[1][q]
        if state[f] != 1:
            continue
        state[f] = 0
        rates[f] = rate
        for p in range(offsets[f], offsets[f + 1]):
            share = shares[p] if len(shares) else 1.0
            if items[p] < num_links:
                left[items[p]] -= share * rate
                load[items[p]] -= share
            else:
                b = items[p] - num_links
                if dropped[b] == 0.0:
                    touched[num_touched] = b
                    num_touched += 1
                taken[b] += share * rate
                dropped[b] += share
    return num_touched


@compiled()
def _load(link, routes, bundles, flows_of, bundles_of, state, num_links):  # type: ignore[no-untyped-def]
    """Return what the flows that still want a rate take of `link` per unit of rate. A flow that has an item more than
    once is listed that often, and looked at once."""
    offsets, items, shares = routes
    total = 0.0
    for q in range(flows_of[0][link], flows_of[0][link + 1]):
        f = flows_of[1][q]
        if state[f] == 1 and _is_first(q, flows_of, link):
            for p in range(offsets[f], offsets[f + 1]):
                if items[p] == link:
                    total += shares[p] if len(shares) else 1.0
    for z in range(bundles_of[0][link], bundles_of[0][link + 1]):
        b = bundles_of[1][z]
        if not _is_first(z, bundles_of, link):
            continue
        wants = 0.0
        for q in range(flows_of[0][num_links + b], flows_of[0][num_links + b + 1]):
            f = flows_of[1][q]
            if state[f] == 1 and _is_first(q, flows_of, num_links + b):
                for p in range(offsets[f], offsets[f + 1]):
                    if items[p] == num_links + b:
                        wants += shares[p] if len(shares) else 1.0
        if wants == 0.0:  # true of most when loads are computed anew
            continue
        for q in range(bundles[0][b], bundles[0][b + 1]):
            if bundles[1][q] == link:
                total += wants * bundles[2][q]
    return total


@compiled()
def _is_first(place, rows_of, item):  # type: ignore[no-untyped-def]
    """Return whether this is the first place of its row; rows are in order, so a repeated one follows itself."""
    return place == rows_of[0][item] or rows_of[1][place] != rows_of[1][place - 1]


@compiled()
def _spread(load, bundles, num_links):  # type: ignore[no-untyped-def]
    for b in range(len(bundles[0]) - 1):
        if load[num_links + b] > 0:
            for q in range(bundles[0][b], bundles[0][b + 1]):
                load[bundles[1][q]] += bundles[2][q] * load[num_links + b]


@compiled()
def carry(values, chosen, routes, bundles, num_links):  # type: ignore[no-untyped-def]
    """Return for each link the sum over the flows `chosen` of values[f] times the share of flow f on it."""
    offsets, items, shares = routes
    total = np.zeros(num_links + len(bundles[0]) - 1)
    for f in chosen:
        for p in range(offsets[f], offsets[f + 1]):
            total[items[p]] += values[f] * (shares[p] if len(shares) else 1.0)
    _spread(total, bundles, num_links)
    return total[:num_links]


@compiled()
def transpose(offsets, items, num_items):  # type: ignore[no-untyped-def]
    """Return the rows of each item, as CSR."""
    starts = np.zeros(num_items + 1, dtype=np.int64)
    for p in range(len(items)):
        starts[items[p] + 1] += 1
    for item in range(num_items):
        starts[item + 1] += starts[item]
    rows = np.empty(len(items), dtype=np.int32)
    place = starts[:-1].copy()
    for row in range(len(offsets) - 1):
        for p in range(offsets[row], offsets[row + 1]):
            rows[place[items[p]]] = row
            place[items[p]] += 1
    return starts, rows
