"""Flows that are alike, folded into one, so that demands among many thousands of GPUs can be simulated.

Nodes whose GPUs are on the same leaves can be swapped without changing the fabric. Where packets are sprayed, routes
are swapped with them, so GPUs with one index in such nodes are a class, flows between two classes are (those that stay
in their node apart from others), and so are their links. All of a class have the same rate; one stands for them:

    share of a link's class = (flows that this one stands for) x (shares it has of links in the class) / (links in it)

A hash tells alike flows apart, so ECMP and static tables cannot be folded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dovetail.network.flows import Bundles, Floats, Flows, Ints, Longs, Routes
from dovetail.network.ports import Forwarding
from dovetail.network.routing import Adaptive, route
from dovetail.network.simulation import Outcome, simulate
from dovetail.network.topology import Fabric


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Classes:
    """Of the GPUs and links of a fabric."""

    gpu_class: Ints  # [endpoints]
    link_class: Ints  # [links]
    link_count: Longs  # [classes]
    example: Longs  # [classes] a link of each


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FoldedFlows:
    """Flows, and how many each stands for."""

    flows: Flows
    counts: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FoldedOutcome:
    """`outcome` has one entry per folded flow, and its links are classes."""

    outcome: Outcome
    classes: Classes

    @property
    def seconds(self) -> float:
        return self.outcome.seconds

    @property
    def link_bytes(self) -> Floats:
        """[links of the fabric]"""
        return self.outcome.link_bytes[self.classes.link_class]


def classes_of(fabric: Fabric) -> Classes:
    """Nodes are alike that have the same leaves."""
    each = fabric.gpus_per_node
    leaves = fabric.leaf.reshape(fabric.nodes, each * fabric.planes)
    node_class = np.unique(leaves, axis=0, return_inverse=True)[1].reshape(-1)
    gpu_class = (node_class[:, None] * each + np.arange(each)).ravel()
    vertex = np.arange(fabric.vertices, dtype=np.int64) + fabric.endpoints + fabric.nodes  # of its own
    vertex[: fabric.endpoints] = gpu_class
    node_vertex = fabric.endpoints + node_class
    if fabric.first_switch > fabric.first_hub:
        vertex[fabric.first_hub : fabric.first_switch] = node_vertex
    if fabric.first_host < fabric.vertices:
        first_nic = fabric.first_switch + fabric.switches
        vertex[first_nic : fabric.first_host] += gpu_class - np.arange(fabric.endpoints)
        vertex[fabric.first_host : fabric.first_host + fabric.nodes] += node_class - np.arange(fabric.nodes)
    ends = vertex[fabric.link_from] * (2 * vertex.max() + 2) + vertex[fabric.link_to]
    # Each cable between two switches is its own class, whichever two it joins.
    is_own = (fabric.link_from >= fabric.first_switch) & (fabric.link_to >= fabric.first_switch)
    is_own &= np.maximum(fabric.link_from, fabric.link_to) < fabric.first_switch + fabric.switches
    ends[is_own] = -1 - np.flatnonzero(is_own)
    _, example, link_class, count = np.unique(ends, return_index=True, return_inverse=True, return_counts=True)
    return Classes(
        gpu_class=gpu_class.astype(np.int32),
        link_class=link_class.reshape(-1).astype(np.int32),
        link_count=count.astype(np.int64),
        example=example.astype(np.int64),
    )


def folded_all_to_all(fabric: Fabric, size: float) -> FoldedFlows:
    """All-to-all among all GPUs, `size` bytes per rank."""
    each = fabric.gpus_per_node
    node_class = classes_of(fabric).gpu_class[::each] // each
    _, first, number = np.unique(node_class, return_index=True, return_counts=True)
    # The second node of a class, for flows between two nodes of it.
    order = np.argsort(node_class, kind="stable")
    second = order[np.minimum(np.searchsorted(node_class[order], np.arange(len(first))) + 1, len(order) - 1)]
    one, other = np.divmod(np.arange(len(first) ** 2), len(first))
    is_same = one == other
    to_node = np.where(is_same, second[other], first[other])
    counts = np.where(is_same, number[one] * (number[one] - 1), number[one] * number[other]).astype(np.float64)
    there = counts > 0
    from_node, to_node, counts = first[one][there], to_node[there], counts[there]
    index, mate = (grid.ravel() for grid in np.meshgrid(np.arange(each), np.arange(each), indexing="ij"))
    across = _pairs(from_node, to_node, counts, index, mate, each)
    differs = index != mate
    within = _pairs(first, first, number.astype(np.float64), index[differs], mate[differs], each)
    source, destination, stands_for = (np.concatenate(columns) for columns in zip(across, within, strict=True))
    return FoldedFlows(flows=Flows.of(source, destination, size / fabric.endpoints), counts=stands_for)


def _pairs(
    from_node: Longs, to_node: Longs, counts: Floats, index: Longs, mate: Longs, each: int
) -> tuple[Longs, Longs, Floats]:
    source = (from_node[:, None] * each + index[None, :]).ravel()
    destination = (to_node[:, None] * each + mate[None, :]).ravel()
    return source, destination, np.repeat(counts, len(index))


def simulate_folded(
    fabric: Fabric, folded: FoldedFlows, forwarding: Forwarding = "source", window: float = 0.0
) -> FoldedOutcome:
    """Adaptive routing, all links up."""
    classes = classes_of(fabric)
    routes = fold(route(fabric, folded.flows, Adaptive(), None, forwarding), folded.counts, classes)
    outcome = simulate(fabric.capacity[classes.example], folded.flows, routes, window=window)
    return FoldedOutcome(outcome=outcome, classes=classes)


def fold(routes: Routes, counts: Floats, classes: Classes) -> Routes:
    """`routes` of flows that stand for `counts` each, over classes of links."""
    is_link = routes.items < routes.num_links
    link = np.where(is_link, routes.items, 0)
    num_classes = len(classes.example)
    shares = routes.item_shares() * np.repeat(counts, np.diff(routes.offsets))
    inside = classes.link_class[routes.bundles.links]
    return replace(
        routes,
        num_links=num_classes,
        items=np.where(is_link, classes.link_class[link], routes.items - routes.num_links + num_classes).astype(
            np.int32
        ),
        shares=np.where(is_link, shares / classes.link_count[classes.link_class[link]], shares),
        bundles=Bundles(
            offsets=routes.bundles.offsets,
            links=inside,
            shares=routes.bundles.shares / classes.link_count[inside],
        ),
    )
