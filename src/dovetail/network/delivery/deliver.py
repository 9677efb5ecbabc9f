"""Simulates a demand on a fabric: its flows step by step, and the cost of messages beside their bytes.

A flow has arrived when its last byte has, after the latency of its path (that of both NICs, and a hop for each cable
between switches). Messages to other nodes are posted to a NIC one after another, `gap` seconds apart
(`spec.fabric.Posting`), while bytes are on the links. Small messages are limited by that and by latency, as in the
LogGP model, where the latency of the first message includes its own posting:

    step = max(last flow's end, latency, latency to other nodes + (messages - 1) x gap) + (hops - 1) x latency

The messages are those of the GPU that sends the most. Bytes that first go over NVLink to another GPU count as messages
of their sender, though the other GPU posts them; if all GPUs send alike, the number is the same. Left out: the pieces
of a large message (its bytes take the link longer than posting them), the receiver's side, the start of kernels,
copies from and to hosts and storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dovetail.network.demands.collectives import Demand, Step
from dovetail.network.fabric.topology import Fabric
from dovetail.network.flows.flows import Bools, Floats, Flows, Routes
from dovetail.network.flows.simulation import Change, Outcome, simulate
from dovetail.network.routing.ports import Forwarding
from dovetail.network.routing.route import Policy, route
from dovetail.spec.fabric import Poster


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Delivery:
    """The outcome of a demand."""

    demand: Demand
    seconds: float
    latency_seconds: float  # the time of empty messages
    link_bytes: Floats  # [links]
    cut_off: Flows  # flows of its last step that never finish; usually none
    outcomes: tuple[Outcome, ...]  # one per step; more where changes make repetitions of a step differ

    @property
    def is_complete(self) -> bool:
        return not len(self.cut_off)

    @property
    def algorithm_bandwidth(self) -> float:
        """The bytes/s as nccl-tests counts them; 0 for a demand that is not delivered."""
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
    window: float = 0.0,
    reroute_seconds: float = 0.0,
) -> Delivery:
    """Simulate `demand` from time 0 on, with `changes` of links.

    Steps that begin after a change are routed around it from their start. The demand ends with the first step that has
    flows cut off. Raises ValueError as `route` and `simulate` do.
    """
    run = _Run(fabric, policy, changes, forwarding, window, reroute_seconds)
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


def is_posted(fabric: Fabric, flows: Flows) -> Bools:
    """Return which flows are posted to a NIC: those between nodes, and without NVLink all between GPUs."""
    each = fabric.gpus_per_node if fabric.spec.nvlink is not None else 1
    leaves_node: Bools = flows.source // each != flows.destination // each
    return leaves_node & (flows.source < fabric.endpoints) & (flows.destination < fabric.endpoints)


def most_messages(fabric: Fabric, step: Step) -> float:
    """Return the most messages that a single GPU posts in a step."""
    posted = is_posted(fabric, step.flows)
    counts = np.broadcast_to(np.asarray(step.messages, np.float64), len(step.flows))[posted]
    return float(np.bincount(step.flows.source[posted], counts).max(initial=0.0))


def most_messages_to_all(fabric: Fabric, gpus: int) -> int:
    """Return the same for an all-to-all among the first `gpus`.

    GPUs of the last node, where the fewest take part, have the most others to write to; without NVLink all have as
    many.
    """
    return gpus - ((gpus - 1) % fabric.gpus_per_node + 1 if fabric.spec.nvlink is not None else 1)


def empty_seconds(
    fabric: Fabric, flows: Flows, latency: Floats, messages: float, posted_by: Poster = "host"
) -> tuple[float, float]:
    """Return the seconds that empty flows take, whose paths have `latency` [flows].

    The first figure is the longest path's, the second includes the posting of `messages` in a row by one GPU.
    """
    longest = float(latency.max(initial=0.0))
    outside = float(latency[is_posted(fabric, flows)].max(initial=0.0))
    return longest, max(longest, outside + fabric.spec.posting_seconds(messages, posted_by))


class _Run:
    def __init__(
        self,
        fabric: Fabric,
        policy: Policy,
        changes: Sequence[Change],
        forwarding: Forwarding,
        window: float,
        reroute_seconds: float,
    ) -> None:
        self.fabric, self.policy, self.changes, self.forwarding = fabric, policy, changes, forwarding
        self.window, self.reroute_seconds = window, reroute_seconds
        self.seconds = self.latency = 0.0
        self.carried = np.zeros(fabric.links)
        self.outcomes: list[Outcome] = []
        self.cut_off = Flows.of([], [], 0.0)

    def add(self, step: Step) -> None:
        """Simulate all repetitions of a step. Those that no change interrupts are alike, and are simulated once."""
        left, messages = step.times, most_messages(self.fabric, step)
        while left:
            up = self._up()
            ahead = [change for change in self.changes if change.seconds > self.seconds]
            routes = self._route(step, up)
            quiet = self._simulate(step, routes, up, [])
            seconds, _ = self._time(step, messages, routes, quiet)
            undisturbed = left
            if ahead:
                room = min(change.seconds for change in ahead) - self.seconds
                undisturbed = min(left, int(room / seconds)) if seconds > 0 else 0
            if undisturbed and not quiet.is_cut_off.any():
                self._count(step, messages, routes, quiet, undisturbed)
                left -= undisturbed
                continue
            disturbed = self._simulate(step, routes, up, ahead) if ahead else quiet
            self._count(step, messages, routes, disturbed, 1)
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

    def _time(self, step: Step, messages: float, routes: Routes, outcome: Outcome) -> tuple[float, float]:
        """Return the seconds of one repetition, and of one with empty messages."""
        path, fixed = empty_seconds(self.fabric, step.flows, routes.latency, messages, step.posted_by)
        waiting = (step.hops - 1) * path
        return max(outcome.seconds, fixed) + waiting, fixed + waiting

    def _count(self, step: Step, messages: float, routes: Routes, outcome: Outcome, times: int) -> None:
        seconds, fixed = self._time(step, messages, routes, outcome)
        self.seconds += times * seconds
        self.latency += times * fixed
        self.carried += times * outcome.link_bytes
        self.outcomes.append(outcome)
        self.cut_off = step.flows.take(outcome.cut_off)
