"""Transfers as flows: between pipeline stages, of caches, within nodes, and from the host.

pipeline          each GPU of a stage sends to the GPU of the same place in the next stage, all at once; or also
                  back, as with DualPipe
kv-transfer       caches go from GPUs that read prompts to those that write outputs
node-all-gather   a ring within each node, over NVLink
host-copy         bytes go from the host's memory to its GPUs, over PCIe [ISCA §4.5]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dovetail.network.demands.collectives import Demand, Step, check_size, checked_ranks
from dovetail.network.fabric.topology import Fabric
from dovetail.network.flows.flows import Flows, joined
from dovetail.network.routing.route import host_of
from dovetail.spec.layout import divisors


def pipeline(gpus: Sequence[int], size: float, stages: int, both_ways: bool = False) -> Demand:
    """Return `size` bytes from each GPU of a stage to the one at the same place in the next, or in both directions.

    Raises ValueError for fewer than two stages, and for GPUs that do not divide into them.
    """
    ranks = checked_ranks(gpus, size)
    count = len(ranks)
    if stages < 2:
        raise ValueError(f"stages = {stages}: a pipeline has 2 or more")
    if count % stages:
        nearest = min(divisors(count)[1:], key=lambda divisor: abs(divisor - stages))
        raise ValueError(
            f"{count} GPUs do not make {stages} equal stages: use --stages {nearest}, or --gpus "
            f"{max(1, round(count / stages)) * stages}"
        )
    each = count // stages
    flows = Flows.of(ranks[:-each], ranks[each:], size)
    if both_ways:
        flows = joined([flows, flows.reversed()])
    return Demand(name="pipeline", ranks=count, size=size, bus_factor=1.0, steps=(Step(flows=flows),))


def kv_transfer(gpus: Sequence[int], size: float, senders: int, gpus_per_node: int = 1) -> Demand:
    """Return `size` bytes from each of the first `senders` GPUs, divided so that all others get the same amount.

    The bytes of senders and receivers are laid side by side, ordered by their GPUs' index in the node so that bytes
    keep to their rail, and each sender sends to the receivers beside it. Raises ValueError without a sender or a
    receiver.
    """
    ranks = checked_ranks(gpus, size)
    receivers = len(ranks) - senders
    if senders < 1 or receivers < 1:
        raise ValueError(f"{senders} of {len(ranks)} GPUs send caches: use --prefill-gpus 1 to {len(ranks) - 1}")
    by_index = [part[np.argsort(part % gpus_per_node, kind="stable")] for part in (ranks[:senders], ranks[senders:])]
    # The unit is 1 / (senders x receivers) of all bytes, so that the cuts are whole numbers.
    cuts = np.unique(np.concatenate([np.arange(senders + 1) * receivers, np.arange(receivers + 1) * senders]))
    source, destination = cuts[:-1] // receivers, cuts[:-1] // senders
    flows = Flows.of(by_index[0][source], by_index[1][destination], size * np.diff(cuts) / receivers)
    return Demand(name="kv-transfer", ranks=len(ranks), size=size, bus_factor=1.0, steps=(Step(flows=flows),))


def node_all_gather(fabric: Fabric, gpus: Sequence[int], size: float) -> Demand:
    """Return the gathering of `size` bytes by those of `gpus` that share a node, in each node.

    Raises ValueError without NVLink, and if no two GPUs share a node.
    """
    ranks = checked_ranks(gpus, size)
    node = ranks // fabric.gpus_per_node
    groups = [ranks[node == each] for each in np.unique(node)]
    rings = [group for group in groups if len(group) > 1]
    if not rings or (fabric.nvlink_link < 0).any():
        raise ValueError(f"node-all-gather: no two of these GPUs of {fabric.name} share a node with NVLink")
    # Rings may differ in length, so the steps of a ring are joined into one stream: all parts but the rank's own.
    flows = joined([Flows.of(ring, np.roll(ring, -1), size * (len(ring) - 1) / len(ring)) for ring in rings])
    longest = max(map(len, rings))
    step = Step(flows=replace(flows, bytes=flows.bytes / (longest - 1)), times=longest - 1)
    factor = (longest - 1) / longest
    return Demand(name="node-all-gather", ranks=len(ranks), size=size, bus_factor=factor, steps=(step,))


def host_copy(fabric: Fabric, gpus: Sequence[int], size: float) -> Demand:
    """Return `size` bytes to each GPU from its own host. Raises ValueError if PCIe is not modelled."""
    check_size(size)
    if (fabric.host_link < 0).any():
        raise ValueError(
            f"host-copy: {fabric.name} has no PCIe; use --fabric h800-2048, or a fabric file with a [pcie] table"
        )
    ranks = np.asarray(gpus, np.int32)
    hosts = [host_of(fabric, int(node)) for node in ranks // fabric.gpus_per_node]
    step = Step(flows=Flows.of(hosts, ranks, size))
    return Demand(name="host-copy", ranks=len(ranks), size=size, bus_factor=1.0, steps=(step,))
