"""Builds slim flies and dragonflies, in which any two switches are few hops apart.

Slim fly (graphs of McKay, Miller and Siran; Besta and Hoefler, SC'14): q = 4 w + d a prime power, d in {-1, 0, 1}.
Switches are (0, x, y) and (1, m, c) over the field of q elements, 2 q^2 in all, with

    (0, x, y) = (0, x, y')  if y - y' is in X          X  = even powers of a generator
    (1, m, c) = (1, m, c')  if c - c' is in X'         X' = odd powers (for d = -1 both closed under negation)
    (0, x, y) = (1, m, c)   if y = m x + c

so each has (3 q - d) / 2 others as neighbours and reaches all in two hops. With half as many endpoints per switch,
rounded up, bandwidth and load are in balance.

Dragonfly (Kim et al., ISCA'08): g groups of a switches, which are all joined within the group. h ports of a switch lead
to other groups, and p to endpoints; in balance a = 2 p = 2 h. There are at most a h + 1 groups, with one cable between
each two. With fewer groups the remaining ports join groups of near numbers once more.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dovetail.network.fabric.finite_fields import field, powers_of_a_generator, prime_power
from dovetail.network.fabric.planes import Plane


def slim_fly(endpoints: int, radix: int, q: int | None = None, endpoints_per_switch: int | None = None) -> Plane:
    """Build a slim fly of the smallest q that holds the endpoints, or of `q`, with endpoints spread evenly.

    Raises ValueError for a q that is 2 or not a prime power, for more ports than `radix`, and for endpoints that do
    not fit.
    """
    if q is not None and not is_slim_fly_size(q):
        raise ValueError(f"q = {q}: a slim fly needs a prime power above 2; use {_nearest_sizes(q)}")
    if q is None:
        q = _smallest_size(endpoints, radix, endpoints_per_switch)
    neighbours, each = slim_fly_degree(q), slim_fly_endpoints(q, radix, endpoints_per_switch)
    if neighbours + max(each, 1) > radix:
        fitting = _largest_size(radix)
        remedy = f"radix = {neighbours + max(each, 1)}" + (f" or q = {fitting}" if fitting else "")
        raise ValueError(
            f"q = {q}: a switch has {neighbours} neighbours and {max(each, 1)} endpoints, more than radix = {radix}: "
            f"use {remedy}"
        )
    if endpoints > 2 * q * q * each:
        raise ValueError(
            f"endpoints = {endpoints}, but 2 x {q}^2 switches hold {each} each: at most {2 * q * q * each}"
        )
    switches = 2 * q * q
    return Plane(
        switches=switches,
        cables=_slim_fly_cables(q).astype(np.int32),
        layer=np.zeros(switches, np.int8),
        group=np.repeat(np.arange(2 * q, dtype=np.int32), q),
        attached=_spread(endpoints, switches),
    )


def slim_fly_degree(q: int) -> int:
    """Return the number of neighbours of a switch, (3 q - d) / 2."""
    return (3 * q - _delta(q)) // 2


def slim_fly_endpoints(q: int, radix: int, wanted: int | None = None) -> int:
    """Return the endpoints per switch: `wanted`, or half the number of neighbours, but no more than ports are left."""
    neighbours = slim_fly_degree(q)
    return wanted or max(0, min(-(-neighbours // 2), radix - neighbours))


def is_slim_fly_size(q: int) -> bool:
    return q > 2 and prime_power(q) is not None


def _delta(q: int) -> int:
    return {0: 0, 1: 1, 3: -1}[q % 4]


def _nearest_sizes(q: int) -> str:
    below = next((each for each in range(q - 1, 2, -1) if is_slim_fly_size(each)), None)
    above = next(each for each in range(max(q + 1, 3), 2 * q + 4) if is_slim_fly_size(each))
    return f"{below} or {above}" if below else f"{above}"


def _largest_size(radix: int) -> int | None:
    sizes = [q for q in range(3, radix) if is_slim_fly_size(q) and slim_fly_degree(q) < radix]
    return max(sizes, default=None)


def _smallest_size(endpoints: int, radix: int, wanted: int | None) -> int:
    most = 0
    for q in range(3, radix):
        if not is_slim_fly_size(q) or slim_fly_degree(q) + (wanted or 1) > radix:
            continue
        held = 2 * q * q * slim_fly_endpoints(q, radix, wanted)
        if held >= endpoints:
            return q
        most = max(most, held)
    raise ValueError(
        f"endpoints = {endpoints} on one plane: slim flies of {radix}-port switches hold at most {most}; "
        "use a larger radix or more planes"
    )


def _slim_fly_cables(q: int) -> NDArray[np.int64]:
    sums, products = field(q)
    powers = powers_of_a_generator(products)
    half = (q - _delta(q)) // 2  # elements of X and of X'
    if _delta(q) == -1:
        evens = [*range(0, half, 2), *range(half - 1, 2 * half - 2, 2)]
        odds = [*range(1, half, 2), *range(half, 2 * half - 1, 2)]
    else:
        evens, odds = [*range(0, 2 * half, 2)], [*range(1, 2 * half, 2)]
    even, odd = ([powers[each % (q - 1)] for each in exponents] for exponents in (evens, odds))
    x, y = np.divmod(np.arange(q * q), q)
    within = [
        part * q * q + np.column_stack([np.repeat(x * q + y, half), (x[:, None] * q + sums[y][:, steps]).ravel()])
        for part, steps in enumerate((even, odd))
    ]
    across = [np.column_stack([x * q + sums[products[m, x], y], q * q + m * q + y]) for m in range(q)]
    inside = np.concatenate(within)
    return np.concatenate([inside[inside[:, 0] < inside[:, 1]], *across])  # X = -X, so each cable is found twice


def dragonfly(
    endpoints: int,
    radix: int,
    *,
    groups: int | None = None,
    switches_per_group: int | None = None,
    global_per_switch: int | None = None,
    endpoints_per_switch: int | None = None,
) -> Plane:
    """Build the balanced dragonfly of `radix` with as few groups as hold the endpoints, which are spread evenly.

    Sizes that are given replace the balanced ones. Raises ValueError for more ports than `radix`, more groups than can
    be joined, and endpoints that do not fit.
    """
    h = global_per_switch or (switches_per_group // 2 if switches_per_group else (radix + 1) // 4)
    a, p = switches_per_group or 2 * h, endpoints_per_switch or max(h, 1)
    if h < 1 or a + h + p - 1 > radix:
        fit = (radix + 1) // 4
        remedy = f"h = {fit}, a = {2 * fit}, p = {fit}" if fit else "radix = 3, the least that a dragonfly needs"
        raise ValueError(
            f"dragonfly of a = {a}, h = {h}, p = {p} needs {a - 1} + {h} + {p} ports, radix = {radix}: use {remedy}"
        )
    g = groups or max(2, -(-endpoints // (a * p)))
    if g > a * h + 1 or endpoints > g * a * p:
        raise ValueError(
            f"{endpoints} endpoints in {g} groups of {a} x {p}: a = {a} and h = {h} join at most {a * h + 1} groups, "
            f"which hold {(a * h + 1) * a * p}, and {g} hold {g * a * p}; use {_dragonfly_remedy(endpoints, a, h, p)}"
        )
    one, other = np.triu_indices(a, 1)
    first = np.arange(g)[:, None] * a
    local = np.column_stack([(first + one).ravel(), (first + other).ravel()])
    return Plane(
        switches=g * a,
        cables=np.concatenate([local, _global_cables(g, a, h)]).astype(np.int32),
        layer=np.zeros(g * a, np.int8),
        group=np.repeat(np.arange(g, dtype=np.int32), a),
        attached=_spread(endpoints, g * a),
    )


def _dragonfly_remedy(endpoints: int, a: int, h: int, p: int) -> str:
    needed = max(2, -(-endpoints // (a * p)))
    return f"groups = {needed}" if needed <= a * h + 1 else "a larger radix or more planes"


def _global_cables(g: int, a: int, h: int) -> NDArray[np.int64]:
    """Return the cables between groups: those of group i lead to groups i + offset.

    The offsets contain the negative of each, so that the port to +offset in one group is the port to -offset in the
    other.
    """
    offsets = np.sort(_offsets(g, a * h))
    back = len(offsets) - 1 - np.arange(len(offsets))  # index of the negative: the sorted offsets are symmetric
    index = np.arange(len(offsets))
    group = np.arange(g)[:, None]
    here = group * a + index // h
    there = (group + offsets) % g * a + back // h
    cables = np.column_stack([here.ravel(), there.ravel()])
    ports = np.column_stack([(group * a * h + index).ravel(), ((group + offsets) % g * a * h + back).ravel()])
    return cables[ports[:, 0] < ports[:, 1]]  # each cable is found from both of its ends


def _offsets(g: int, ports: int) -> NDArray[np.int64]:
    """Return as many offsets as ports, or one fewer if the last has no partner.

    All other groups are taken as often as they all fit, then the near ones once more.
    """
    times, left = divmod(ports, g - 1)
    offsets = list(range(1, g)) * times
    for near in range(1, (g - 1) // 2 + 1):
        if left >= 2:
            offsets += [near, g - near]
            left -= 2
    if left == 1 and g % 2 == 0:
        offsets.append(g // 2)  # the offset that is its own negative
    return np.array(offsets, np.int64)


def _spread(endpoints: int, switches: int) -> NDArray[np.int32]:
    return (np.arange(endpoints) * switches // endpoints).astype(np.int32)
