"""A fabric as arrays of links with capacity and latency, built from its description.

Links have one direction; capacities are bytes/s, latencies seconds. Vertices are numbered in this order, where some
blocks may be empty:

    GPUs | NVLink hubs, one per node | switches, plane by plane, then storage | NICs | hosts | storage servers

Cable c is two links, 2 c and 2 c + 1, so the opposite link is `link ^ 1`. If PCIe is not modelled, a GPU is its own
NIC; if it is, traffic of the NIC and copies from and to the host share the GPU's lanes [ISCA §4.5]:

    GPU = NVLink hub        GPU = NIC = leaf switch        host = NIC = GPU        host = storage leaf

The latencies along a path add up to what was measured end to end [ISCA Table 5]: each NIC has half of the latency over
one switch, and each cable between switches has the latency that one more switch adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dovetail.network.fabric.fat_trees import fat_tree
from dovetail.network.fabric.low_diameter import dragonfly, slim_fly
from dovetail.network.fabric.planes import Plane
from dovetail.spec.fabric import FabricSpec, Storage
from dovetail.spec.hardware import Link

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]
Rates = Literal["achieved", "datasheet"]

KINDS = ("nic", "switch", "nvlink", "pcie")
NIC, SWITCH, NVLINK, PCIE = range(4)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fabric:
    """One fabric, built from `spec`. Its arrays must not be written to, because some are shared."""

    name: str
    spec: FabricSpec
    endpoints: int  # GPUs
    nodes: int
    planes: int  # for GPUs; storage switches have plane = planes
    switches: int
    vertices: int
    first_hub: int  # vertex of node 0's NVLink hub; = first_switch without NVLink
    first_switch: int
    first_host: int  # = vertices if PCIe is not modelled
    link_from: Ints
    link_to: Ints
    capacity: Floats  # bytes/s
    latency: Floats  # seconds
    kind: NDArray[np.int8]  # index into KINDS; cables of the storage network count as nic and switch
    # These have one entry per switch, in order of vertices.
    switch_plane: NDArray[np.int16]
    switch_layer: NDArray[np.int8]  # layer 0 has the endpoints; 1 and 2 are above
    switch_group: Ints  # fat tree: pod (-1 above pods); dragonfly: group; slim fly: column, 0 to 2 q - 1
    # These have one row per GPU, or per what the shape says.
    leaf: Ints  # [endpoints, planes] vertex of its switch in each plane; -1 if its NIC has no port there
    nic_link: Ints  # [endpoints, planes] link from the NIC (or GPU) to that switch; -1 if there is none
    pcie_link: Ints  # [endpoints] link from the GPU to its NIC; -1 if a GPU is its own NIC
    host_link: Ints  # [endpoints] link from the node's host to the GPU's NIC; -1 if not modelled
    nvlink_link: Ints  # [endpoints] link from the GPU to its node's hub; -1 if not modelled
    storage_link: Ints  # [nodes] link from the host to the storage switch; empty without storage
    server_link: Ints  # [servers, NICs] link from a storage server to its switch

    @property
    def gpus_per_node(self) -> int:
        return self.endpoints // self.nodes

    @property
    def links(self) -> int:
        """The number of links, each of one direction."""
        return len(self.link_from)

    @property
    def home_plane(self) -> NDArray[np.int64]:
        """The plane of each GPU's NIC [endpoints]; the first plane if it is on all."""
        return np.asarray(np.argmax(self.leaf >= 0, axis=1), np.int64)

    def is_switch(self, vertex: int) -> bool:
        return self.first_switch <= vertex < self.first_switch + self.switches


def build(spec: FabricSpec, rates: Rates = "achieved") -> Fabric:
    """Build the fabric of `spec`. Capacities are those that the links achieve, or those of their datasheets.

    Raises ValueError with the nearest legal value for an odd radix, more endpoints than fit, a q that is not a prime
    power, and more ports than a switch has.
    """
    planes = _planes(spec)
    storage = _storage_plane(spec, spec.storage) if spec.storage else None
    everyone = [*planes, storage] if storage else planes
    switches = sum(plane.switches for plane in everyone)
    hubs = spec.nodes if spec.nvlink is not None and spec.gpus_per_node > 1 else 0
    first_switch = spec.endpoints + hubs
    first_nic = first_switch + switches
    has_pcie = spec.pcie is not None
    first_host = first_nic + (spec.endpoints if has_pcie else 0)
    first_server = first_host + (spec.nodes if has_pcie else 0)
    servers = spec.storage.servers if spec.storage else 0

    cables = _Cables(rates)
    gpus, node = np.arange(spec.endpoints), np.arange(spec.endpoints) // spec.gpus_per_node
    absent = np.full(spec.endpoints, -1, dtype=np.int32)
    nvlink_link = pcie_link = host_link = absent
    if hubs:
        assert spec.nvlink is not None
        nvlink_link = cables.add(gpus, spec.endpoints + node, spec.nvlink, spec.nvlink.latency.value / 2, NVLINK)
    nics = first_nic + gpus if has_pcie else gpus
    if spec.pcie is not None:
        # The NIC's latency is measured end to end, so it includes the GPU's lanes.
        pcie_link = cables.add(gpus, nics, spec.pcie, 0.0, PCIE)
        host_link = cables.add(first_host + node, nics, spec.pcie, spec.pcie.latency.value, PCIE)
    leaf, nic_link = _attach(spec, planes, first_switch, nics, cables)
    _join_switches(spec, planes, first_switch, cables)
    storage_link, server_link = np.zeros(0, np.int32), np.zeros((0, 0), np.int32)
    if spec.storage and storage:
        first = first_nic - storage.switches
        storage_link, server_link = _attach_storage(spec, spec.storage, storage, first, first_host, cables)
    return Fabric(
        name=spec.name,
        spec=spec,
        endpoints=spec.endpoints,
        nodes=spec.nodes,
        planes=spec.planes,
        switches=switches,
        vertices=first_server + servers,
        first_hub=spec.endpoints,
        first_switch=first_switch,
        first_host=first_host,
        switch_plane=np.repeat(np.arange(len(everyone), dtype=np.int16), [plane.switches for plane in everyone]),
        switch_layer=np.concatenate([plane.layer for plane in everyone]),
        switch_group=np.concatenate([plane.group for plane in everyone]),
        leaf=leaf,
        nic_link=nic_link,
        pcie_link=pcie_link,
        host_link=host_link,
        nvlink_link=nvlink_link,
        storage_link=storage_link,
        server_link=server_link,
        **cables.arrays(),
    )


class _Cables:
    """Cables of a network being built, block by block."""

    def __init__(self, rates: Rates) -> None:
        self.rates = rates
        self.count = 0
        self.blocks: list[tuple[NDArray[np.int64], NDArray[np.int64], float, float, int]] = []

    def add(self, one: NDArray[np.int64], other: NDArray[np.int64], link: Link, seconds: float, kind: int) -> Ints:
        """Add cables from `one` to `other`, vertex by vertex, and return the links in that direction."""
        rate = link.bandwidth.value if self.rates == "achieved" else link.gbs * 1e9
        return self.add_at(one, other, rate, seconds, kind)

    def add_at(self, one: NDArray[np.int64], other: NDArray[np.int64], rate: float, seconds: float, kind: int) -> Ints:
        first, self.count = self.count, self.count + len(one)
        self.blocks.append((one, other, rate, seconds, kind))
        return (2 * np.arange(first, self.count)).astype(np.int32)

    def arrays(self) -> dict[str, NDArray]:  # type: ignore[type-arg]
        sizes = [2 * len(block[0]) for block in self.blocks]
        one = np.concatenate([block[0] for block in self.blocks])
        other = np.concatenate([block[1] for block in self.blocks])
        return {
            "link_from": np.column_stack([one, other]).ravel().astype(np.int32),
            "link_to": np.column_stack([other, one]).ravel().astype(np.int32),
            "capacity": np.repeat([block[2] for block in self.blocks], sizes),
            "latency": np.repeat([block[3] for block in self.blocks], sizes),
            "kind": np.repeat(np.array([block[4] for block in self.blocks], np.int8), sizes),
        }


def _planes(spec: FabricSpec) -> list[Plane]:
    """Return the planes. They are alike, because each has the same number of endpoints."""
    share = spec.endpoints if spec.planes_per_nic == spec.planes else spec.endpoints // spec.planes
    if spec.kind == "fat-tree":
        plane = fat_tree(share, spec.radix, spec.layers, spec.gpus_per_node if spec.by_rail else 1)
    elif spec.kind == "slim-fly":
        plane = slim_fly(share, spec.radix, spec.q, spec.endpoints_per_switch)
    else:
        plane = dragonfly(
            share,
            spec.radix,
            groups=spec.groups,
            switches_per_group=spec.switches_per_group,
            global_per_switch=spec.global_per_switch,
            endpoints_per_switch=spec.endpoints_per_switch,
        )
    return [plane] * spec.planes


def _storage_plane(spec: FabricSpec, storage: Storage) -> Plane:
    ports = spec.nodes + storage.servers * storage.nics_per_server
    return fat_tree(ports, storage.radix, 2 if ports <= storage.radix**2 // 2 else 3, 1)


def _attach(
    spec: FabricSpec, planes: list[Plane], first_switch: int, nics: NDArray[np.int64], cables: _Cables
) -> tuple[Ints, Ints]:
    leaf = np.full((spec.endpoints, spec.planes), -1, dtype=np.int32)
    nic_link = leaf.copy()
    rate = spec.nic.bandwidth.value if cables.rates == "achieved" else spec.nic.gbs * 1e9
    home = np.arange(spec.endpoints) % spec.gpus_per_node % spec.planes
    for index, plane in enumerate(planes):
        on_it = np.flatnonzero(home == index) if spec.planes_per_nic == 1 else np.arange(spec.endpoints)
        leaf[on_it, index] = first_switch + plane.attached
        vertices = first_switch + plane.attached.astype(np.int64)
        ports = cables.add_at(nics[on_it], vertices, rate / spec.planes_per_nic, spec.nic.latency.value / 2, NIC)
        nic_link[on_it, index] = ports
        first_switch += plane.switches
    return leaf, nic_link


def _join_switches(spec: FabricSpec, planes: list[Plane], first_switch: int, cables: _Cables) -> None:
    rate = spec.nic.bandwidth.value if cables.rates == "achieved" else spec.nic.gbs * 1e9
    for plane in planes:
        one, other = (first_switch + plane.cables.astype(np.int64)).T
        cables.add_at(one, other, rate / spec.planes_per_nic, spec.hop_us.value * 1e-6, SWITCH)
        first_switch += plane.switches


def _attach_storage(
    spec: FabricSpec, storage: Storage, plane: Plane, first: int, first_host: int, cables: _Cables
) -> tuple[Ints, Ints]:
    vertices = np.arange(spec.nodes) + first_host
    servers = np.repeat(first_host + spec.nodes + np.arange(storage.servers), storage.nics_per_server)
    leaves = first + plane.attached.astype(np.int64)
    half = storage.nic.latency.value / 2
    nodes = cables.add(vertices, leaves[: spec.nodes], storage.nic, half, NIC)
    ports = cables.add(servers, leaves[spec.nodes :], storage.nic, half, NIC)
    one, other = (first + plane.cables.astype(np.int64)).T
    cables.add(one, other, storage.nic, spec.hop_us.value * 1e-6, SWITCH)
    return nodes, ports.reshape(storage.servers, storage.nics_per_server)
