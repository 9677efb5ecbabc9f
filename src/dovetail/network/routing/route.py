"""Routes flows: it finds the links that each one takes.

Within a node a flow goes over NVLink, otherwise through NICs and switches on a plane that both NICs are on. If the two
GPUs' NICs are on different planes, the bytes go over NVLink to a GPU of the sender's node whose NIC is on the
receiver's plane, which passes them on (PXN) [ISCA §5.1]; or a GPU of the receiver's node does so:

    source        GPU = NVLink = GPU with the receiver's index = its NIC = switches = the receiver's NIC
    destination   the sender's NIC = switches = NIC of the GPU with the sender's index = NVLink = GPU

The same is done between rails that share spines, because it saves two switches. If a NIC, a leaf or a plane is down,
both ends use GPUs of another index whose NICs still reach each other: one of these, chosen in turn by the flows'
numbers, or evenly all of them if packets are sprayed. Bytes are passed on as they arrive, so a flow uses all of these
links at once.

Choices among shortest paths are those of `network.routing.paths`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dovetail.config import near_matches
from dovetail.network.fabric.topology import Fabric
from dovetail.network.flows.flows import Bools, Floats, Flows, Ints, Longs, Routes
from dovetail.network.routing.packing import Column, Part, pack, part_of
from dovetail.network.routing.paths import Hops, find_hops, hash_of, walk_hashed, walk_static
from dovetail.network.routing.ports import (
    FORWARDING,
    Ends,
    Forwarding,
    Ports,
    Working,
    choose_ports,
    columns_outside,
    columns_within,
    detour_ways,
    detours,
    usable,
)

Labels = NDArray[np.uint64]
NO_LABELS = np.zeros(0, np.uint64)
ROWS = 1 << 19  # flows that are routed at once, to limit memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Ecmp:
    """A hash picks a path for each queue pair. A flow's bytes are divided evenly among them, and its slowest part
    decides. For queue pairs that do not wait for each other see `Flows.split`. Raises ValueError for less than one."""

    queue_pairs: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.queue_pairs < 1:
            raise ValueError(f"queue_pairs = {self.queue_pairs}: a connection has at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Static:
    """Tables decide by destination, and avoid links that are down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptive:
    """Packets go over all shortest paths, and over all ports of a NIC that has several. A flow that needs a detour
    takes all that work, evenly."""


Policy = Ecmp | Static | Adaptive
ROUTINGS = ("adaptive", "ecmp", "static")


def policy_of(routing: str, queue_pairs: int = 1, seed: int = 0) -> Policy:
    """Return the policy called `routing`; the other arguments are for ECMP. Raises ValueError for an unknown name."""
    if routing not in ROUTINGS:
        raise ValueError(f"no routing {routing!r}; {near_matches(routing, ROUTINGS)}")
    if routing == "ecmp":
        return Ecmp(queue_pairs=queue_pairs, seed=seed)
    return Adaptive() if routing == "adaptive" else Static()


def route(
    fabric: Fabric,
    flows: Flows,
    policy: Policy,
    up: Bools | None = None,
    forwarding: Forwarding = "source",
    cables: Floats | None = None,
) -> Routes:
    """Route `flows` between GPUs over links that are `up` (None: all).

    If packets are sprayed, a link may stand for several parallel `cables` (`network.routing.paths`), and then has the
    shares of all of them. Raises ValueError for GPUs that do not exist, and for an unknown forwarding.
    """
    if forwarding not in FORWARDING:
        raise ValueError(f"forwarding = {forwarding!r}: {near_matches(forwarding, FORWARDING)}")
    each = fabric.gpus_per_node
    nodes = np.unique(_gpus_of(fabric, flows)[1] // each)
    leaves = fabric.leaf[(nodes[:, None] * each + np.arange(each)).ravel()]
    router = _Router(
        working=Working(
            fabric=fabric,
            up=np.ones(fabric.links, bool) if up is None else up,
            hops=find_hops(fabric, leaves[leaves >= 0], up, cables),
        ),
        policy=policy,
        forwarding=forwarding,
        place=_places(fabric) if isinstance(policy, Static) else np.zeros((0, 0), np.int64),
    )
    blocks = [np.arange(low, min(low + ROWS, len(flows))) for low in range(0, len(flows), ROWS)]
    parts = [part for block in blocks for part in router.parts(flows.take(block), block)]
    return pack(parts, len(flows), fabric, router.hops)


def host_of(fabric: Fabric, node: int) -> int:
    """Return the source or destination of copies between a node's host and its GPUs.

    Raises ValueError if the fabric has no PCIe or no such node.
    """
    if fabric.first_host >= fabric.vertices or not 0 <= node < fabric.nodes:
        raise ValueError(f"host {node}: {fabric.name} has {fabric.nodes} nodes, and PCIe only with a [pcie] link")
    return fabric.first_host + node


def _gpus_of(fabric: Fabric, flows: Flows) -> tuple[Longs, Longs, Bools, Bools]:
    """Return the GPUs at both ends, and whether a flow comes from or goes to the host of its GPU.

    In that case the GPU is at both ends.
    """
    ends = flows.source.astype(np.int64), flows.destination.astype(np.int64)
    is_gpu = [(end >= 0) & (end < fabric.endpoints) for end in ends]
    for name, end, is_known, other in zip(("source", "destination"), ends, is_gpu, ends[::-1], strict=True):
        node = end - fabric.first_host
        is_host = (node >= 0) & (node == other // fabric.gpus_per_node) & (fabric.first_host < fabric.vertices)
        wrong = ~(is_known | is_host)
        if wrong.any():
            raise ValueError(
                f"{name} {end[wrong][0]}: {fabric.name} has GPUs 0 to {fabric.endpoints - 1}, and copies from or to "
                "a host are those of its own node's GPUs"
            )
    from_host, to_host = ~is_gpu[0], ~is_gpu[1]
    return np.where(from_host, ends[1], ends[0]), np.where(to_host, ends[0], ends[1]), from_host, to_host


def _places(fabric: Fabric) -> Longs:
    """Return D of `network.routing.paths` [endpoints, planes]: endpoints numbered leaf by leaf, all leaves alike."""
    places = np.zeros(fabric.leaf.shape, np.int64)
    for plane in range(fabric.planes):
        leaf = fabric.leaf[:, plane]
        order = np.argsort(leaf, kind="stable")
        _, begins, counts = np.unique(leaf[order], return_index=True, return_counts=True)
        rank = np.arange(len(leaf)) - np.repeat(begins, counts)
        present = leaf[order[begins]] >= 0
        ordinal = np.repeat(np.cumsum(present) - 1, counts)
        places[order, plane] = ordinal * counts[present].max(initial=1) + rank
    return places


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Leg:
    """One of the ways that flows are divided among."""

    ports: Ports
    share: float | Floats
    label: Labels  # by which a hash tells flows apart


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Router:
    working: Working
    policy: Policy
    forwarding: Forwarding
    place: Longs

    @property
    def fabric(self) -> Fabric:
        return self.working.fabric

    @property
    def hops(self) -> Hops:
        return self.working.hops

    def parts(self, flows: Flows, rows: Longs) -> list[Part]:
        """Return what flows use. Sprayed flows on detours are a part of their own, because they have far more items."""
        source, destination, from_host, to_host = _gpus_of(self.fabric, flows)
        legs = self._legs(source, destination, flows.queue_pair)
        within = legs[0].ports.is_within & self._host_is_up(source, from_host, to_host)
        found = [Column(items=each) for each in columns_within(self.fabric, source, destination, within)]
        for goes, reverse in ((from_host, 0), (to_host, 1)):
            if goes.any():
                lanes = self.fabric.host_link[source] ^ reverse, self.fabric.pcie_link[source] ^ 1 - reverse
                found += [Column(items=np.where(goes, links, -1)) for links in lanes]
        found += self._columns(legs, (source, destination), self.fabric.spec.planes_per_nic == 1)
        is_cut_off: Bools = np.logical_and.reduce([~within, *(leg.ports.plane < 0 for leg in legs)])
        whole = Part(rows=rows, columns=found, is_cut_off=is_cut_off)
        is_lost = is_cut_off & ~legs[0].ports.is_within
        if not isinstance(self.policy, Adaptive) or self.forwarding == "none" or not is_lost.any():
            return [whole]
        kept, lost = np.flatnonzero(~is_lost), np.flatnonzero(is_lost)
        step = ROWS // len(detour_ways(self.fabric))
        blocks = [lost[low : low + step] for low in range(0, len(lost), step)]
        around = [self._around((source[block], destination[block]), rows[block]) for block in blocks]
        return [part_of(whole, kept), *around]

    def _around(self, ends: Ends, rows: Longs) -> Part:
        """Return flows that go evenly over all detours that work."""
        attempts, works = detours(self.working, ends)
        number = works.sum(axis=0)
        share = 1.0 / np.maximum(number, 1)
        legs = []
        for (sender, receiver, plane), on_it in zip(attempts, works, strict=True):
            ports = Ports(sender=sender, receiver=receiver, plane=np.where(on_it, plane, -1), is_within=~on_it)
            legs.append(_Leg(ports=ports, share=share, label=NO_LABELS))
        return Part(rows=rows, columns=self._columns(legs, ends, False), is_cut_off=number == 0)

    def _columns(self, legs: list[_Leg], ends: Ends, has_common_ends: bool) -> list[Column]:
        """Return what flows between nodes use. With `has_common_ends` all legs go through the same two NICs."""
        found = []
        for number, leg in enumerate(legs):
            if number == 0 or not has_common_ends:
                share, at = (1.0, -1) if has_common_ends else (leg.share, number)
                links = columns_outside(self.fabric, *ends, leg.ports)
                found += [Column(items=each, share=share, leg=at) for each in links]
            found += self._between_leaves(leg, number)
        return found

    def _host_is_up(self, gpu: Longs, from_host: Bools, to_host: Bools) -> Bools:
        works = np.ones(len(gpu), bool)
        for goes, reverse in ((from_host, 0), (to_host, 1)):
            lanes = (
                self.working.up[self.fabric.host_link[gpu] ^ reverse]
                & self.working.up[self.fabric.pcie_link[gpu] ^ 1 - reverse]
            )
            works &= ~goes | lanes
        return works

    def _legs(self, source: Longs, destination: Longs, queue_pair: Ints) -> list[_Leg]:
        fabric, policy = self.fabric, self.policy
        rotation = source + destination + destination // fabric.gpus_per_node

        def ports(turn: Longs) -> Ports:
            is_sprayed = isinstance(policy, Adaptive)
            return choose_ports(self.working, (source, destination), turn, self.forwarding, detours=not is_sprayed)

        if isinstance(policy, Ecmp):
            share, pairs = 1.0 / policy.queue_pairs, range(policy.queue_pairs)
            if fabric.spec.planes_per_nic == 1:
                # A connection is between NICs, so all that a GPU passes on to one receiver shares it.
                same = ports(rotation)
                labels = [hash_of(same.sender, same.receiver, queue_pair, k, policy.seed) for k in pairs]
                return [_Leg(ports=same, share=share, label=label) for label in labels]
            labels = [hash_of(source, destination, queue_pair, k, policy.seed) for k in pairs]
            turns = [(label % np.uint64(fabric.planes)).astype(np.int64) for label in labels]
            return [_Leg(ports=ports(t), share=share, label=label) for t, label in zip(turns, labels, strict=True)]
        first = ports(rotation)
        if isinstance(policy, Static) or fabric.spec.planes_per_nic == 1:
            return [_Leg(ports=first, share=1.0, label=NO_LABELS)]
        return self._on_all_planes(source, destination, first)

    def _on_all_planes(self, source: Longs, destination: Longs, first: Ports) -> list[_Leg]:
        """Return a leg for each plane on which the flow's own two NICs reach each other, with even shares."""
        is_direct, ends = first.plane >= 0, (source, destination)
        works = [
            is_direct & usable(self.working, ends, (*ends, np.full(len(source), plane)))
            for plane in range(self.fabric.planes)
        ]
        share = 1.0 / np.maximum(np.sum(works, axis=0), 1)
        planes = [np.where(on_it, plane, -1) for plane, on_it in enumerate(works)]
        return [_Leg(ports=replace(first, plane=plane), share=share, label=NO_LABELS) for plane in planes]

    def _between_leaves(self, leg: _Leg, number: int) -> list[Column]:
        ports, first = leg.ports, np.int32(self.fabric.first_switch)
        to = self.fabric.leaf[ports.receiver, ports.plane] - first
        at = np.where(ports.plane >= 0, self.fabric.leaf[ports.sender, ports.plane] - first, to)
        if isinstance(self.policy, Adaptive):
            pair = np.where(at != to, at.astype(np.int64) * self.hops.switches + to, -1)
            return [Column(items=pair, share=leg.share, leg=number, is_pair=True)]
        if isinstance(self.policy, Static):
            place = self.place[ports.receiver, ports.plane]
            links = walk_static(self.hops, at, to, place, self.fabric.spec.radix // 2)
        else:
            links = walk_hashed(self.hops, at, to, leg.label)
        return [Column(items=each, share=leg.share, leg=number) for each in links]
