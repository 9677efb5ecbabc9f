"""Chooses the two NICs, and the plane, over which a flow crosses the switches.

The ways are tried in this order, and the first that works is taken:

    1. the flow's own two NICs, if they are on one plane, and on one rail if rails are to be kept
    2. forwarding over NVLink, at the sender's or at the receiver's node
    3. its own two NICs across rails
    4. a detour over NICs of any other index, with NVLink at both nodes, if NICs or planes are down

Of the detours, flows with hashes and tables take one in turn, and sprayed packets take all. So with spraying nothing
depends on the numbers of GPUs, and flows that are alike have routes that are alike (`network.delivery.symmetry`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dovetail.network.fabric.topology import Fabric
from dovetail.network.flows.flows import Bools, Ints, Longs
from dovetail.network.routing.paths import Hops

Forwarding = Literal["source", "destination", "none"]
FORWARDING: tuple[Forwarding, ...] = ("source", "destination", "none")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ports:
    """NICs and planes, one entry per flow. With `plane` -1 a flow stays in its node (`is_within`) or has no path."""

    sender: Longs  # GPU whose NIC sends
    receiver: Longs
    plane: Longs
    is_within: Bools


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Working:
    """A fabric, its links that are up, and the paths between switches that are left."""

    fabric: Fabric
    up: Bools
    hops: Hops


Ends = tuple[Longs, Longs]  # source, destination
Attempt = tuple[Longs, Longs, Longs]  # sender, receiver, plane


def choose_ports(working: Working, ends: Ends, turn: Longs, forwarding: Forwarding, *, detours: bool = True) -> Ports:
    """Choose NICs and plane for each flow. `turn` says which of several equally good planes or indices it tries first.

    Without `detours` the fourth way is left out.
    """
    fabric, (source, destination) = working.fabric, ends
    chosen = Ports(
        sender=source.copy(),
        receiver=destination.copy(),
        plane=np.full(len(source), -1),
        is_within=_is_within(working, ends),
    )
    open_ = np.flatnonzero(~chosen.is_within)

    def take(attempt: Attempt, works: Bools) -> Longs:
        """Note the flows that this way works for, and return those that are still open."""
        taken = open_[works]
        chosen.sender[taken], chosen.receiver[taken], chosen.plane[taken] = (column[works] for column in attempt)
        return open_[~works]

    for attempt in _attempts(fabric, ends, turn, forwarding):
        if not len(open_):
            return chosen
        sender, receiver, plane = (column[open_] for column in attempt)
        there = source[open_], destination[open_]
        open_ = take((sender, receiver, plane), (plane >= 0) & usable(working, there, (sender, receiver, plane)))
    if len(open_) and detours and forwarding != "none":
        take(*_detour_by_turn(working, (source[open_], destination[open_]), turn[open_]))
    return chosen


def _attempts(fabric: Fabric, ends: Ends, turn: Longs, forwarding: Forwarding) -> Iterator[Attempt]:
    (source, destination), each, planes = ends, fabric.gpus_per_node, fabric.planes
    if fabric.spec.planes_per_nic > 1:
        for step in range(planes):
            yield source, destination, (turn + step) % planes
    else:
        home = fabric.home_plane
        is_same_plane = home[source] == home[destination]
        is_same_rail = source % each == destination % each
        keeps_rails = fabric.spec.by_rail and forwarding != "none"
        yield source, destination, np.where(is_same_plane & (is_same_rail | (not keeps_rails)), home[source], -1)
        if forwarding == "source":
            yield source // each * each + destination % each, destination, home[destination]
        elif forwarding == "destination":
            yield source, destination // each * each + source % each, home[source]
        if keeps_rails:
            yield source, destination, np.where(is_same_plane, home[source], -1)


def detour_ways(fabric: Fabric) -> list[tuple[int, int]]:
    """Return the (index in the node, plane) of each NIC that a detour may take."""
    each, planes = fabric.gpus_per_node, fabric.planes
    if fabric.spec.planes_per_nic > 1:
        return [(index, plane) for index in range(each) for plane in range(planes)]
    return [(index, index % planes) for index in range(each)]


def detours(working: Working, ends: Ends) -> tuple[list[Attempt], NDArray[np.bool_]]:
    """Return all detours, each over NICs of one index at both nodes, and which of them work [ways, flows]."""
    each, (source, destination) = working.fabric.gpus_per_node, ends
    senders, receivers = source // each * each, destination // each * each
    attempts = [
        (senders + index, receivers + index, np.full(len(source), plane))
        for index, plane in detour_ways(working.fabric)
    ]
    return attempts, np.array([usable(working, ends, attempt) for attempt in attempts])


def _detour_by_turn(working: Working, ends: Ends, turn: Longs) -> tuple[Attempt, Bools]:
    """Return one of the detours that work, and whether any does."""
    attempts, works = detours(working, ends)
    number = works.sum(axis=0)
    chosen = np.argmax(np.cumsum(works, axis=0) > turn % np.maximum(number, 1), axis=0)
    flow = np.arange(len(chosen))
    sender, receiver, plane = (np.array(columns)[chosen, flow] for columns in zip(*attempts, strict=True))
    return (sender, receiver, plane), number > 0


def _is_within(working: Working, ends: Ends) -> Bools:
    """Return whether a flow stays on its GPU, or goes over the NVLink of the node that has both ends."""
    fabric, (source, destination) = working.fabric, ends
    each = fabric.gpus_per_node
    over_nvlink = (source // each == destination // each) & (fabric.nvlink_link[source] >= 0)
    is_within: Bools = (source == destination) | (over_nvlink & _nvlink_is_up(working, source, destination))
    return is_within


def usable(working: Working, ends: Ends, attempt: Attempt) -> Bools:
    """Return whether all links of this way are up, and the NICs are joined by switches."""
    fabric, up, hops = working.fabric, working.up, working.hops
    (source, destination), (sender, receiver, plane) = ends, attempt
    out, back = fabric.nic_link[sender, plane], fabric.nic_link[receiver, plane]
    works = (out >= 0) & (back >= 0)
    works &= up[out] & up[back ^ 1]
    for way, is_reverse in ((fabric.pcie_link[sender], 0), (fabric.pcie_link[receiver], 1)):
        works &= (way < 0) | up[way ^ is_reverse]
    works &= (sender == source) | _nvlink_is_up(working, source, sender)
    works &= (receiver == destination) | _nvlink_is_up(working, receiver, destination)
    first = np.int32(fabric.first_switch)
    chosen = np.flatnonzero(works)
    at = fabric.leaf[sender[chosen], plane[chosen]] - first
    to = fabric.leaf[receiver[chosen], plane[chosen]] - first
    works[chosen] &= hops.distance[hops.index[to], at] >= 0
    return works


def _nvlink_is_up(working: Working, one: Longs, other: Longs) -> Bools:
    fabric, up = working.fabric, working.up
    out, back = fabric.nvlink_link[one], fabric.nvlink_link[other]
    works: Bools = (out >= 0) & (back >= 0) & up[out] & up[back ^ 1]
    return works


def columns_within(fabric: Fabric, source: Longs, destination: Longs, goes: Bools) -> list[Ints]:
    """Return the NVLink links from each source to its destination for flows that have `goes`; -1 for others."""
    goes = goes & (source != destination)
    if not goes.any():
        return []
    out, back = fabric.nvlink_link[source], fabric.nvlink_link[destination] ^ 1
    return [np.where(goes, out, -1).astype(np.int32), np.where(goes, back, -1).astype(np.int32)]


def columns_outside(fabric: Fabric, source: Longs, destination: Longs, ports: Ports) -> list[Ints]:
    """Return the links of both nodes that flows between nodes use: NVLink where forwarded, PCIe, ports of NICs."""
    crosses = ports.plane >= 0
    found = [fabric.nic_link[ports.sender, ports.plane], fabric.nic_link[ports.receiver, ports.plane] ^ 1]
    if (fabric.pcie_link >= 0).any():
        found += [fabric.pcie_link[ports.sender], fabric.pcie_link[ports.receiver] ^ 1]
    columns = [np.where(crosses, links, -1).astype(np.int32) for links in found]
    columns += columns_within(fabric, source, ports.sender, crosses)
    return columns + columns_within(fabric, ports.receiver, destination, crosses)
