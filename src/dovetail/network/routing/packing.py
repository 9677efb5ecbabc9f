"""Packs columns of one link or bundle per flow into routes, flow by flow."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dovetail.network.fabric.topology import Fabric
from dovetail.network.flows.flows import NO_BUNDLES, Bools, Floats, Ints, Longs, Routes
from dovetail.network.routing.paths import Hops, spray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Column:
    """One item for each flow, or -1 for none.

    In a column of pairs the item is switch * switches + switch, for a bundle that is still to be made. `leg` is -1 for
    items that all legs have in common.
    """

    items: Ints | Longs
    share: float | Floats = 1.0
    leg: int = -1
    is_pair: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """Flows that are routed together."""

    rows: Longs  # the flows' numbers, ascending
    columns: list[Column]
    is_cut_off: Bools


def part_of(part: Part, chosen: Longs) -> Part:
    columns = [
        replace(
            column,
            items=column.items[chosen],
            share=column.share if isinstance(column.share, float) else column.share[chosen],
        )
        for column in part.columns
    ]
    return Part(rows=part.rows[chosen], columns=columns, is_cut_off=part.is_cut_off[chosen])


def pack(parts: list[Part], count: int, fabric: Fabric, hops: Hops) -> Routes:
    """Join the parts of `count` flows, with a bundle for each pair of leaves that packets are sprayed between."""
    pairs = [np.unique(column.items) for part in parts for column in part.columns if column.is_pair]
    known = np.unique(np.concatenate([np.zeros(0, np.int64), *pairs]))
    known = known[known >= 0]
    at, to = np.divmod(known, hops.switches)
    bundles, behind = NO_BUNDLES, np.zeros(0)
    if len(known):
        bundles, behind = spray(hops, fabric, at.astype(np.int32), to.astype(np.int32))
    latency_of = np.concatenate([fabric.latency, behind])
    packed = [_packed(part.columns, len(part.rows), known, fabric.links, latency_of) for part in parts]
    offsets, latency, is_cut_off = np.zeros(count + 1, np.int64), np.zeros(count), np.zeros(count, bool)
    for part, (numbers, _, _, seconds) in zip(parts, packed, strict=True):
        offsets[part.rows + 1], latency[part.rows], is_cut_off[part.rows] = numbers, seconds, part.is_cut_off
    np.cumsum(offsets, out=offsets)
    items = np.zeros(offsets[-1], np.int32)
    shares = np.ones(len(items) if any(each[2] is not None for each in packed) else 0)
    for part, (numbers, mine, share, _) in zip(parts, packed, strict=True):
        places = _places_of(part.rows, numbers, offsets)
        items[places] = mine
        if share is not None:
            shares[places] = share
    return Routes(
        num_links=fabric.links,
        offsets=offsets,
        items=items,
        shares=shares,
        bundles=bundles,
        latency=latency,
        is_cut_off=is_cut_off,
    )


def _places_of(rows: Longs, numbers: Longs, offsets: Longs) -> Longs | slice:
    """Return the places of the items of flows `rows`, which have `numbers` items each."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return slice(int(offsets[rows[0]]), int(offsets[rows[-1] + 1]))
    return np.repeat(offsets[rows] - np.cumsum(numbers) + numbers, numbers) + np.arange(numbers.sum())


def _packed(
    columns: list[Column], count: int, known: Longs, num_links: int, latency_of: Floats
) -> tuple[Longs, Ints, Floats | None, Floats]:
    """Return the number of items of each flow, the items flow by flow, their shares (None if all are 1), and the
    latency of the longest leg."""
    table = np.full((count, len(columns)), -1, np.int32)
    common, longest = np.zeros(count), np.zeros(count)
    legs: dict[int, Floats] = {}
    for index, column in enumerate(columns):
        items = column.items
        if column.is_pair:
            items = np.where(items >= 0, num_links + np.searchsorted(known, items), -1)
        table[:, index] = items
        seconds = np.where(items >= 0, latency_of[items], 0.0)
        if column.leg < 0:
            common += seconds
        else:
            legs[column.leg] = legs.get(column.leg, 0.0) + seconds
    for seconds in legs.values():
        np.maximum(longest, seconds, out=longest)
    is_item = table >= 0
    shares = None
    if any(not isinstance(column.share, float) or column.share != 1.0 for column in columns):
        shares = np.column_stack([np.broadcast_to(column.share, count) for column in columns])[is_item]
    return is_item.sum(axis=1), table[is_item], shares, common + longest
