"""Rings over RoCE with ECMP, static tables and adaptive routing [ISCA Fig. 8].

ECMP hashes each queue pair onto one path, so that flows may collide; with static tables and sprayed packets they do
not. The paper has bars for TP 8, 4 and 2, but gives no numbers of GPUs, nodes or queue pairs. What is assumed here is
unverified:

    job         8 nodes of 8 GPUs, each on a leaf of its own, alone on 2,048 ports of 64-port switches
    groups      GPUs of one rank in TP gather or reduce-scatter: 8 / TP of each node, all groups at once
    striping    a group has a channel for each of its NICs per node, which NVLink feeds, so the bandwidth grows with
                8 / TP; each channel carries as much as the others, and the group waits for its slowest
    queue pairs a channel of NCCL has a connection of one queue pair per hop; with two channels per NIC there are two
    chunks      a ring passes chunks on as they arrive, so all its hops run at once, as fast as the slowest

A ring is then one flow with a share of 1 on every link of all its hops, and rates are max-min fair. All-gather and
reduce-scatter have the same bytes on the same hops. Bands are over seeds of the hash.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dovetail.catalog.fabrics import load_fabric, resized
from dovetail.network.demands.collectives import ring_orders
from dovetail.network.fabric.topology import Fabric, build
from dovetail.network.flows.flows import Floats, Flows, Longs, Routes, joined, max_min_rates
from dovetail.network.routing.route import Adaptive, Ecmp, Policy, Static, route
from dovetail.reproduce.network import Values, spread_of
from dovetail.reproduce.rows import Found
from dovetail.spec.band import Band

NODES, EACH = 8, 8
SEEDS = range(32)
QUEUE_PAIRS = (1, 2, 4, 8)  # per NIC
TAKEN = 2


def roce_fabric() -> Fabric:
    """Build two layers of 64-port switches with RoCE's latencies."""
    roce = load_fabric("mpft-roce")
    return build(resized(load_fabric("ft2"), name="ft2-roce", nic=roce.nic, hop_us=roce.hop_us))


def find() -> Found:
    fabric = roce_fabric()
    nodes = np.arange(NODES) * (fabric.nodes // NODES)
    values: Values = {}
    for parallel in (8, 4, 2):
        adaptive, static = (
            float(_bandwidth(fabric, nodes, parallel, TAKEN, policy).mean()) for policy in (Adaptive(), Static())
        )
        subject = f"TP{parallel}"
        values[subject, "adaptive, GB/s"] = Band.exact(adaptive / 1e9)
        values[subject, "static against adaptive, %"] = Band.exact(100 * (static / adaptive - 1))
        for pairs in QUEUE_PAIRS:
            lost = ecmp_losses(fabric, nodes, parallel, pairs)
            noun = "queue pair" if pairs == 1 else "queue pairs"
            values[subject, f"lost by ECMP, {pairs} {noun} per NIC, %"] = 100 * spread_of(lost.tolist())
    values["256 nodes, TP8", "slowest hop, 1 queue pair per NIC, % of line rate"] = _everyone(fabric)
    return Found(
        values=values,
        remarks=(
            "with one queue pair per hop a ring waits for the hop that shares its link with the most others, and over "
            "all nodes some link has five flows or more. A job of 8 nodes is in the published range with 2 queue pairs "
            "per NIC; with eight nothing is lost, because a collision then costs an eighth of a NIC and the links have "
            "room. It is not published which of these the paper ran, so the range is met by a choice.",
            "nodes that share leaves, or switches of 128 ports, lose less; jobs of more nodes lose more.",
        ),
    )


def ecmp_losses(fabric: Fabric, nodes: Longs, parallel: int, queue_pairs: int) -> Floats:
    """Return the share of bandwidth that ECMP loses against sprayed packets, as a mean over groups [seeds]."""
    best = _bandwidth(fabric, nodes, parallel, queue_pairs, Adaptive()).mean()
    reached = [_bandwidth(fabric, nodes, parallel, queue_pairs, Ecmp(seed=seed)).mean() for seed in SEEDS]
    return np.asarray(1 - np.array(reached) / best)


def _bandwidth(fabric: Fabric, nodes: Longs, parallel: int, queue_pairs: int, policy: Policy) -> Floats:
    """Return the bytes/s over all channels, each as fast as the slowest of its group [groups]."""
    flows, ring = _rings(nodes, parallel, queue_pairs)
    rates = max_min_rates(fabric.capacity, as_rings(route(fabric, flows, policy), ring))
    of_group = rates.reshape(parallel, -1)
    return np.asarray(of_group.min(axis=1) * of_group.shape[1])


def _rings(nodes: Longs, parallel: int, queue_pairs: int) -> tuple[Flows, Longs]:
    """Return the flows from each GPU to the next of its ring, group by group, and the ring of each flow."""
    parts: list[Flows] = []
    for group in range(parallel):
        members = (nodes[:, None] * EACH + np.arange(group, EACH, parallel)).ravel()
        channels = [each for each in ring_orders(members.tolist(), EACH, EACH // parallel) for _ in range(queue_pairs)]
        parts += [Flows.of(ring, np.roll(ring, -1), 1.0, queue_pair=index) for index, ring in enumerate(channels)]
    return joined(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])


def as_rings(routes: Routes, ring: Longs) -> Routes:
    """Return one flow for each ring, over all links of its hops. `ring` must be sorted."""
    assert (np.diff(ring) >= 0).all() and not routes.is_cut_off.any(), "rings one after another, whole"
    ends = np.searchsorted(ring, np.arange(ring[-1] + 1), "right")
    latency = np.maximum.reduceat(routes.latency, np.concatenate([[0], ends[:-1]]))
    return replace(
        routes,
        offsets=np.concatenate([[0], routes.offsets[ends]]),
        latency=latency,
        is_cut_off=np.zeros(len(ends), bool),
    )


def _everyone(fabric: Fabric) -> Band:
    """Return the percent of line rate that the slowest hop has if all nodes are in the rings.

    Each node's next node is on another leaf, and hops do not wait for one another.
    """
    leaves = len(np.unique(fabric.leaf))
    first = np.arange(0, fabric.endpoints, EACH).reshape(leaves, -1).T.ravel()
    flows = joined([Flows.of(first + index, np.roll(first, -1) + index, 1.0) for index in range(EACH)])
    line = float(fabric.capacity[fabric.nic_link[0].max()])
    slowest = []
    for seed in SEEDS:
        rates = max_min_rates(fabric.capacity, route(fabric, flows, Ecmp(seed=seed)))
        slowest.append(100 * float(rates.min()) / line)
    return spread_of(slowest)
