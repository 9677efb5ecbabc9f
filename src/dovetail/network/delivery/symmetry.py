"""Folds flows that are alike into one, so that many thousands of GPUs can be simulated.

Nodes can be swapped without changing the fabric if their GPUs are on the same leaves, the same of their links fail and
come back at the same times, and the same number of their GPUs take part. Where packets are sprayed, routes and detours
are swapped with the nodes. So GPUs of the same index in such nodes form a class; so do the flows between two classes
(those within a node apart from the others), and their links. Parallel cables between two switches that are up at the
same times are a class as well. All flows of a class have the same rate, and one stands for all:

    share of a link's class = (flows that this one stands for) x (shares it has of links in the class) / (links in it)

ECMP and static tables send such flows over different paths, so they cannot be folded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dovetail.network.delivery.deliver import empty_seconds, most_messages_to_all
from dovetail.network.fabric.topology import Fabric
from dovetail.network.flows.flows import Bools, Floats, Flows, Ints, Longs, Routes
from dovetail.network.flows.simulation import Change, Outcome, simulate
from dovetail.network.routing.ports import Forwarding
from dovetail.network.routing.route import Adaptive, route


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Classes:
    """The classes of a fabric's GPUs, links and nodes."""

    gpu_class: Ints  # [endpoints]
    link_class: Ints  # [links]
    link_count: Longs  # [classes]
    example: Longs  # [classes] a link of each
    node_class: Longs  # [nodes] numbered from 0
    members: Longs  # [classes of nodes] GPUs of each such node that take part
    number: Longs  # [classes of nodes] number of nodes

    @property
    def num_flows(self) -> int:
        """The number of flows of a folded all-to-all."""
        members, alone = self.members, self.number == 1
        return int(members.sum() ** 2 - (members[alone] ** 2).sum() + (members * (members - 1)).sum())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FoldedFlows:
    """Flows, and the number that each stands for."""

    flows: Flows
    counts: Floats
    classes: Classes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FoldedOutcome:
    """The outcome of folded flows. `outcome` has one entry per folded flow, and its links are classes."""

    folded: FoldedFlows
    outcome: Outcome
    latency_seconds: float  # time of empty messages, before anything fails

    @property
    def seconds(self) -> float:
        return max(self.outcome.seconds, self.latency_seconds)

    @property
    def link_bytes(self) -> Floats:
        """The bytes over each link of the fabric [links]."""
        return self.outcome.link_bytes[self.folded.classes.link_class]

    @property
    def num_cut_off(self) -> int:
        """The number of flows of the whole demand that never finish."""
        return round(float(self.folded.counts[self.outcome.is_cut_off].sum()))

    @property
    def delivered_share(self) -> float:
        """The share of all bytes that was delivered."""
        if not self.outcome.is_cut_off.any():
            return 1.0
        meant = self.folded.flows.bytes @ self.folded.counts
        return float(self.outcome.delivered @ self.folded.counts / meant) if meant else 0.0


def classes_of(fabric: Fabric, changes: Sequence[Change] = (), gpus: int | None = None) -> Classes:
    """Find the classes for these `changes` of links, if the first `gpus` take part (None: all)."""
    each, fate = fabric.gpus_per_node, _fates(fabric, changes)
    members = np.clip((fabric.endpoints if gpus is None else gpus) - np.arange(fabric.nodes) * each, 0, each)
    links = np.column_stack([fabric.nic_link, fabric.pcie_link, fabric.host_link, fabric.nvlink_link])
    fates = [np.where(links >= 0, fate[links ^ way], -1) for way in (0, 1)]
    marks = np.column_stack([fabric.leaf, *fates]).reshape(fabric.nodes, -1)
    node_class = np.unique(np.column_stack([marks, members]), axis=0, return_inverse=True)[1].reshape(-1)
    gpu_class = (node_class[:, None] * each + np.arange(each)).ravel()
    vertex = np.arange(fabric.vertices, dtype=np.int64) + fabric.endpoints + fabric.nodes  # each a class of its own
    vertex[: fabric.endpoints] = gpu_class
    node_vertex = fabric.endpoints + node_class
    if fabric.first_switch > fabric.first_hub:
        vertex[fabric.first_hub : fabric.first_switch] = node_vertex
    if fabric.first_host < fabric.vertices:
        first_nic = fabric.first_switch + fabric.switches
        vertex[first_nic : fabric.first_host] += gpu_class - np.arange(fabric.endpoints)
        vertex[fabric.first_host : fabric.first_host + fabric.nodes] += node_class - np.arange(fabric.nodes)
    ends = vertex[fabric.link_from] * (2 * vertex.max() + 2) + vertex[fabric.link_to]
    ends = ends * (fate.max(initial=0) + 1) + fate
    _, example, link_class, count = np.unique(ends, return_index=True, return_inverse=True, return_counts=True)
    _, first, number = np.unique(node_class, return_index=True, return_counts=True)
    return Classes(
        gpu_class=gpu_class.astype(np.int32),
        link_class=link_class.reshape(-1).astype(np.int32),
        link_count=count.astype(np.int64),
        example=example.astype(np.int64),
        node_class=node_class,
        members=members[first],
        number=number,
    )


def _states(fabric: Fabric, changes: Sequence[Change]) -> Iterator[tuple[float, Bools]]:
    """Yield the times of changes, and which links are up from then on."""
    up = np.ones(fabric.links, bool)
    for seconds in sorted({change.seconds for change in changes}):
        for change in changes:
            if change.seconds == seconds:
                up[change.links] = change.is_up
        yield seconds, up.copy()


def _fates(fabric: Fabric, changes: Sequence[Change]) -> Longs:
    """Return a number for each link [links], the same for links that are up at the same times."""
    fate = np.zeros(fabric.links, np.int64)
    for _, up in _states(fabric, changes):
        fate = np.unique(2 * fate + up, return_inverse=True)[1].reshape(-1)
    return fate


def folded_all_to_all(
    fabric: Fabric, size: float, changes: Sequence[Change] = (), gpus: int | None = None
) -> FoldedFlows:
    """Return an all-to-all among the first `gpus` (None: all), `size` bytes per rank, for the `changes` to come."""
    each, classes = fabric.gpus_per_node, classes_of(fabric, changes, gpus)
    kinds = np.flatnonzero(classes.members)
    # The first node of each class, and the second for flows between two nodes of one class.
    order = np.argsort(classes.node_class, kind="stable")
    begins = (np.cumsum(classes.number) - classes.number)[kinds]
    first, second = order[begins], order[np.minimum(begins + 1, len(order) - 1)]
    number, members = classes.number[kinds].astype(np.float64), classes.members[kinds]
    one, other = (grid.ravel() for grid in np.indices((len(kinds), len(kinds))))
    is_same = one == other
    to_node, counts = np.where(is_same, second[other], first[other]), number[one] * (number[other] - is_same)
    across = _flows_between(each, (first[one], members[one]), (to_node, members[other]), counts)
    within = _flows_between(each, (first, members), (first, members), number)
    source, destination, stands_for = (np.concatenate(columns) for columns in zip(across, within, strict=True))
    chosen = (stands_for > 0) & (source != destination)
    ranks = fabric.endpoints if gpus is None else gpus
    flows = Flows.of(source[chosen], destination[chosen], size / ranks)
    return FoldedFlows(flows=flows, counts=stands_for[chosen], classes=classes)


def _flows_between(
    each: int, from_nodes: tuple[Longs, Longs], to_nodes: tuple[Longs, Longs], counts: Floats
) -> tuple[Longs, Longs, Floats]:
    """Return the sources, destinations and counts of all flows between pairs of nodes.

    Nodes are given with the number of their `each` GPUs that take part.
    """
    index, mate = (grid.ravel() for grid in np.indices((each, each)))
    (one, members), (other, mates) = from_nodes, to_nodes
    takes_part = (index < members[:, None]) & (mate < mates[:, None])
    source = (one[:, None] * each + index)[takes_part]
    destination = (other[:, None] * each + mate)[takes_part]
    return source, destination, np.broadcast_to(counts[:, None], takes_part.shape)[takes_part]


def simulate_folded(
    fabric: Fabric,
    folded: FoldedFlows,
    changes: Sequence[Change] = (),
    *,
    reroute_seconds: float = 0.0,
    forwarding: Forwarding = "source",
    window: float = 0.0,
) -> FoldedOutcome:
    """Simulate folded flows with adaptive routing, with the result that the whole demand would have.

    Raises ValueError for other `changes` than those that `folded` was folded for, and as `simulate` does.
    """
    classes = folded.classes
    # One of several parallel cables between switches stands for all.
    cables = np.zeros(fabric.links)
    cables[classes.example] = classes.link_count
    up, later = _changes_of(classes, fabric, changes)
    messages = most_messages_to_all(fabric, int(classes.members @ classes.number))
    latencies: list[float] = []

    def routes(is_up: Bools) -> Routes:
        found = route(fabric, folded.flows, Adaptive(), is_up[classes.link_class], forwarding, cables)
        latencies.append(empty_seconds(fabric, folded.flows, found.latency, messages)[1])
        return fold(found, folded.counts, classes)

    outcome = simulate(
        fabric.capacity[classes.example],
        folded.flows,
        routes,
        later,
        up=up,
        reroute_seconds=reroute_seconds,
        window=window,
    )
    return FoldedOutcome(folded=folded, outcome=outcome, latency_seconds=latencies[0])


def _changes_of(classes: Classes, fabric: Fabric, changes: Sequence[Change]) -> tuple[Bools, list[Change]]:
    """Return which classes of links are up at first, and their later changes.

    Raises ValueError for other changes than those of the classes.
    """
    up, later = np.ones(len(classes.example), bool), []
    for seconds, is_up in _states(fabric, changes):
        now = is_up[classes.example]
        if (is_up != now[classes.link_class]).any():
            raise ValueError(f"at {seconds} s only some links of a class change: fold for these changes")
        if seconds > 0:
            states = (now, True), (~now, False)
            later += [Change(seconds=seconds, links=_indices(of), is_up=state) for of, state in states]
        else:
            up = now
    return up, later


def _indices(chosen: Bools) -> Ints:
    return np.flatnonzero(chosen).astype(np.int32)


def fold(routes: Routes, counts: Floats, classes: Classes) -> Routes:
    """Return `routes` over classes of links, for flows that stand for `counts` each."""
    num_classes, bundles = len(classes.example), routes.bundles
    becomes = np.concatenate([classes.link_class, num_classes + np.arange(len(bundles))]).astype(np.int32)
    part = np.concatenate([1.0 / classes.link_count[classes.link_class], np.ones(len(bundles))])
    shares = np.repeat(counts, np.diff(routes.offsets))
    if len(routes.shares):
        shares *= routes.shares
    for low in range(0, len(shares), 1 << 20):  # in blocks, to limit memory
        shares[low : low + (1 << 20)] *= part[routes.items[low : low + (1 << 20)]]
    return replace(
        routes,
        num_links=num_classes,
        items=becomes[routes.items],
        shares=shares,
        bundles=replace(bundles, links=becomes[bundles.links], shares=bundles.shares * part[bundles.links]),
    )


def named_gpus(result: FoldedOutcome, most: int) -> tuple[list[int], bool]:
    """Return up to `most` GPUs without which nothing would be cut off, and whether there are others.

    The first has the most flows that are cut off, the next the most of those left, and so on.
    """
    folded, classes = result.folded, result.folded.classes
    each = len(classes.gpu_class) // len(classes.node_class)
    chosen = result.outcome.is_cut_off
    ends = [end[chosen].astype(np.int64) for end in (folded.flows.source, folded.flows.destination)]
    is_within = ends[0] // each == ends[1] // each
    sides = [classes.gpu_class[end] for end in ends]
    number = np.repeat(classes.number, each)
    load = np.zeros(len(number))
    for side in sides:
        load += np.bincount(side, folded.counts[chosen] / number[side], minlength=len(number))
    left = load[classes.gpu_class]  # each GPU's flows that are cut off
    node = np.arange(len(left)) // each
    named: list[int] = []
    while left.max(initial=0.0) > 0.5 and len(named) < most:
        worst = int(np.argmax(left))
        named.append(worst)
        for mine, others in (sides, sides[::-1]):
            is_mine = mine == classes.gpu_class[worst]
            for inside in (False, True):
                partners = np.zeros(len(number), bool)
                partners[others[is_mine & (is_within == inside)]] = True
                left -= partners[classes.gpu_class] & ((node == node[worst]) == inside)
        left[worst] = 0.0
    return named, bool(left.max(initial=0.0) > 0.5)
