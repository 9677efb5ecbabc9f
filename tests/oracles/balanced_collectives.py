"""Closed forms for collectives that load all links alike: whole nodes, fat trees that block nothing, sprayed packets.

Of n ranks, g of them on a node, with p = size / n and f = 1 where bytes are forwarded within nodes
(`network.routing.route`):

    all-to-all   NIC      (n - g) p
                 NVLink   (g - 1) p + f (n - g) (g - 1) / g p
    ring         NIC      ceil(c / g) p / c       of c channels, each step
                 NVLink   p (1 - (1 - f) floor(c / g) / c), p on a single node

Time is that of the link that needs longest, and the latency of the longest path; and at least what it takes to post
the messages that go to other nodes, n - g of them and ceil(c / g) in each step of a ring (`network.delivery.deliver`).
"""

from __future__ import annotations

import numpy as np

from dovetail.network.demands.collectives import Demand
from dovetail.network.fabric.topology import Fabric
from dovetail.network.routing.paths import find_hops


def all_to_all_seconds(fabric: Fabric, ranks: int, size: float) -> float:
    """Among the first `ranks` GPUs. Raises ValueError where these are not whole nodes."""
    _check(fabric, ranks)
    each, part = fabric.gpus_per_node, size / ranks
    outside, forwarded = ranks - each, _forwards(fabric)
    over_nic = 0.0
    if outside:
        over_nic = max(outside * part / _nic_rate(fabric), fabric.spec.posting_seconds(outside)) + _latency(
            fabric, ranks, forwarded
        )
    if each == 1:
        return over_nic
    inside = (each - 1) * part + forwarded * outside * (each - 1) / each * part
    latency = _latency(fabric, ranks, forwarded) if outside and forwarded else _nvlink_latency(fabric)
    return max(over_nic, inside / _nvlink_rate(fabric) + latency)


def ring_seconds(fabric: Fabric, demand: Demand, channels: int = 1) -> float:
    """Of a `demand` in rings among the first GPUs, node by node. Raises ValueError where these are not whole nodes."""
    ranks, each = demand.ranks, fabric.gpus_per_node
    _check(fabric, ranks)
    part, times = demand.size / ranks, demand.steps[0].times
    # Between nodes GPU c - 1 sends to GPU c, which are on different planes or rails.
    forwarded = _forwards(fabric)
    leaves_node = channels // each / channels if ranks > each and not forwarded else 0.0
    step = part * (1 - leaves_node) / _nvlink_rate(fabric) + _nvlink_latency(fabric) if each > 1 else 0.0
    if ranks > each:
        posted = -(-channels // each)
        busiest = max(posted * part / channels / _nic_rate(fabric), fabric.spec.posting_seconds(posted))
        if forwarded:
            busiest = max(busiest, part / _nvlink_rate(fabric))
        step = max(step, busiest + _latency(fabric, ranks, forwarded))
    return times * step


def _check(fabric: Fabric, ranks: int) -> None:
    if ranks % fabric.gpus_per_node or not 0 < ranks <= fabric.endpoints:
        each = fabric.gpus_per_node
        raise ValueError(f"{ranks} ranks on nodes of {each}: the closed form is of whole nodes, at most {fabric.nodes}")


def _forwards(fabric: Fabric) -> bool:
    has_own_planes = fabric.planes > 1 and fabric.spec.planes_per_nic == 1
    return fabric.gpus_per_node > 1 and (has_own_planes or fabric.spec.by_rail)


def _nic_rate(fabric: Fabric) -> float:
    ports = fabric.nic_link[0]
    return float(fabric.capacity[ports[ports >= 0]].sum())


def _nvlink_rate(fabric: Fabric) -> float:
    return float(fabric.capacity[fabric.nvlink_link[0]])


def _nvlink_latency(fabric: Fabric) -> float:
    return float(2 * fabric.latency[fabric.nvlink_link[0]])


def _latency(fabric: Fabric, ranks: int, is_forwarded: bool) -> float:
    """Of the longest path between two of the ranks on different nodes."""
    # Forwarded bytes stay on the plane or rail of one index; all are alike.
    leaves = fabric.leaf[0 : ranks : fabric.gpus_per_node if is_forwarded else 1]
    leaves = np.unique(leaves[leaves >= 0])
    hops = find_hops(fabric, leaves)
    farthest = int(hops.distance[:, leaves - fabric.first_switch].max())
    switch_latency = float(fabric.latency[hops.link[0]]) if farthest else 0.0
    port = int(fabric.nic_link[0].max())
    return float(2 * fabric.latency[port]) + farthest * switch_latency + is_forwarded * _nvlink_latency(fabric)
