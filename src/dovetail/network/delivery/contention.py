"""Two demands at the same time on the same links, sharing them or one with priority.

Each is simulated alone, both in one traffic class, and each in a class before the other. A class gets what the classes
before it leave (`network.flows.flows`). In one class each flow gets as much as any other. Only a copy from the host is
divided into as many flows as it meets on its GPU's lanes, because there the NIC and the host take turns, however many
flows the NIC has. The steps of rings follow each other as a stream here, so that both demands send all the time; the
time that a demand alone waits between its steps is added to each result. Messages are posted while bytes are on the
links (`network.delivery.deliver`), so no time is shorter than that of empty messages.
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

# For speed, the bandwidth of flows that have ended may stay unused for WINDOW of the least time that links allow, but
# for at most SHORT of the shorter demand's time.
WINDOW = 0.0005
SHORT = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds of one of two demands."""

    alone: float
    shared: float  # both in one class
    first: float  # the collective asked for is in the class before the other
    last: float  # it is in the class after the other


@dataclass(frozen=True, slots=True, kw_only=True)
class Contention:
    """The times of a collective and of what runs beside it."""

    beside: str
    amount: float  # bytes, or tokens per GPU for dispatch and combine
    times: Times  # of the collective
    beside_times: Times


def contend(fabric: Fabric, policy: Policy, demand: Demand, other: Demand, amount: float) -> Contention:
    """Simulate both demands from time 0 on. Raises ValueError as `route` does."""
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
    """Return the seconds for which `deliver` may keep rates after flows have ended.

    They are 0 if all flows have the same bytes, because these end in few groups.
    """
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
    """Divide each of `copies` from hosts into as many equal parts as there are `flows` on its lanes."""
    lanes = fabric.pcie_link[copies.destination] ^ 1
    meeting = route(fabric, flows, policy).carried(np.ones(len(flows)))[lanes]
    parts = np.maximum(np.rint(meeting), 1).astype(np.int64)
    cut = copies.take(np.repeat(np.arange(len(copies)), parts))
    return replace(cut, bytes=cut.bytes / np.repeat(parts, parts))


def _waiting(fabric: Fabric, policy: Policy, alone: Delivery) -> float:
    """Return the seconds that waiting between its steps adds to the stream of a demand."""
    demand = alone.demand
    if all(step.times == step.hops == 1 for step in demand.steps):
        return 0.0
    flows = _stream(demand)
    return alone.seconds - simulate(fabric.capacity, flows, route(fabric, flows, policy)).seconds
