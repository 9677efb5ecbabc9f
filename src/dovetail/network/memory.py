"""How much memory a simulation needs, before it takes it: measured bytes per flow, per path and per sprayed share.

    flows        190 bytes, with ECMP 115 + 76 per queue pair, 240 where shares are not all one; twice where routes
                 change on the way
    detours      200 bytes for each way that a sprayed flow takes round a dark NIC
    paths        each link that leads on from a switch towards a leaf
    sprayed      each link between a pair of leaves, where packets go over all of them

The factors were measured with 1,024 to 16,384 GPUs, are right within a half, and decide what is refused, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dovetail.network.flows import Bools, Ints
from dovetail.network.ports import detour_ways
from dovetail.network.routing import Adaptive, Ecmp, Policy
from dovetail.network.simulation import Change
from dovetail.network.topology import SWITCH, Fabric


def needed_bytes(
    fabric: Fabric,
    gpus: int,
    flows: int,
    policy: Policy,
    changes: Sequence[Change] = (),
    gpu_class: Ints | None = None,
) -> float:
    """Bytes for `flows` among the first `gpus`, with `changes` of links; `gpu_class`: where flows are folded."""
    leaves = [np.unique(plane[plane >= 0]) for plane in fabric.leaf[:gpus].T]
    count = sum(map(len, leaves))
    per_flow = 115.0 + 76 * (policy.queue_pairs if isinstance(policy, Ecmp) else 1)
    is_sprayed = isinstance(policy, Adaptive)
    dark = _dark(fabric, gpus, changes)
    if is_sprayed and (gpu_class is not None or len(dark)):
        kinds = np.arange(gpus) if gpu_class is None else gpu_class[:gpus]
        share = len(np.unique(kinds[dark])) / len(np.unique(kinds))
        # Flows with a dark NIC at either end, and the ways that these leave.
        per_flow += 50 + 200 * (1 - (1 - share) ** 2) * (1 - share) * len(detour_ways(fabric))
    total = flows * per_flow + count * fabric.switches * 26.0
    total += count * _links_on(fabric) * (64 if is_sprayed else 24)
    if is_sprayed:
        pairs = sum(len(each) ** 2 for each in leaves)
        if fabric.spec.by_rail:
            rails, dark_leaves = fabric.gpus_per_node, np.unique(fabric.leaf[dark])
            # Rails are left where the NIC that would keep to one is dark.
            pairs = min(pairs, pairs // rails + len(dark_leaves) * (rails - 1) * count // rails)
        total += min(flows, pairs) * _links_between(fabric) * 48
    return total * (2 if any(change.seconds > 0 for change in changes) else 1)


def _dark(fabric: Fabric, gpus: int, changes: Sequence[Change]) -> Ints:
    """GPUs of the first `gpus` of whose NICs no port stays up."""
    changed: Bools = np.zeros(fabric.links, bool)
    for change in changes:
        changed[change.links] = True
    ports = fabric.nic_link[:gpus]
    return np.flatnonzero(((ports < 0) | changed[ports] | changed[ports ^ 1]).all(axis=1)).astype(np.int32)


def _links_on(fabric: Fabric) -> float:
    """Links on shortest paths towards one leaf: in fat trees nearly every cable upwards of its plane."""
    if fabric.spec.kind == "fat-tree":
        return np.count_nonzero(fabric.kind == SWITCH) / 2 / fabric.planes
    return 4.0 * fabric.switches / fabric.planes


def _links_between(fabric: Fabric) -> float:
    """Links on all shortest paths between two leaves far apart."""
    half = fabric.spec.radix / 2
    if fabric.spec.kind == "fat-tree":
        return 2 * half if fabric.spec.layers == 2 else 2 * (half + half**2)
    return 8.0
