"""Shortest paths between switches, and the ways to choose among them.

At each switch n links lead on towards the destination's leaf:

    hashed    each switch picks one of them by a hash of the flow and of itself [ECMP]
    static    the destination alone decides: link D / h^layer mod n, where D counts endpoints leaf by leaf, h is the
              number of cables up from a leaf, and layer is that of the cable's lower end; so the endpoints of a leaf
              are reached over different spines and cables [d-mod-k]
    sprayed   packets go over all of them, in proportion to what each link and those behind it can carry

The shortest paths are those with the fewest cables, where a dragonfly's cable between groups counts as three. So a path
goes over one such cable if it can; a path over two of them may have as few cables, but is twice the load [Kim et al.,
Technology-Driven, Highly-Scalable Dragonfly Topology, §4.1: minimal routing].

Left out: longer detours (Valiant), and hashes that survive failures: ECMP chooses anew among the links left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dovetail.network.fabric.topology import SWITCH, Fabric
from dovetail.network.flows.flows import Bools, Bundles, Floats, Ints, Longs

CELLS = 1 << 25  # leaves times links treated at once, to limit memory
BETWEEN_GROUPS = 3
FARTHEST = 127
PAIRS = 1 << 10  # pairs of switches whose paths are found at once, to limit memory


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Hops:
    """Links on shortest paths from switches to some leaves.

    Switches are numbered from 0 here, leaves in the order of `leaf_of`. With S switches, row t S + u is from switch u
    to leaf t.
    """

    switches: int
    leaf_of: Ints  # [leaves] the leaf's switch
    index: Ints  # [switches] the number of the leaf; -1 if it is none
    distance: NDArray[np.int8]  # [leaves, switches] sum of `lengths`; -1 without a path
    start: Longs  # [leaves * switches + 1]
    link: Ints  # links of the fabric, row by row
    to: Ints  # [links of the fabric] the switch at the end; without meaning for links of other kinds
    layer: NDArray[np.int8]  # [switches]
    cables: Floats  # [links of the fabric] number of parallel cables that a link stands for

    def row(self, at: Ints, leaf: Ints) -> Longs:
        return self.index[leaf].astype(np.int64) * self.switches + at


def find_hops(fabric: Fabric, leaves: Ints, up: Bools | None = None, cables: Floats | None = None) -> Hops:
    """Find the shortest paths towards `leaves` (vertices), over links that are up.

    `cables` is the number of parallel cables that each link stands for, 0 for those that another link stands for
    (None: each stands for itself).
    """
    first, count = fabric.first_switch, fabric.switches
    cables = np.ones(fabric.links) if cables is None else cables
    is_open = (fabric.kind == SWITCH) & (cables > 0)
    if up is not None:
        is_open &= up
    links = np.flatnonzero(is_open)
    links = links[np.argsort(fabric.link_from[links], kind="stable")]
    ends, length = (fabric.link_from[links] - first, fabric.link_to[links] - first), lengths(fabric)[links]
    leaf_of = (np.unique(leaves) - first).astype(np.int32)
    index = np.full(count, -1, np.int32)
    index[leaf_of] = np.arange(len(leaf_of))
    distance = np.full((len(leaf_of), count), -1, np.int8)
    counts, found = [], []
    step = max(1, CELLS // max(1, len(links)))
    for low in range(0, len(leaf_of), step):
        part = distance[low : low + step]
        part[np.arange(len(part)), leaf_of[low : low + step]] = 0
        _measure(part, *ends, length)
        leads = (part[:, ends[0]] > 0) & (part[:, ends[0]] == part[:, ends[1]] + length) & (part[:, ends[1]] >= 0)
        leaf, place = np.nonzero(leads)
        counts.append(np.bincount(leaf * count + ends[0][place], minlength=part.size))
        found.append(links[place])
    return Hops(
        switches=count,
        leaf_of=leaf_of,
        index=index,
        distance=distance,
        start=np.cumsum(np.concatenate([[0], *counts])),
        link=np.concatenate([*found, np.zeros(0)]).astype(np.int32),
        to=fabric.link_to - np.int32(first),
        layer=fabric.switch_layer,
        cables=cables,
    )


def lengths(fabric: Fabric) -> NDArray[np.int8]:
    """Return what each link between switches adds to the length of a path [links]."""
    found = np.ones(fabric.links, np.int8)
    if fabric.spec.kind == "dragonfly":
        links = np.flatnonzero(fabric.kind == SWITCH)
        one, other = (
            fabric.switch_group[end[links] - fabric.first_switch] for end in (fabric.link_from, fabric.link_to)
        )
        found[links[one != other]] = BETWEEN_GROUPS
    return found


def _measure(distance: NDArray[np.int8], link_from: Ints, link_to: Ints, length: NDArray[np.int8]) -> None:
    """Fill `distance` from each leaf outwards, for all leaves at once. `link_from` is sorted."""
    if not len(link_from):
        return
    begins = np.flatnonzero(np.diff(link_from, prepend=-1))
    sources = link_from[begins]
    last = far = 0
    while far < last + length.max():
        far += 1
        assert far < FARTHEST, "paths longer than any fabric has"
        before = np.where(length > far, FARTHEST, far - length.astype(np.int64)).astype(np.int8)
        new = np.logical_or.reduceat(distance[:, link_to] == before, begins, axis=1) & (distance[:, sources] < 0)
        if new.any():
            leaf, place = np.nonzero(new)
            distance[leaf, sources[place]] = last = far


def hash_of(*columns: NDArray[np.integer] | int) -> NDArray[np.uint64]:
    """Return 64 bits mixed from integers, element by element (SplitMix64)."""
    mixed = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for column in columns:
            mixed = (mixed ^ np.asarray(column).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed ^= mixed >> np.uint64(31)
    return mixed


def walk_hashed(hops: Hops, at: Ints, leaf: Ints, label: NDArray[np.uint64]) -> list[Ints]:
    """Return one path for each pair of switches `at` and `leaf`, chosen by hashes.

    The result has the first link of each path, then the second, and so on, with -1 after the end. `label` is a hash of
    what tells flows apart.
    """

    def choose(switch: Ints, number: Longs, chosen: Longs) -> Longs:
        return (hash_of(label[chosen], switch) % number.astype(np.uint64)).astype(np.int64)

    return _walk(hops, at, leaf, choose)


def walk_static(hops: Hops, at: Ints, leaf: Ints, place: Longs, cables_up: int) -> list[Ints]:
    """Return the same, chosen by destination; `place` is D and `cables_up` is h."""

    def choose(switch: Ints, number: Longs, chosen: Longs) -> Longs:
        following = hops.to[hops.link[hops.start[hops.row(switch, leaf[chosen])]]]
        lower = np.minimum(hops.layer[switch], hops.layer[following]).astype(np.int64)
        return place[chosen] // cables_up**lower % number

    return _walk(hops, at, leaf, choose)


def _walk(hops: Hops, at: Ints, leaf: Ints, choose: Callable[[Ints, Longs, Longs], Longs]) -> list[Ints]:
    columns = []
    switch = at.copy()
    going = np.flatnonzero(switch != leaf)
    while len(going):
        row = hops.row(switch[going], leaf[going])
        number = hops.start[row + 1] - hops.start[row]
        assert (number > 0).all(), "only pairs with a path are walked"
        link = hops.link[hops.start[row] + choose(switch[going], number, going)]
        column = np.full(len(at), -1, np.int32)
        column[going] = link
        columns.append(column)
        switch[going] = hops.to[link]
        going = going[switch[going] != leaf[going]]
    return columns


def spray(hops: Hops, fabric: Fabric, at: Ints, leaf: Ints) -> tuple[Bundles, Floats]:
    """Return a bundle of all shortest paths for each pair of switches, with its latency."""
    weight = _widths(hops, fabric)
    blocks = [slice(low, low + PAIRS) for low in range(0, len(at), PAIRS)]
    found = [_sprayed(hops, fabric, weight, at[block], leaf[block]) for block in blocks]
    numbers, links, shares, latency = (np.concatenate(columns) for columns in zip(*found, strict=True))
    offsets = np.cumsum(np.concatenate([[0], numbers])).astype(np.int64)
    return Bundles(offsets=offsets, links=links, shares=shares), latency


def _sprayed(hops: Hops, fabric: Fabric, weight: Floats, at: Ints, leaf: Ints) -> tuple[Longs, Ints, Floats, Floats]:
    """Return the number of links of each pair, the links and their shares pair by pair, and each pair's latency."""
    pair, switch = np.arange(len(at)), at.astype(np.int64)
    share: Floats = np.ones(len(at))
    latency = np.zeros(len(at))
    found: list[tuple[Longs, Ints, Floats]] = []
    while True:
        going = switch != leaf[pair]
        pair, switch, share = pair[going], switch[going], share[going]
        if not len(pair):
            break
        row = hops.row(switch, leaf[pair])
        number = hops.start[row + 1] - hops.start[row]
        entry = np.repeat(hops.start[row] - np.cumsum(number) + number, number) + np.arange(number.sum())
        total = np.bincount(np.repeat(np.arange(len(row)), number), weight[entry])
        pair = np.repeat(pair, number)
        share = np.repeat(share / total, number) * weight[entry]
        link = hops.link[entry]
        found.append((pair, link, share))
        longest = np.zeros(len(at))
        np.maximum.at(longest, pair, fabric.latency[link])
        latency += longest
        # Paths that meet continue as one.
        met, inverse = np.unique(pair * hops.switches + hops.to[link], return_inverse=True)
        pair, switch = np.divmod(met, hops.switches)
        share = np.asarray(np.bincount(inverse.reshape(-1), share), np.float64)
    pairs = np.concatenate([np.zeros(0, np.int64), *(each[0] for each in found)])
    order = np.argsort(pairs, kind="stable")
    return (
        np.bincount(pairs, minlength=len(at)),
        np.concatenate([np.zeros(0, np.int32), *(each[1] for each in found)])[order],
        np.concatenate([np.zeros(0), *(each[2] for each in found)])[order],
        latency,
    )


def _widths(hops: Hops, fabric: Fabric) -> Floats:
    """Return the bytes/s that each entry of `hops.link`, and the links behind it, can carry towards the leaf.

    They are multiplied by the number of cables that the link stands for.
    """
    rows = np.repeat(np.arange(len(hops.start) - 1), np.diff(hops.start))
    behind = rows // hops.switches * hops.switches + hops.to[hops.link]
    steps = hops.distance.ravel()[rows]
    width = np.full(hops.distance.size, np.inf)
    weight = np.zeros(len(rows))
    for length in range(1, int(steps.max(initial=0)) + 1):
        chosen = np.flatnonzero(steps == length)
        links = hops.link[chosen]
        weight[chosen] = hops.cables[links] * np.minimum(fabric.capacity[links], width[behind[chosen]])
        sums = np.bincount(rows[chosen], weight[chosen], minlength=len(width))
        width[sums > 0] = sums[sums > 0]
    return weight
