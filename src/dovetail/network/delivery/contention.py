"""Two demands at once on the same links: each alone, both in one class, and one strictly before the other.

A class gets what the classes before it leave (`network.flows.flows`). In one class each flow has as much as any other;
only a copy from the host is cut into as many flows as meet it on its GPU's lanes, for there it is the NIC and the host
that take turns, however many flows the NIC has. Steps of rings follow one another as a stream here, so that both
demands keep sending all the time; what waiting between steps adds to a demand alone is added to each time. Messages are
posted while the wires do their part (`network.delivery.deliver`), so no time is less than that of empty ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dovetail.network.delivery.deliver import Delivery, deliver
from dovetail.network.demands.collectives import Demand
from dovetail.network.fabric.topology import Fabric
from dovetail.network.flows.flows import Flows, joined
from dovetail.network.flows.simulation import simulate
from dovetail.network.routing.route import Policy, route

WINDOW = 0.0005  # of the least time that links allow: how long what an ended flow leaves may lie idle, for speed
SHORT = 0.01  # of the shorter demand's time, which that must not exceed


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds of one of two demands."""

    alone: float
    shared: float  # both in one class
    first: float  # where the collective asked for is in the class before the other
    last: float  # where it is in the class after


@dataclass(frozen=True, slots=True, kw_only=True)
class Contention:
    """A collective and what runs beside it."""

    beside: str
    amount: float  # bytes; tokens per GPU of dispatch and combine
    times: Times  # of the collective
    beside_times: Times


def contend(fabric: Fabric, policy: Policy, demand: Demand, other: Demand, amount: float) -> Contention:
    """Both from time 0 on. Raises ValueError for what `route` raises it."""
    both = demand, other
    streams = [_stream(each) for each in both]
    if (streams[1].source >= fabric.endpoints).any():
        streams[1] = _as_turns(fabric, policy, *streams)
    everything, count = joined(streams), len(streams[0])
    routes = route(fabric, everything, policy)
    windows = [window_of(fabric, policy, each) for each in both]
    alone = [deliver(fabric, each, policy, window=one) for each, one in zip(both, windows, strict=True)]
    window = min(max(windows), SHORT * min(each.seconds for each in alone))
    waiting = [_waiting(fabric, policy, each) for each in alone]

    def together(first: int, second: int) -> list[float]:
        classes = np.where(np.arange(len(everything)) < count, first, second).astype(np.int8)
        end = simulate(fabric.capacity, replace(everything, priority=classes), routes, window=window).end
        last = [float(part.max(initial=0.0)) for part in (end[:count], end[count:])]
        return [max(last[index] + waiting[index], alone[index].latency_seconds) for index in (0, 1)]

    found = [together(0, 0), together(0, 1), together(1, 0)]
    mine, others = (
        Times(alone=alone[index].seconds, shared=found[0][index], first=found[1][index], last=found[2][index])
        for index in (0, 1)
    )
    return Contention(beside=other.name, amount=amount, times=mine, beside_times=others)


def window_of(fabric: Fabric, policy: Policy, demand: Demand) -> float:
    """Seconds that `deliver` may wait before it finds rates anew: 0 where all flows have the same bytes, for these end
    in few groups."""
    longest = 0.0
    for step in demand.steps:
        sizes = step.flows.bytes
        if len(sizes) and sizes.min() < sizes.max():
            carried = route(fabric, step.flows, policy).carried(sizes)
            longest = max(longest, float((carried / fabric.capacity).max()))
    return WINDOW * longest


def _stream(demand: Demand) -> Flows:
    return joined([replace(step.flows, bytes=step.flows.bytes * step.times) for step in demand.steps])


def _as_turns(fabric: Fabric, policy: Policy, flows: Flows, copies: Flows) -> Flows:
    """`copies` from hosts, each in as many equal parts as there are `flows` on the lanes that it takes."""
    lanes = fabric.pcie_link[copies.destination] ^ 1
    meeting = route(fabric, flows, policy).carried(np.ones(len(flows)))[lanes]
    parts = np.maximum(np.rint(meeting), 1).astype(np.int64)
    cut = copies.take(np.repeat(np.arange(len(copies)), parts))
    return replace(cut, bytes=cut.bytes / np.repeat(parts, parts))


def _waiting(fabric: Fabric, policy: Policy, alone: Delivery) -> float:
    """What waiting for one another adds to the stream of a demand."""
    demand = alone.demand
    if all(step.times == step.hops == 1 for step in demand.steps):
        return 0.0
    flows = _stream(demand)
    return alone.seconds - simulate(fabric.capacity, flows, route(fabric, flows, policy)).seconds
