"""Published figures of networks: latencies, planes against rails, and node-limited routing.

    table5        The fabrics' files have these latencies, so that paths give them back shows only that links are summed
                  correctly. The latencies of other paths are ours [ISCA Table 5].
    fig5, fig6    An all-to-all on eight planes against rails that share spines, with sprayed packets. NCCL forwards
                  over NVLink in both (PXN), so the bytes on each link are the same, and any difference would be an
                  error of the simulation. Cases in which the two do differ are added [ISCA Fig. 5, Fig. 6].
    node_limited  Messages over InfiniBand with and without forwarding within nodes [ISCA §4.3].

Bands are from all links at the slow end, and at the fast end, of what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dovetail.catalog.fabrics import load_fabric, resized
from dovetail.cost.ops.ops import Exchange
from dovetail.network.delivery.deliver import deliver
from dovetail.network.demands.closed_forms import Mode
from dovetail.network.demands.collectives import Demand, all_to_all, point_to_point
from dovetail.network.demands.distinct import distinct_bins
from dovetail.network.demands.experts import Experts, dispatch, sample_choices
from dovetail.network.fabric.topology import Fabric, build
from dovetail.network.routing.ports import Forwarding
from dovetail.network.routing.route import Adaptive, Ecmp
from dovetail.reproduce.rows import Found
from dovetail.spec.band import Band
from dovetail.spec.fabric import FabricSpec
from dovetail.spec.hardware import Link
from dovetail.spec.measurements import Estimate

Values = dict[tuple[str, str], Band]
GPUS = 2048  # about as many as were built [ISCA §5.1]
MESSAGE = 64.0  # bytes [ISCA Table 5]
LARGE = tuple(2.0**power for power in range(27, 35))  # 128 MiB to 16 GiB [ISCA Fig. 5]
ALL = tuple(2.0**power for power in range(6, 35, 4))  # 64 B to 16 GiB [ISCA Fig. 6]
NODES, CHOICES, EXPERTS = 8, 8, 256  # [ISCA §4.3]
PER_RANK = 4  # experts on a rank [ISCA §4.3]
FP8_TOKEN = 7168 + 56 * 4.0  # bytes: values and scales [DeepEP]
SEEDS = range(8)


def with_ends(spec: FabricSpec) -> tuple[Fabric, Fabric, Fabric]:
    """Return the fabric, the fabric with all links at the slow ends of their bands, and the one with fast links."""
    slow, fast = _at_end(spec, is_fast=False), _at_end(spec, is_fast=True)
    return build(spec), build(slow), build(fast)


def _at_end(spec: FabricSpec, is_fast: bool) -> FabricSpec:
    def moved(estimate: Estimate, up: bool) -> Estimate:
        return estimate.model_copy(update={"value": estimate.high if up else estimate.low})

    def end(link: Link | None) -> Link | None:
        if link is None:
            return None
        rate, latency = moved(link.achieved_gbs, is_fast), moved(link.latency_us, not is_fast)
        return link.model_copy(update={"achieved_gbs": rate, "latency_us": latency})

    posting = spec.posting
    if posting is not None:
        costs = {key: moved(getattr(posting, key), not is_fast) for key in ("host_us", "gpu_us")}
        posting = posting.model_copy(update=costs)
    hop = moved(spec.hop_us, not is_fast)
    return resized(spec, nic=end(spec.nic), nvlink=end(spec.nvlink), hop_us=hop, posting=posting)


def latencies() -> Found:
    """Compute the latencies of 64 bytes between two GPUs."""
    last = GPUS - 8  # GPU 0 of the last node
    infiniband, roce = load_fabric("mpft", GPUS), load_fabric("mpft-roce", GPUS)
    two, three = load_fabric("ft2", GPUS), load_fabric("ft3", GPUS)
    paths = {
        ("InfiniBand", "same leaf, us"): (infiniband, 8),
        ("InfiniBand", "cross leaf, us"): (infiniband, last),
        ("RoCE", "same leaf, us"): (roce, 8),
        ("RoCE", "cross leaf, us"): (roce, last),
        ("NVLink", "same node, us"): (infiniband, 1),
        ("InfiniBand, eight planes", "to another plane, by NVLink first, us"): (infiniband, last + 1),
        ("InfiniBand, two layers", "to another index, us"): (two, last + 1),
        ("InfiniBand, three layers", "between pods, us"): (three, last),
    }
    return Found(values={name: 1e6 * _message_seconds(spec, gpu) for name, (spec, gpu) in paths.items()})


def _message_seconds(spec: FabricSpec, gpu: int) -> Band:
    demand = point_to_point([(0, gpu)], MESSAGE)
    value, slow, fast = (deliver(fabric, demand, Adaptive()).seconds for fabric in with_ends(spec))
    return Band(value, fast, slow)


def large_exchanges() -> Found:
    """Simulate large messages on 32, 64 and 128 GPUs, and hashed paths between nodes on all leaves."""
    planes, rails = with_ends(load_fabric("mpft", GPUS)), build(load_fabric("mrft", GPUS))
    values: Values = {}
    for ranks in (32, 64, 128):
        subject = f"{ranks} GPUs"
        differences = [_difference(planes[0], rails, all_to_all(range(ranks), size)) for size in LARGE]
        values[subject, "128 MiB to 16 GiB, planes over rails, %"] = _largest(differences)
        values[subject, "bus bandwidth at 16 GiB, GB/s"] = _bus_bandwidth(planes, ranks, LARGE[-1])
    far = all_to_all(_scattered(16), LARGE[-1])
    for name, fabric in (("planes", planes[0]), ("rails", rails)):
        reached = [deliver(fabric, far, Ecmp(seed=seed)).bus_bandwidth / 1e9 for seed in SEEDS]
        values["128 GPUs on all leaves, ECMP", f"{name}, bus bandwidth at 16 GiB, GB/s"] = spread_of(reached)
    return Found(
        values=values,
        remarks=(
            "hashed paths do not slow an all-to-all of 128 GPUs, even with its nodes on all leaves: each flow is a"
            " fraction of a NIC, and there are more paths than NICs. That is so for planes and for rails.",
        ),
    )


def small_exchanges() -> Found:
    """Simulate all sizes on 16 GPUs, and what rails would gain by going through spines instead of NVLink."""
    planes, rails = with_ends(load_fabric("mpft", GPUS)), build(load_fabric("mrft", GPUS))
    demands = [all_to_all(range(16), size) for size in ALL]
    direct = _difference(planes[0], rails, demands[0], forwarding="none")
    seconds, slow, fast = (deliver(fabric, demands[0], Adaptive()).seconds for fabric in planes)
    return Found(
        values={
            ("16 GPUs", "64 B to 16 GiB, planes over rails, %"): _largest(
                [_difference(planes[0], rails, demand) for demand in demands]
            ),
            ("16 GPUs", "64 B, time without kernels' start and NCCL's own, us"): 1e6 * Band(seconds, fast, slow),
            ("16 GPUs", "bus bandwidth at 16 GiB, GB/s"): _bus_bandwidth(planes, 16, ALL[-1]),
            ("16 GPUs, rails not forwarding", "64 B, planes over rails, %"): Band.exact(direct),
        },
        remarks=(
            "planes and rails give the same in the simulation, because both forward over NVLink and each rail's leaf "
            "has all nodes of the job: the target is met without a free choice, and the paper's own figure agrees. "
            "Rails that did not forward would need two switches more and no NVLink, and would be ahead for small "
            "messages. A CPU that posts 8 messages one after another is in both; NCCL's own time, which is not "
            "published, would make the difference smaller.",
        ),
    )


def _difference(planes: Fabric, rails: Fabric, demand: Demand, forwarding: Forwarding = "source") -> float:
    """Return by how many percent of bandwidth planes are ahead."""
    mine = deliver(planes, demand, Adaptive())
    other = deliver(rails, demand, Adaptive(), forwarding=forwarding)
    return 100 * (other.seconds / mine.seconds - 1)


def _bus_bandwidth(fabrics: tuple[Fabric, Fabric, Fabric], ranks: int, size: float) -> Band:
    demand = all_to_all(range(ranks), size)
    value, slow, fast = (deliver(fabric, demand, Adaptive()).bus_bandwidth / 1e9 for fabric in fabrics)
    return Band(value, slow, fast)


def _largest(differences: Sequence[float]) -> Band:
    """Return the difference furthest from 0, which has to meet the target, with the range of all."""
    return Band(max(differences, key=abs), min(differences), max(differences))


def spread_of(values: Sequence[float]) -> Band:
    """Return the mean, with the least and the most as its band."""
    return Band(min(max(sum(values) / len(values), min(values)), max(values)), min(values), max(values))


def _scattered(nodes: int) -> list[int]:
    """Return the GPUs of nodes that are as far apart as 2,048 GPUs allow."""
    first = np.arange(nodes) * (GPUS // 8 // nodes) * 8
    return [int(gpu) for gpu in (first[:, None] + np.arange(8)).ravel()]


def node_limited() -> Found:
    """Simulate a token from each GPU of a ninth node, and count the nodes of the gate's choices.

    No copy stays on the ninth node. The unit t is the time of one copy over InfiniBand.
    """
    wired = build(load_fabric("mpft", 8 * (NODES + 1)))
    fabric = replace(wired, latency=np.zeros_like(wired.latency))
    values: Values = {}
    for nodes in (8, 4, 3, 2, 1):
        subject = f"8 experts on {nodes} node{'s' * (nodes > 1)}"
        values[subject, "without forwarding, t"] = _copies_time(fabric, nodes, "low-latency")
        values[subject, "with forwarding, t"] = _copies_time(fabric, nodes, "normal")
    return Found(values=values | _gate_values())


def _copies_time(fabric: Fabric, nodes: int, mode: Mode) -> Band:
    ranks, tokens = fabric.endpoints, 64
    chosen = np.full((ranks, tokens, CHOICES), -1)
    # The experts are on different ranks, in turn on the first nodes; each token takes the next ranks of these.
    number, token = np.arange(CHOICES), np.arange(tokens)[:, None]
    chosen[-8:] = (number % nodes * 8 + (number // nodes + token) % 8) * PER_RANK
    experts = Experts(gpus=np.arange(ranks, dtype=np.int32), gpus_per_node=8, experts=ranks * PER_RANK, chosen=chosen)
    seconds = deliver(fabric, dispatch(experts, FP8_TOKEN, mode), Adaptive()).seconds
    one = tokens * FP8_TOKEN / float(fabric.capacity[fabric.nic_link[0].max()])
    return Band.exact(seconds / one)


def _gate_values() -> Values:
    values: Values = {}
    seconds = []
    fabric = build(load_fabric("mpft", 8 * NODES))
    for subject, groups, kept in (("8 of 256 experts", 1, 1), ("8 of 256 experts, on 4 of 8 nodes", NODES, 4)):
        chosen = sample_choices(8 * NODES, 512, CHOICES, EXPERTS, groups, kept)
        on_node = np.sort(chosen // (EXPERTS // NODES), axis=2)
        counted = 1 + (np.diff(on_node, axis=2) > 0).sum(axis=2)
        values[subject, "nodes, mean"] = Band.exact(distinct_bins(_exchange(groups, kept), NODES))
        values[subject, "nodes, mean of 32,768 drawn tokens"] = Band.exact(float(counted.mean()))
        gpus = np.arange(8 * NODES, dtype=np.int32)
        experts = Experts(gpus=gpus, gpus_per_node=8, experts=EXPERTS, chosen=chosen)
        seconds.append(deliver(fabric, dispatch(experts, FP8_TOKEN), Adaptive()).seconds)
    values["8 of 256 experts, on 4 of 8 nodes", "dispatch on 64 GPUs, time of that to any nodes, %"] = Band.exact(
        100 * seconds[1] / seconds[0]
    )
    return values


def _exchange(groups: int, kept: int) -> Exchange:
    return Exchange(
        name="dispatch",
        pass_="forward",
        tokens=1,
        bytes_per_copy=FP8_TOKEN,
        choices=CHOICES,
        experts=EXPERTS,
        groups=groups,
        kept_groups=kept,
        ranks=8 * NODES,
    )
