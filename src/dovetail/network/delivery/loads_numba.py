"""CPU kernel of `loads`: sums the flows towards one leaf after another over links."""

from __future__ import annotations

import numpy as np

from dovetail.kernel_cache import compiled

CUT_OFF = -1


@compiled()
def add_loads(into, out, ends, capacity, lengths, leaves, amounts, load):  # type: ignore[no-untyped-def]
    """Add the flows from all switches to each of `leaves`, sprayed over all shortest paths, to `load` [links].

    `amounts` [leaves, switches] are the flows. `into` and `out` are the links by the switch that they lead to and by
    the one that they leave, as CSR; `ends` are the switches at both ends of each link, and `lengths` those of
    `paths.lengths`. Returns the number of links on the longest path, or CUT_OFF.
    """
    switches, most = len(into[0]) - 1, 0
    distance, order, links = np.empty(switches, np.int32), np.empty(switches, np.int32), np.empty(switches, np.int32)
    width, left = np.empty(switches), np.empty(switches)
    for index in range(len(leaves)):
        reached = _search(into, ends, lengths, leaves[index], distance, order)
        for u in range(switches):
            if amounts[index, u] > 0 and distance[u] < 0:
                return CUT_OFF
        width[:], left[:], links[:] = 0.0, amounts[index], 0
        width[leaves[index]] = np.inf
        for place in range(1, reached):  # from near to far: the bandwidth that each switch has towards the leaf
            u = order[place]
            for q in range(out[0][u], out[0][u + 1]):
                link = out[1][q]
                v = ends[1][link]
                if distance[v] >= 0 and distance[v] == distance[u] - lengths[link]:
                    width[u] += min(capacity[link], width[v])
                    links[u] = max(links[u], links[v] + 1)
            if left[u] > 0:
                most = max(most, links[u])
        for place in range(reached - 1, 0, -1):  # from far to near: the flows that each switch passes on
            u = order[place]
            if left[u] > 0:
                for q in range(out[0][u], out[0][u + 1]):
                    link = out[1][q]
                    v = ends[1][link]
                    if distance[v] >= 0 and distance[v] == distance[u] - lengths[link]:
                        part = left[u] * min(capacity[link], width[v]) / width[u]
                        load[link] += part
                        left[v] += part
    return most


@compiled()
def _search(into, ends, lengths, leaf, distance, order):  # type: ignore[no-untyped-def]
    """Write the lengths of shortest paths to `leaf` into `distance` (-1 without a path), and the switches, nearest
    first, into `order`. Returns how many are reached."""
    distance[:] = -1
    distance[leaf] = 0
    reached, far, farthest = 0, 0, 0
    while far <= farthest:
        for v in range(len(distance)):
            if distance[v] == far:
                order[reached] = v
                reached += 1
                for q in range(into[0][v], into[0][v + 1]):
                    u, length = ends[0][into[1][q]], far + lengths[into[1][q]]
                    if distance[u] < 0 or distance[u] > length:
                        distance[u] = length
                        farthest = max(farthest, length)
        far += 1
    return reached
