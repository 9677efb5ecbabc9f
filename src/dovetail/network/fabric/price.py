"""The parts of a fabric, and their price on a stated basis.

Networks are compared as in the Slim Fly paper of NSDI'24, which [ISCA Table 3] follows: switches and the cables between
them have a price each, NICs and their cables are left out. Neither paper prints its unit prices, so `TABLE_3` has those
that follow from the costs in [ISCA Table 3]: with two prices for cables, by length, all of its ten costs are reproduced
to the printed digits. With one price for all cables no price of a switch gives both its fat trees and its dragonfly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveInt

from dovetail.config import Record
from dovetail.network.fabric.topology import NIC, SWITCH, Fabric


class PriceBasis(Record):
    """Prices in dollars for each part; parts without a price are listed but not counted."""

    name: str = Field(min_length=1)
    source: str = Field(min_length=1)
    switch_dollars: NonNegativeFloat
    switch_ports: PositiveInt | None = None  # ports of a switch at that price, others in proportion; None: all cost it
    cable_dollars: NonNegativeFloat  # between switches, with its plugs
    group_cable_dollars: NonNegativeFloat | None = None  # between switches of one group; None: like any other
    nic_cable_dollars: NonNegativeFloat | None = None  # from a NIC to its switch
    nic_dollars: NonNegativeFloat | None = None
    transceiver_dollars: NonNegativeFloat | None = None  # for an end of a cable that leaves its group


TABLE_3 = PriceBasis(
    name="table-3",
    source="solved from the costs of [ISCA Table 3], which prints no unit prices: they are of about the year 2024 and "
    "unverified; switches and cables between switches only",
    switch_dollars=83_400,
    switch_ports=64,
    cable_dollars=485,
    group_cable_dollars=375,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    name: str
    quantity: int
    dollars: float | None  # for one; None if the basis has no price
    note: str = ""

    @property
    def total(self) -> float:
        """The dollars for all of them; 0 without a price."""
        return self.quantity * (self.dollars or 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    parts: tuple[Part, ...]
    endpoints: int
    basis: PriceBasis

    @property
    def dollars(self) -> float:
        return sum(part.total for part in self.parts)

    @property
    def dollars_per_endpoint(self) -> float:
        return self.dollars / self.endpoints

    def dollars_per_rate(self, bytes_per_second: float) -> float:
        """Return the dollars per GB/s (1e9 bytes/s) that all endpoints together get. Raises ValueError for none."""
        if not bytes_per_second > 0:
            raise ValueError(f"delivered rate = {bytes_per_second:g} bytes/s: expected more than 0")
        return self.dollars / bytes_per_second * 1e9


def bill(fabric: Fabric, basis: PriceBasis = TABLE_3) -> Bill:
    """Return the parts of `fabric` and their prices, those of the storage network included."""
    return Bill(parts=tuple(_parts(fabric, basis)), endpoints=fabric.endpoints, basis=basis)


def dollars(switches: int, cables: int, group_cables: int, basis: PriceBasis = TABLE_3) -> float:
    """Return the price of a network of which only the numbers of parts are known.

    Switches have the basis's price; `group_cables` of the `cables` stay within a group.
    """
    short = basis.cable_dollars if basis.group_cable_dollars is None else basis.group_cable_dollars
    return switches * basis.switch_dollars + (cables - group_cables) * basis.cable_dollars + group_cables * short


def _parts(fabric: Fabric, basis: PriceBasis) -> list[Part]:
    parts: list[Part] = []
    storage = fabric.switch_plane == fabric.planes
    for layer, name in enumerate(_layers(fabric)):
        count = int(np.count_nonzero((fabric.switch_layer == layer) & ~storage))
        parts.append(_switches(f"{name}, {fabric.spec.radix} ports", count, fabric.spec.radix, basis))
    if fabric.spec.storage:
        count = int(np.count_nonzero(storage))
        name = f"storage switch, {fabric.spec.storage.radix} ports"
        parts.append(_switches(name, count, fabric.spec.storage.radix, basis))
    short, long = cables_by_length(fabric)
    group_dollars = basis.cable_dollars if basis.group_cable_dollars is None else basis.group_cable_dollars
    if short:
        parts.append(Part(name="cable within a group", quantity=short, dollars=group_dollars, note="electrical"))
    parts.append(Part(name="cable between switches", quantity=long, dollars=basis.cable_dollars, note="optical"))
    nic_cables = int(np.count_nonzero(fabric.kind == NIC)) // 2
    parts.append(Part(name="cable to a NIC", quantity=nic_cables, dollars=basis.nic_cable_dollars, note="any length"))
    nics = fabric.endpoints + len(fabric.storage_link) + fabric.server_link.size
    parts.append(Part(name="NIC", quantity=nics, dollars=basis.nic_dollars))
    note = "both ends of optical cables; which ones are is unverified"
    parts.append(Part(name="transceiver", quantity=2 * long, dollars=basis.transceiver_dollars, note=note))
    return [part for part in parts if part.quantity]


def _switches(name: str, count: int, radix: int, basis: PriceBasis) -> Part:
    if basis.switch_ports in (None, radix):
        return Part(name=name, quantity=count, dollars=basis.switch_dollars)
    note = f"in proportion to one of {basis.switch_ports} ports, unverified"
    return Part(name=name, quantity=count, dollars=basis.switch_dollars * radix / basis.switch_ports, note=note)


def cables_by_length(fabric: Fabric) -> tuple[int, int]:
    """Return the number of cables within a dragonfly's groups or a slim fly's columns, and of all other cables."""
    one = fabric.link_from[::2][fabric.kind[::2] == SWITCH] - fabric.first_switch
    other = fabric.link_to[::2][fabric.kind[::2] == SWITCH] - fabric.first_switch
    if fabric.spec.kind == "fat-tree":
        return 0, len(one)
    same = fabric.switch_plane[one] == fabric.switch_plane[other]
    is_short = same & (fabric.switch_group[one] == fabric.switch_group[other]) & (fabric.switch_group[one] >= 0)
    # The storage network is a fat tree: its groups are pods, and it has no short cables.
    is_short &= fabric.switch_plane[one] < fabric.planes
    return int(np.count_nonzero(is_short)), int(np.count_nonzero(~is_short))


def _layers(fabric: Fabric) -> tuple[str, ...]:
    if fabric.spec.kind != "fat-tree":
        return (f"{fabric.spec.kind.replace('-', ' ')} switch",)
    return (
        ("leaf switch", "spine switch") if fabric.spec.layers == 2 else ("leaf switch", "spine switch", "core switch")
    )
