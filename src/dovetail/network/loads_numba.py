"""Loads of links towards one leaf after another, compiled; `network.loads` says what they are."""

from __future__ import annotations

import numpy as np
from numba import njit

CUT_OFF = -1


@njit(cache=True)
def add_loads(into, out, ends, capacity, leaves, amounts, load):  # type: ignore[no-untyped-def]
    """Add to `load` [links] what `amounts` [leaves, switches] of flows to each of `leaves` put on links, sprayed over
    all shortest paths. `into` and `out` are links by the switch that they lead to and leave, as CSR; `ends` the
    switches that each link is from and to. Returns links on the longest path, or CUT_OFF."""
    switches, longest = len(into[0]) - 1, 0
    distance, order = np.empty(switches, np.int32), np.empty(switches, np.int32)
    width, left = np.empty(switches), np.empty(switches)
    for index in range(len(leaves)):
        reached = _search(into, ends, leaves[index], distance, order)
        for u in range(switches):
            if amounts[index, u] > 0:
                if distance[u] < 0:
                    return CUT_OFF
                longest = max(longest, distance[u])
        width[:], left[:] = 0.0, amounts[index]
        width[leaves[index]] = np.inf
        for place in range(1, reached):  # from near to far: what each switch can carry
            u = order[place]
            for q in range(out[0][u], out[0][u + 1]):
                v = ends[1][out[1][q]]
                if distance[v] == distance[u] - 1:
                    width[u] += min(capacity[out[1][q]], width[v])
        for place in range(reached - 1, 0, -1):  # from far to near: what each passes on
            u = order[place]
            if left[u] > 0:
                for q in range(out[0][u], out[0][u + 1]):
                    link = out[1][q]
                    v = ends[1][link]
                    if distance[v] == distance[u] - 1:
                        part = left[u] * min(capacity[link], width[v]) / width[u]
                        load[link] += part
                        left[v] += part
    return longest


@njit(cache=True)
def _search(into, ends, leaf, distance, order):  # type: ignore[no-untyped-def]
    """Breadth first from `leaf`: links to it (-1: no way) in `distance`, switches by that in `order`, and how many."""
    distance[:] = -1
    distance[leaf], order[0] = 0, leaf
    reached, place = 1, 0
    while place < reached:
        v = order[place]
        place += 1
        for q in range(into[0][v], into[0][v + 1]):
            u = ends[0][into[1][q]]
            if distance[u] < 0:
                distance[u] = distance[v] + 1
                order[reached] = u
                reached += 1
    return reached
