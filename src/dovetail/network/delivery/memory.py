"""Estimates how much memory a simulation needs, so that one too large is refused before it runs.

    flows        190 bytes, with ECMP 115 + 76 per queue pair, 240 where shares are not all one; twice that if routes
                 change on the way
    detours      200 bytes for each way that a sprayed flow takes round a NIC that is down
    paths        each link that leads from a switch towards a leaf
    sprayed      each link between a pair of leaves, where packets go over all of them

The factors were measured with 1,024 to 16,384 GPUs. Sums are up to two thirds too high; they only decide what is
refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dovetail.network.delivery.symmetry import Classes
from dovetail.network.fabric.topology import SWITCH, Fabric
from dovetail.network.flows.flows import Bools, Ints
from dovetail.network.flows.simulation import Change
from dovetail.network.routing.ports import detour_ways
from dovetail.network.routing.route import Adaptive, Ecmp, Policy

MOST_BYTES = 4 * 2**30  # a simulation that needs more is refused


def needed_bytes(
    fabric: Fabric,
    gpus: int,
    flows: int,
    policy: Policy,
    changes: Sequence[Change] = (),
    classes: Classes | None = None,
) -> float:
    """Return the bytes for `flows` among the first `gpus`, with `changes` of links; `classes` if they are folded."""
    leaves = [np.unique(plane[plane >= 0]) for plane in fabric.leaf[:gpus].T]
    count = sum(map(len, leaves))
    per_flow = 115.0 + 76 * (policy.queue_pairs if isinstance(policy, Ecmp) else 1)
    is_sprayed = isinstance(policy, Adaptive)
    dark = _dark(fabric, gpus, changes)
    kinds = classes.gpu_class[:gpus] if classes else np.arange(gpus)
    share = len(np.unique(kinds[dark])) / len(np.unique(kinds))
    if is_sprayed and (classes or len(dark)):
        # Flows with a NIC down at either end, and the ways that are left to them.
        per_flow += 50 + 200 * (1 - (1 - share) ** 2) * (1 - share) * len(detour_ways(fabric))
    total = flows * per_flow + count * fabric.switches * 26.0
    cables = _cables(fabric, classes)
    total += count * _links_on(fabric, cables) * (40 if is_sprayed else 24)
    if is_sprayed:
        pairs = sum(len(each) ** 2 for each in leaves)
        if fabric.spec.by_rail:
            rails, dark_leaves = fabric.gpus_per_node, len(np.unique(fabric.leaf[dark]))
            # A flow leaves its rail if the NIC that would keep it there is down and its own is not.
            pairs = min(pairs, (pairs + round(dark_leaves * (rails - 1) * (1 - share)) * count) // rails)
        total += min(flows, pairs) * _links_between(fabric, cables) * 32
    return total * (2 if any(change.seconds > 0 for change in changes) else 1)


def _dark(fabric: Fabric, gpus: int, changes: Sequence[Change]) -> Ints:
    """Return those of the first `gpus` whose NIC has no port that stays up."""
    changed: Bools = np.zeros(fabric.links, bool)
    for change in changes:
        changed[change.links] = True
    ports = fabric.nic_link[:gpus]
    return np.flatnonzero(((ports < 0) | changed[ports] | changed[ports ^ 1]).all(axis=1)).astype(np.int32)


def _cables(fabric: Fabric, classes: Classes | None) -> Ints:
    """Return the links between switches that routes use: if flows are folded, only one of parallel links."""
    links = np.asarray(np.arange(fabric.links) if classes is None else classes.example, np.int32)
    return np.asarray(links[fabric.kind[links] == SWITCH])


def _links_on(fabric: Fabric, cables: Ints) -> float:
    """Return the number of links on shortest paths towards a leaf; in fat trees nearly every cable up in its plane."""
    if fabric.spec.kind == "fat-tree":
        return len(cables) / 2 / fabric.planes
    return 4.0 * fabric.switches / fabric.planes


def _links_between(fabric: Fabric, cables: Ints) -> float:
    """Return the number of links on all shortest paths between distant leaves; in fat trees all up and as many down."""
    if fabric.spec.kind != "fat-tree":
        return 8.0
    below, above = fabric.link_from[cables], fabric.link_to[cables]
    layer = fabric.switch_layer
    is_up = layer[below - fabric.first_switch] < layer[above - fabric.first_switch]
    switches, number = fabric.leaf[0, fabric.home_plane[0]], 0
    for _ in range(fabric.spec.layers - 1):
        chosen = is_up & np.isin(below, switches)
        switches, number = np.unique(above[chosen]), number + 2 * int(chosen.sum())
    return number
