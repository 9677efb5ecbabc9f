"""How long a demand takes on a fabric: its flows simulated step by step, and what a message costs beside its bytes.

A flow is there when its last byte is, after the latency of its path (links' latencies: an end at each NIC, and a hop
for each cable between switches). A rank that sends many messages in one step also needs `gap` seconds for each of
them, while the wires do their part; small ones are bound by that and by latency:

    step = max(last flow's end, latency + messages x gap) + (hops - 1) x latency
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dovetail.network.demands import Demand, Step
from dovetail.network.flows import Bools, Floats, Flows, Routes
from dovetail.network.ports import Forwarding
from dovetail.network.routing import Policy, route
from dovetail.network.simulation import Change, Outcome, simulate
from dovetail.network.topology import Fabric


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Delivery:
    """A demand, delivered but for flows cut off."""

    demand: Demand
    seconds: float
    latency_seconds: float  # of `seconds`, what would be left of an empty message
    link_bytes: Floats  # [links]
    cut_off: Flows  # of the step that it ended with, those that never finish; usually none
    outcomes: tuple[Outcome, ...]  # of each step; more where changes make repetitions differ

    @property
    def is_complete(self) -> bool:
        return not len(self.cut_off)

    @property
    def algorithm_bandwidth(self) -> float:
        """Bytes/s, as nccl-tests has it; 0 for a demand that is not delivered."""
        return self.demand.size / self.seconds if self.is_complete and self.seconds else 0.0

    @property
    def bus_bandwidth(self) -> float:
        return self.algorithm_bandwidth * self.demand.bus_factor


def deliver(
    fabric: Fabric,
    demand: Demand,
    policy: Policy,
    *,
    changes: Sequence[Change] = (),
    forwarding: Forwarding = "source",
    gap: float = 0.0,
    window: float = 0.0,
    reroute_seconds: float = 0.0,
) -> Delivery:
    """Simulate `demand` from time 0 on, with `changes` of links. Steps that begin after a change are routed around it
    from their start. It ends at the first step of which flows are cut off.

    Raises ValueError for a negative gap and for what `route` and `simulate` raise it.
    """
    if gap < 0:
        raise ValueError(f"gap = {gap} seconds per message: must not be negative")
    run = _Run(fabric, policy, changes, forwarding, gap, window, reroute_seconds)
    for step in demand.steps:
        run.add(step)
        if len(run.cut_off):
            break
    return Delivery(
        demand=demand,
        seconds=run.seconds,
        latency_seconds=run.latency,
        link_bytes=run.carried,
        cut_off=run.cut_off,
        outcomes=tuple(run.outcomes),
    )


class _Run:
    def __init__(
        self,
        fabric: Fabric,
        policy: Policy,
        changes: Sequence[Change],
        forwarding: Forwarding,
        gap: float,
        window: float,
        reroute_seconds: float,
    ) -> None:
        self.fabric, self.policy, self.changes, self.forwarding = fabric, policy, changes, forwarding
        self.gap, self.window, self.reroute_seconds = gap, window, reroute_seconds
        self.seconds = self.latency = 0.0
        self.carried = np.zeros(fabric.links)
        self.outcomes: list[Outcome] = []
        self.cut_off = Flows.of([], [], 0.0)

    def add(self, step: Step) -> None:
        """All repetitions: those that no change interrupts are alike, and simulated once."""
        left = step.times
        while left:
            up = self._up()
            ahead = [change for change in self.changes if change.seconds > self.seconds]
            routes = self._route(step, up)
            quiet = self._simulate(step, routes, up, [])
            seconds, _ = self._time(step, routes, quiet)
            undisturbed = left
            if ahead:
                room = min(change.seconds for change in ahead) - self.seconds
                undisturbed = min(left, int(room / seconds)) if seconds > 0 else 0
            if undisturbed and not quiet.is_cut_off.any():
                self._count(step, routes, quiet, undisturbed)
                left -= undisturbed
                continue
            disturbed = self._simulate(step, routes, up, ahead) if ahead else quiet
            self._count(step, routes, disturbed, 1)
            if len(self.cut_off):
                return
            left -= 1

    def _up(self) -> Bools:
        up = np.ones(self.fabric.links, bool)
        for change in sorted(self.changes, key=lambda change: change.seconds):
            if change.seconds <= self.seconds:
                up[change.links] = change.is_up
        return up

    def _route(self, step: Step, up: Bools) -> Routes:
        return route(self.fabric, step.flows, self.policy, up, self.forwarding)

    def _simulate(self, step: Step, routes: Routes, up: Bools, ahead: list[Change]) -> Outcome:
        later = [replace(change, seconds=change.seconds - self.seconds) for change in ahead]
        return simulate(
            self.fabric.capacity,
            step.flows,
            (lambda now: self._route(step, now)) if ahead else routes,
            later,
            up=up,
            reroute_seconds=self.reroute_seconds,
            window=self.window,
        )

    def _time(self, step: Step, routes: Routes, outcome: Outcome) -> tuple[float, float]:
        """Seconds of one repetition, and of one with empty messages."""
        path = float(routes.latency.max(initial=0.0))
        fixed = path + step.messages * self.gap
        waiting = (step.hops - 1) * path
        return max(outcome.seconds, fixed) + waiting, fixed + waiting

    def _count(self, step: Step, routes: Routes, outcome: Outcome, times: int) -> None:
        seconds, fixed = self._time(step, routes, outcome)
        self.seconds += times * seconds
        self.latency += times * fixed
        self.carried += times * outcome.link_bytes
        self.outcomes.append(outcome)
        self.cut_off = step.flows.take(outcome.cut_off)
