"""How much memory a simulation needs, before it takes it: measured bytes per flow, per path and per sprayed share.

    flows        190 bytes, with ECMP 115 + 76 per queue pair; twice where routes change on the way
    paths        each link that leads on from a switch towards a leaf
    sprayed      each link between a pair of leaves, where packets go over all of them

The factors were measured with 1,024 to 16,384 GPUs and hold within a third; they decide what is refused, nothing else.
"""

from __future__ import annotations

import numpy as np

from dovetail.network.routing import Adaptive, Ecmp, Policy
from dovetail.network.topology import SWITCH, Fabric


def needed_bytes(fabric: Fabric, gpus: int, flows: int, policy: Policy, is_rerouted: bool) -> float:
    """Bytes for `flows` among the first `gpus`."""
    leaves = [np.unique(plane[plane >= 0]) for plane in fabric.leaf[:gpus].T]
    count = sum(map(len, leaves))
    per_flow = 115 + 76 * (policy.queue_pairs if isinstance(policy, Ecmp) else 1)
    total = float(flows) * per_flow + count * fabric.switches * 26.0
    is_sprayed = isinstance(policy, Adaptive)
    total += count * _links_on(fabric) * (64 if is_sprayed else 24)
    if is_sprayed:
        rails = fabric.gpus_per_node if fabric.spec.by_rail else 1
        pairs = min(flows, sum(len(each) ** 2 for each in leaves) / rails)
        total += pairs * _links_between(fabric) * 48
    return total * (2 if is_rerouted else 1)


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
