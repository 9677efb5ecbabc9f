"""Closed forms for the time of exchanges between ranks: the bytes of a link over its achieved rate.

Tokens go to experts and back in one of two ways (all numbers are per GPU and one way):

    normal       a vector crosses the network once per node that has an expert of its token, to the GPU of the same
                 index there, which passes it on inside the node, once per rank [V3 §3.2.2, DeepEP]
    low-latency  one message per expert goes directly to its rank [DeepEP]

If the GPU's file has measured exchanges of this kind over links of this cluster's bandwidth, their rate is taken. For a
number of ranks that was not measured it is interpolated, and beyond the measured numbers it is the nearest one's rate
in a wider band. If there are no such measurements, the time follows from the links' achieved bandwidths. The part of a
measured time that does not shrink with the bytes is the links' latency.

Sums and gathers run as rings, within nodes and then, each GPU with its part, across nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from dovetail.cost.ops.ops import Collective, Exchange
from dovetail.network.demands.distinct import distinct_bins
from dovetail.spec.band import Band, largest
from dovetail.spec.hardware import Cluster, Link
from dovetail.spec.measurements import ExchangePoint

Mode = Literal["normal", "low-latency"]
Bound = Literal["scale-up", "scale-out", "latency"]

MEASURED = 1.05  # band around a measured rate, as a ratio, for the spread of repeated runs; unverified
SAME_LINK = 0.02  # bandwidths that differ by less are the same, because datasheets round
EXTRAPOLATED = 1.25  # the band beyond the measured numbers of ranks; unverified


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One exchange: its seconds, what limits it, the formula with its numbers, and the measurements' source."""

    seconds: Band
    bound: Bound
    formula: str
    source: str
    is_measured: bool = False  # whether this number of ranks was measured


NOTHING = Transfer(seconds=Band.exact(0.0), bound="latency", formula="nothing to send", source="")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkBytes:
    """Bytes that one GPU sends over each of its links."""

    scale_up: float
    scale_out: float


def exchange_bytes(exchange: Exchange, gpus_per_node: int, mode: Mode = "normal") -> LinkBytes:
    """Return the bytes of one exchange per GPU, with copies shared, and sums on the way back, as the mode does."""
    ranks = exchange.ranks
    each = exchange.tokens * exchange.bytes_per_copy
    within = min(gpus_per_node, ranks)
    if mode == "low-latency":
        per_rank = each * exchange.choices / ranks
        return LinkBytes(scale_up=per_rank * (within - 1), scale_out=per_rank * (ranks - within))
    nodes = ranks / within
    # By symmetry one in `nodes` copies stays in its node, and one in `within` has arrived at its rank.
    return LinkBytes(
        scale_up=each * distinct_bins(exchange, ranks) * (within - 1) / within,
        scale_out=each * distinct_bins(exchange, math.ceil(nodes)) * (nodes - 1) / nodes if nodes > 1 else 0.0,
    )


@lru_cache(maxsize=1 << 14)
def exchange_time(exchange: Exchange, cluster: Cluster, mode: Mode = "normal") -> Transfer:
    """Return the time of one dispatch or combine among its `ranks`, all GPUs at once with equal loads.

    Raises ValueError if the cluster has fewer GPUs than the exchange has ranks.
    """
    if exchange.ranks > cluster.gpus:
        raise ValueError(f"experts over {exchange.ranks} ranks, but {cluster.name} has {cluster.gpus} GPUs")
    if exchange.ranks == 1 or exchange.tokens == 0:
        return NOTHING
    points = _comparable(exchange, cluster, mode)
    return _from_points(exchange, cluster, mode, points) if points else _from_links(exchange, cluster, mode)


def collective_bytes(collective: Collective, gpus_per_node: int) -> LinkBytes:
    """Return the bytes of a sum or gather per GPU, inside nodes first and then each GPU's part across them."""
    within, nodes = _within_and_nodes(collective, gpus_per_node)
    times = 2 if collective.name == "all_reduce" else 1
    return LinkBytes(
        scale_up=times * _ring_bytes(collective.bytes, within),
        scale_out=times * _ring_bytes(collective.bytes / within, nodes),
    )


def collective_time(collective: Collective, cluster: Cluster) -> Transfer:
    """Return the time in rings: (n - 1) / n of the bytes and n - 1 latencies for n ranks, or twice that for all-reduce.

    Ranks that share a node go first, so that each then takes its part across nodes. Raises ValueError if the ranks are
    on several nodes that no link joins.
    """
    ranks, bytes = collective.ranks, collective.bytes
    if ranks == 1 or bytes == 0:
        return NOTHING
    within, nodes = _within_and_nodes(collective, cluster.gpus_per_node)
    up, out = _ring(cluster.scale_up, bytes, within), Band.exact(0.0)
    if nodes > 1:
        out = _ring(_scale_out(cluster), bytes / within, nodes)
    name, times = collective.name, 2 if collective.name == "all_reduce" else 1
    return Transfer(
        seconds=times * (up + out),
        bound="scale-out" if out.value > up.value else "scale-up",
        formula=f"{name}, {bytes:.4g} B, {within} x {nodes} ranks: {times} x ({up.value:.3g} + {out.value:.3g}) s",
        source=_link_source(cluster, nodes > 1),
    )


def send_time(bytes: float, cluster: Cluster, is_within_node: bool = False) -> Transfer:
    """Return the time from one GPU to another, as between the stages of a pipeline."""
    link = cluster.scale_up if is_within_node or cluster.scale_out is None else cluster.scale_out
    bound: Bound = "scale-up" if link is cluster.scale_up else "scale-out"
    return Transfer(
        seconds=bytes / link.bandwidth + link.latency if bytes else Band.exact(0.0),
        bound=bound,
        formula=f"{bytes:.4g} B / {link.achieved_gbs.value:g} GB/s + {link.latency_us.value:g} us",
        source=link.achieved_gbs.source,
    )


def _comparable(exchange: Exchange, cluster: Cluster, mode: Mode) -> list[ExchangePoint]:
    """Return the measured exchanges over a link of the same kind and bandwidth as this cluster's, by ranks."""
    over = "scale-up" if exchange.ranks <= cluster.gpus_per_node else "scale-out"
    link = cluster.scale_up if over == "scale-up" else _scale_out(cluster)
    points = [
        point
        for point in cluster.gpu.efficiency.exchanges
        if (point.kind, point.mode, point.over) == (exchange.name, mode, over)
        and math.isclose(point.link_gbs, link.gbs, rel_tol=SAME_LINK)
    ]
    return sorted(points, key=lambda point: point.ranks)


def _from_points(exchange: Exchange, cluster: Cluster, mode: Mode, points: list[ExchangePoint]) -> Transfer:
    is_out = exchange.ranks > cluster.gpus_per_node
    link = _scale_out(cluster) if is_out else cluster.scale_up
    if mode == "low-latency":
        copies = float(exchange.choices)
    else:
        copies = distinct_bins(exchange, -(-exchange.ranks // cluster.gpus_per_node) if is_out else exchange.ranks)
    sent = exchange.tokens * copies * exchange.bytes_per_copy
    rate, near, is_measured = _rate(exchange.ranks, points, copies)
    # The line through the measured time is latency + bytes x slope.
    measured_bytes = near.tokens * copies * near.bytes_per_token
    latency = min(link.latency.value, 0.5 * measured_bytes / rate.value)
    slope = (measured_bytes / rate - latency) / measured_bytes
    what = "" if is_measured else f", from {', '.join(str(point.ranks) for point in points)} ranks"
    return Transfer(
        seconds=latency + sent * slope,
        bound="latency" if latency > sent * slope.value else "scale-out" if is_out else "scale-up",
        formula=f"{exchange.tokens:g} tokens x {copies:.3g} copies x {exchange.bytes_per_copy:g} B at "
        f"{rate.value / 1e9:.4g} GB/s ({exchange.ranks} ranks{what}), {latency * 1e6:.3g} us of it latency",
        source=near.source,
        is_measured=is_measured,
    )


def _rate(ranks: int, points: list[ExchangePoint], copies: float) -> tuple[Band, ExchangePoint, bool]:
    """Return the bytes/s at `ranks`, as the source counts bytes, the nearest point, and whether it is for `ranks`."""
    near = min(points, key=lambda point: abs(math.log(point.ranks / ranks)))
    if near.ranks == ranks:
        return _point_rate(near, copies).widened(MEASURED), near, True
    below = [point for point in points if point.ranks < ranks]
    above = [point for point in points if point.ranks > ranks]
    if not below or not above:
        return _point_rate(near, copies).widened(EXTRAPOLATED), near, False
    low, high = _point_rate(below[-1], copies), _point_rate(above[0], copies)
    place = math.log(ranks / below[-1].ranks) / math.log(above[0].ranks / below[-1].ranks)
    value = low.value + place * (high.value - low.value)
    least, most = min(low.value, high.value), max(low.value, high.value)
    return Band(value, least / MEASURED, most * MEASURED), near, False


def _point_rate(point: ExchangePoint, copies: float) -> Band:
    if point.microseconds is None:
        return Band.exact(point.gbs * 1e9)
    return Band.exact(point.tokens * (point.copies or copies) * point.bytes_per_token / point.microseconds * 1e6)


def _from_links(exchange: Exchange, cluster: Cluster, mode: Mode) -> Transfer:
    """Return the time if both links carry their part at the same time."""
    carried = exchange_bytes(exchange, cluster.gpus_per_node, mode)
    up = carried.scale_up / cluster.scale_up.bandwidth
    formula = f"{carried.scale_up:.4g} B / {cluster.scale_up.achieved_gbs.value:g} GB/s within the node"
    latency, seconds = cluster.scale_up.latency, up
    if carried.scale_out:
        link = _scale_out(cluster)
        out = carried.scale_out / link.bandwidth
        latency = link.latency + latency if mode == "normal" else link.latency
        seconds = largest(up, out)
        formula = f"the longer of {carried.scale_out:.4g} B / {link.achieved_gbs.value:g} GB/s and {formula}"
    wire: Bound = "scale-up" if seconds.value == up.value else "scale-out"
    return Transfer(
        # The links' bands are those of long streams; how near this cluster's kernels come to them is not known.
        seconds=seconds.widened(EXTRAPOLATED) + latency,
        bound="latency" if latency.value > seconds.value else wire,
        formula=f"{formula}, + {latency.value * 1e6:.3g} us",
        source=_link_source(cluster, carried.scale_out > 0),
    )


def _ring(link: Link, bytes: float, ranks: int) -> Band:
    if ranks == 1:
        return Band.exact(0.0)
    return _ring_bytes(bytes, ranks) / link.bandwidth + (ranks - 1) * link.latency


def _ring_bytes(bytes: float, ranks: int) -> float:
    return bytes * (ranks - 1) / ranks


def _within_and_nodes(collective: Collective, gpus_per_node: int) -> tuple[int, int]:
    """Return the ranks that share a node, and the nodes."""
    within = min(collective.ranks, max(1, gpus_per_node // collective.stride))
    return within, -(-collective.ranks // within)


def _scale_out(cluster: Cluster) -> Link:
    if cluster.scale_out is None:
        raise ValueError(f"{cluster.name} has no [scale_out] link for an exchange between nodes: add it to its file")
    return cluster.scale_out


def _link_source(cluster: Cluster, is_out: bool) -> str:
    return _scale_out(cluster).achieved_gbs.source if is_out else cluster.scale_up.achieved_gbs.source
