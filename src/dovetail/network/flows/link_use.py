"""How busy a demand keeps the links of each kind, and which one is the busiest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dovetail.network.fabric.topology import PCIE, Fabric
from dovetail.network.flows.flows import Bools, Floats

PARTS = ("GPU", "NVLink hub", "leaf", "spine", "core", "NIC", "host", "storage server")
HUB, LEAF, NIC_PART, HOST, SERVER = 1, 2, 5, 6, 7


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkUse:
    """Links of one kind, from one kind of part to another, that carried anything.

    Their use is the bytes carried over those that capacity and time would have allowed.
    """

    name: str  # such as "leaf to spine"
    links: int
    mean_use: float
    busiest_use: float
    busiest_link: int  # the number that --fail link: takes
    busiest_name: str


def link_uses(fabric: Fabric, link_bytes: Floats, seconds: float) -> tuple[LinkUse, ...]:
    """Return the use of links by kind, the busiest kind first; nothing if no time passes."""
    if not seconds:
        return ()
    use = link_bytes / (fabric.capacity * seconds)
    parts = _parts(fabric)
    kind = (fabric.kind.astype(np.int64) * 8 + parts[fabric.link_from]) * 8 + parts[fabric.link_to]
    found = [_use(fabric, parts, use, (kind == each) & (link_bytes > 0)) for each in np.unique(kind[link_bytes > 0])]
    return tuple(sorted(found, key=lambda each: -each.busiest_use))


def _parts(fabric: Fabric) -> NDArray[np.int64]:
    """Return the kind of each vertex as an index into PARTS [vertices]."""
    first_nic, first_host = fabric.first_switch + fabric.switches, fabric.first_host
    parts = np.zeros(fabric.vertices, np.int64)
    parts[fabric.first_hub : fabric.first_switch] = HUB
    parts[fabric.first_switch : first_nic] = LEAF + fabric.switch_layer
    parts[first_nic:first_host] = NIC_PART
    parts[first_host : first_host + fabric.nodes] = HOST
    parts[first_host + fabric.nodes :] = SERVER
    return parts


def _use(fabric: Fabric, parts: NDArray[np.int64], use: Floats, chosen: Bools) -> LinkUse:
    links = np.flatnonzero(chosen)
    busiest = int(links[np.argmax(use[links])])
    one, other = int(fabric.link_from[busiest]), int(fabric.link_to[busiest])
    names = [_kind_of(fabric, int(parts[end])) for end in (one, other)]
    return LinkUse(
        name=" to ".join(names) + (" (PCIe)" if fabric.kind[busiest] == PCIE else ""),
        links=len(links),
        mean_use=float(use[links].mean()),
        busiest_use=float(use[busiest]),
        busiest_link=busiest,
        busiest_name=" to ".join(_name_of(fabric, parts, end) for end in (one, other)),
    )


def _kind_of(fabric: Fabric, part: int) -> str:
    """Return the kind's name. Slim flies and dragonflies have one kind of switch."""
    return "switch" if part == LEAF and fabric.spec.kind != "fat-tree" else PARTS[part]


def _name_of(fabric: Fabric, parts: NDArray[np.int64], vertex: int) -> str:
    """Return the vertex's name. Switches are counted from 0 over all planes, as for --fail switch:."""
    part = int(parts[vertex])
    first = {
        0: 0,
        HUB: fabric.first_hub,
        NIC_PART: fabric.first_switch + fabric.switches,
        HOST: fabric.first_host,
        SERVER: fabric.first_host + fabric.nodes,
    }.get(part, fabric.first_switch)
    name = f"{_kind_of(fabric, part)} {vertex - first}"
    if fabric.is_switch(vertex) and fabric.planes > 1:
        plane = int(fabric.switch_plane[vertex - fabric.first_switch])
        name += f" of plane {plane}" if plane < fabric.planes else " of storage"
    return name
