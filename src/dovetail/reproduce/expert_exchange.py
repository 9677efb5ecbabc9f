"""DeepEP's published exchanges, predicted from the links' speeds alone.

They are dispatch and combine of 4,096 tokens per GPU [ISCA Fig. 7], and the low-latency kernels with 128 [DeepEP].
Nothing is fitted. Tokens are drawn as in DeepEP's benchmarks (independent scores; with the normal kernels at most the 4
nodes with the best single scores). Copies go once per node over a NIC of 40 GB/s and from there over NVLink at 160
GB/s, or directly to each expert's rank. The exchange is over when the slowest GPU has everything. For the normal
kernels DeepEP prints

    tokens x distinct nodes of their experts x bytes / time,

which includes copies for the sender's own node and so can be more than a NIC's 50 GB/s; for the low-latency kernels it
prints times. Bands are from links at their slow and their fast ends. The fast end of the NIC's band is itself from
DeepEP's figures; its value, 40 GB/s, is not.

Left out: multiprocessors, kernels' start, casts and headers, copies within a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dovetail.catalog.fabrics import load_fabric
from dovetail.cost.ops.ops import Exchange
from dovetail.network.delivery.deliver import deliver
from dovetail.network.demands.closed_forms import exchange_bytes
from dovetail.network.demands.distinct import distinct_bins
from dovetail.network.demands.experts import Experts, combine, counted_copies, dispatch, sample_choices
from dovetail.network.fabric.topology import Fabric
from dovetail.network.routing.route import Adaptive
from dovetail.reproduce.network import Values, with_ends
from dovetail.reproduce.rows import Found
from dovetail.spec.band import Band

CHOICES, EXPERTS, KEPT_NODES = 8, 256, 4  # [DeepEP]
TOKENS = 4096  # per GPU [ISCA Fig. 7]
FEW_TOKENS, FEW_RANKS = 128, (8, 32, 128)  # [DeepEP]
BYTES = {"dispatch": 7168 + 56 * 4.0, "combine": 2 * 7168.0}  # of a copy, as DeepEP counts: FP8 and scales; BF16
FEW_BYTES = {"dispatch": 7168 + 56 * 4 + 16.0, "combine": 2 * 7168.0}
DEMANDS = {"dispatch": dispatch, "combine": combine}
ONE_NODE = {"dispatch": 153e9, "combine": 158e9}  # bytes/s of NVLink on 8 GPUs, with copies to oneself [DeepEP]
MEMORY = 3.35e12  # bytes/s of an H800 [datasheet]
WINDOW = 0.0005  # freed bandwidth may stay unused for this share of the exchange, which makes simulation quicker


def bandwidths() -> Found:
    """Predict the GB/s, as DeepEP counts them, for 16 to 128 GPUs."""
    fabrics = with_ends(load_fabric("mpft", 2048))
    values: Values = {}
    remarks: list[str] = []
    for ranks in (16, 32, 64, 128):
        values |= bandwidths_of(fabrics, ranks)
        remarks += _sensitivities(fabrics[0], ranks)
    return Found(values=values, remarks=tuple(remarks))


def bandwidths_of(fabrics: tuple[Fabric, Fabric, Fabric], ranks: int) -> Values:
    """Predict the GB/s for `ranks` GPUs, on the fabric and at its slow and fast ends."""
    fabric, slow, fast = fabrics
    nodes = ranks // fabric.gpus_per_node
    chosen = sample_choices(ranks, TOKENS, CHOICES, EXPERTS, nodes, min(KEPT_NODES, nodes), best_of_group=1)
    experts = _experts(ranks, chosen)
    copies = counted_copies(experts)
    values: Values = {(f"{ranks} GPUs", "nodes of a token, mean"): Band.exact(copies / TOKENS)}
    for name, each in BYTES.items():
        exchange = _exchange(ranks, each)
        least = mean_seconds(fabric, exchange)
        seconds = deliver(fabric, DEMANDS[name](experts, each), Adaptive(), window=WINDOW * least).seconds
        reached = copies * each / seconds / 1e9
        # One link limits the exchange, so the ends of the band follow from that link.
        ends = (reached * least / mean_seconds(end, exchange) for end in (slow, fast))
        values[f"{ranks} GPUs", f"{name}, GB/s"] = Band(reached, *ends)
    return values


def times() -> Found:
    """Predict the microseconds of the low-latency kernels."""
    fabric, slow, fast = with_ends(load_fabric("mpft", 2048))
    values: Values = {}
    for ranks in FEW_RANKS:
        experts = _experts(ranks, sample_choices(ranks, FEW_TOKENS, CHOICES, EXPERTS))
        for name, each in FEW_BYTES.items():
            demand = DEMANDS[name](experts, each, "low-latency")
            window = WINDOW * FEW_TOKENS * CHOICES * each / fabric.spec.nic.bandwidth.high
            value, most, least = (
                deliver(end, demand, Adaptive(), window=window).seconds for end in (fabric, slow, fast)
            )
            values[f"{ranks} GPUs", f"{name}, us"] = 1e6 * Band(value, least, most)
    return Found(values=values, remarks=tuple(_few_sensitivities(fabric, values)))


def _experts(ranks: int, chosen: NDArray[np.int32]) -> Experts:
    return Experts(gpus=np.arange(ranks, dtype=np.int32), gpus_per_node=8, experts=EXPERTS, chosen=chosen)


def _exchange(ranks: int, bytes_per_copy: float) -> Exchange:
    nodes = ranks // 8
    return Exchange(
        name="dispatch",
        pass_="forward",
        tokens=TOKENS,
        bytes_per_copy=bytes_per_copy,
        choices=CHOICES,
        experts=EXPERTS,
        groups=nodes,
        kept_groups=min(KEPT_NODES, nodes),
        ranks=ranks,
    )


def mean_seconds(fabric: Fabric, exchange: Exchange, own_copies: bool = False) -> float:
    """Return the seconds if all GPUs send and get the same.

    With `own_copies`, copies that stay on a GPU count as if they went over NVLink too.
    """
    carried = exchange_bytes(exchange, fabric.gpus_per_node)
    inside = carried.scale_up * (fabric.gpus_per_node / (fabric.gpus_per_node - 1) if own_copies else 1.0)
    rates = fabric.capacity[[fabric.nic_link[0].max(), fabric.nvlink_link[0]]]
    return float(max(carried.scale_out / rates[0], inside / rates[1]))


def _sensitivities(fabric: Fabric, ranks: int) -> Iterator[str]:
    """Yield what was looked at after the figure had been missed."""
    link = float(fabric.capacity[fabric.nvlink_link[0]])
    for name, each in BYTES.items():
        exchange = _exchange(ranks, each)
        counted = TOKENS * distinct_bins(exchange, ranks // 8) * each / 1e9
        even, own = (counted / mean_seconds(fabric, exchange, own_copies=is_own) for is_own in (False, True))
        text = f"sensitivity, not the prediction: {ranks} GPUs, {name}: {even:.1f} GB/s if all GPUs got the same"
        if own < even:
            reached = ONE_NODE[name]
            yield (
                f"{text}; {own:.1f} if copies that stay on their GPU took NVLink too, as DeepEP counts it, and "
                f"{own * reached / link:.1f} if NVLink carried the {reached / 1e9:.0f} GB/s that it counts on one node"
            )
        elif name == "dispatch":  # combine gives the same
            yield text


def _few_sensitivities(fabric: Fabric, values: Values) -> Iterator[str]:
    """Yield the same for a single node, where no NIC hides what the kernels do."""
    link, latency = float(fabric.capacity[fabric.nvlink_link[0]]), 2 * float(fabric.latency[fabric.nvlink_link[0]])
    copies = FEW_TOKENS * CHOICES
    moved = {"dispatch": 2 * copies, "combine": copies + FEW_TOKENS}  # read and written after everything has arrived
    for name, each in FEW_BYTES.items():
        reached = ONE_NODE[name] * 7 / 8
        seconds = values["8 GPUs", f"{name}, us"].value * 1e-6
        slower = latency + (seconds - latency) * link / reached
        copied = slower + moved[name] * each / MEMORY
        yield (
            f"sensitivity, not the prediction: 8 GPUs, {name}: {1e6 * slower:.0f} us if NVLink carried the "
            f"{reached / 1e9:.0f} GB/s that the normal kernels get out of it, {1e6 * copied:.0f} with the pass through "
            f"memory that follows when all has arrived"
        )
