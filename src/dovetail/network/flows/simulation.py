"""Simulates flows over time, with links that fail and come back, to find when each ends.

Rates are max-min fair (`network.flows.flows`). They change when a flow starts or ends and when links change. The end of
a flow changes few other rates, which makes millions of flows quick to simulate:

    when flows of rate r or more end, flows slower than r keep their rates: each has a full link on which no flow is
    faster than itself, so no ended flow was on it.

Of flows of equal size that start together the fastest end first, so their rates never change. If there are several
classes, those after the one in which flows ended get new rates.

A flow whose path is lost stands still until it is routed anew or its links are back. A flow that never ends is reported
as cut off, with the bytes that did arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dovetail.network.flows.flows import NOTHING_LEFT, Bools, Floats, Flows, Ints, Longs, Routes, Sharing

SAME_TIME = 1e-11  # ends that differ by less than this share are one event, because of rounding

Route = Callable[[Bools], Routes]  # makes routes from which links are up


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Change:
    """Links that go down or come back, and the time in seconds."""

    seconds: float
    links: Ints
    is_up: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.seconds < np.inf:
            raise ValueError(f"links change at {self.seconds} s: must be a time from 0 on")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """The result for each flow and each link."""

    end: Floats  # [flows] seconds when the last byte arrived; for a flow cut off, when it last moved or was to start
    is_cut_off: Bools  # [flows] whether it never finished
    delivered: Floats  # [flows] bytes
    link_bytes: Floats  # [links] bytes carried
    shared: int  # how often rates were computed

    @property
    def seconds(self) -> float:
        """The seconds until all flows that finish have finished."""
        finished = self.end[~self.is_cut_off]
        return float(finished.max()) if len(finished) else 0.0

    @property
    def cut_off(self) -> Longs:
        """The flows that never finished."""
        return np.flatnonzero(self.is_cut_off)


def simulate(
    capacity: Floats,
    flows: Flows,
    route: Routes | Route,
    changes: Sequence[Change] = (),
    *,
    up: Bools | None = None,
    reroute_seconds: float = 0.0,
    window: float = 0.0,
) -> Outcome:
    """Simulate `flows` to their ends.

    `route` is a function that makes routes for the links that are up, and is called again `reroute_seconds` after a
    change; or it is fixed routes, and flows on links that are down wait. `up` are the links that are up at the start
    (None: all). Of several changes of a link at one time the last counts.

    With `window` above 0, rates are computed at most once in that many seconds. Flows that end in between do so at
    their own time, but their bandwidth stays unused until then, so times may be too long, but never too short.

    Raises ValueError if the numbers of flows and routes differ, and for a change of links that do not exist.
    """
    return _Run(capacity, flows, route, changes, up, reroute_seconds, window).outcome()


class _Run:
    def __init__(
        self,
        capacity: Floats,
        flows: Flows,
        route: Routes | Route,
        changes: Sequence[Change],
        up: Bools | None,
        reroute_seconds: float,
        window: float,
    ) -> None:
        if reroute_seconds < 0 or window < 0:
            raise ValueError(f"reroute_seconds = {reroute_seconds}, window = {window}: must not be negative")
        for change in changes:
            if len(change.links) and not 0 <= change.links.min() <= change.links.max() < len(capacity):
                raise ValueError(f"a change of link {change.links.max()}: there are {len(capacity)}, from 0")
        self.capacity, self.flows, self.route, self.changes = capacity, flows, route, changes
        self.reroute_seconds, self.window = reroute_seconds, window
        count = len(flows)
        self.rates = np.zeros(count)
        self.left = flows.bytes.astype(np.float64)
        self.since = flows.start.astype(np.float64)  # the time that `left` is for
        self.finish = np.full(count, np.inf)  # expected at the present rates
        self.end = flows.start.astype(np.float64)
        self.is_done = np.zeros(count, bool)
        self.up = np.ones(len(capacity), bool) if up is None else up.copy()
        self.live = np.where(self.up, capacity, 0.0)
        self.link_bytes = np.zeros(len(capacity))
        self.booked = self.left.copy()  # bytes left when `link_bytes` was last updated
        self.shared = 0
        self._reroute()

    def outcome(self) -> Outcome:
        failing = [change.seconds for change in self.changes]
        rerouting = [seconds + self.reroute_seconds for seconds in failing] if callable(self.route) else []
        times = np.unique(np.concatenate([self.flows.start, failing, rerouting]))
        for index, now in enumerate(times):
            self._change(now)
            if now in rerouting:
                self._book()
                self._reroute()
            self._begin(now)
            self._run(now, times[index + 1] if index + 1 < len(times) else np.inf)
        self._book()
        moved = self.flows.bytes - self.left
        return Outcome(
            end=self.end,
            is_cut_off=~self.is_done,
            delivered=moved,
            link_bytes=self.link_bytes,
            shared=self.shared,
        )

    def _change(self, now: float) -> None:
        for change in self.changes:
            if change.seconds == now:
                self.up[change.links] = change.is_up
        self.live = np.where(self.up, self.capacity, 0.0)

    def _reroute(self) -> None:
        routes = self.route(self.up.copy()) if callable(self.route) else self.route
        if len(routes) != len(self.flows):
            raise ValueError(f"{len(self.flows)} flows but {len(routes)} routes")
        self.routes, self.sharing = routes, Sharing.of(routes)

    def _book(self) -> None:
        """Add the bytes that moved on the present routes to `link_bytes`."""
        self.link_bytes += self.routes.carried(self.booked - self.left)
        self.booked = self.left.copy()

    def _begin(self, now: float) -> None:
        """Compute the rates of all flows that have started."""
        self.active = np.flatnonzero((self.flows.start <= now) & ~self.is_done)
        is_still = (np.diff(self.routes.offsets)[self.active] == 0) | (self.left[self.active] == 0)
        is_still &= ~self.routes.is_cut_off[self.active]
        self._complete(self.active[is_still], np.full(int(is_still.sum()), now))
        self.active = self.active[~is_still]
        self._share(now, self.active, np.zeros(0, np.int64), 0.0, 0)

    def _complete(self, ended: Longs, when: Floats) -> None:
        self.is_done[ended] = True
        self.left[ended] = 0.0
        self.end[ended] = when + self.routes.latency[ended]

    def _settle(self, now: float, chosen: Longs) -> None:
        """Update the bytes that are left of these flows to `now`."""
        moving = chosen[self.rates[chosen] > 0]
        self.left[moving] = np.maximum(self.left[moving] - self.rates[moving] * (now - self.since[moving]), 0.0)
        self.end[moving] = now
        self.since[chosen] = now

    def _share(self, now: float, anew: Longs, kept: Longs, least: float, first_class: int) -> None:
        """Compute the rates of `anew`; those of `kept` stay. In the first class all are at least `least`."""
        self._settle(now, anew)
        self.shared += 1
        left = self.live - self.sharing.carried(self.rates, kept) if len(kept) else self.live.copy()
        self.rates[anew] = 0.0
        for each in np.unique(self.flows.priority[anew]):
            wanted = anew[(self.flows.priority[anew] == each) & ~self.routes.is_cut_off[anew]]
            self.sharing.fill(left, wanted, self.rates, least if each == first_class else 0.0)
            left[left < NOTHING_LEFT * self.capacity] = 0.0
        with np.errstate(divide="ignore", invalid="ignore"):  # for flows that stand still, some of them without bytes
            self.finish[anew] = np.where(self.rates[anew] > 0, now + self.left[anew] / self.rates[anew], np.inf)

    def _run(self, now: float, until: float) -> None:
        """Go from event to event, until the next start or change."""
        while len(self.active):
            ended, now, level, first_class = self._next_event(until)
            self._complete(ended, self.finish[ended])
            self.active = self.active[~self.is_done[self.active]]
            if now == until:
                if until < np.inf:  # after the last change, the flows that are left stand still for ever
                    self._settle(now, self.active)
                return
            classes = self.flows.priority[self.active]
            is_anew = (classes > first_class) | ((classes == first_class) & (self.rates[self.active] >= level))
            self._share(now, self.active[is_anew], self.active[~is_anew], level, first_class)

    def _next_event(self, until: float) -> tuple[Longs, float, float, int]:
        """Return the flows that end up to the first end that changes rates, its time, the least rate that ended with
        it, and its class. The time is `until` if nothing changes before."""
        moving = self.active[np.isfinite(self.finish[self.active])]
        order = moving[np.argsort(self.finish[moving])]
        finish, rate, classes = self.finish[order], self.rates[order], self.flows.priority[order]
        group_end = np.searchsorted(finish, finish * (1 + SAME_TIME) + self.window, "right")
        changes = np.zeros(len(order), bool)
        for each in np.unique(classes):
            mine = np.where(classes == each, rate, 0.0)
            fastest_after = np.append(np.maximum.accumulate(mine[::-1])[::-1], 0.0)[group_end]
            changes |= (classes == each) & (rate <= fastest_after)
        # Classes after the one of an end, including flows that stand still.
        last = int(self.flows.priority[self.active].max())
        changes |= classes < last
        first = int(np.argmax(changes)) if changes.any() else len(order)
        stop = int(group_end[first]) if first < len(order) else len(order)
        at = float(finish[stop - 1]) if stop and first < len(order) else np.inf
        if at >= until:
            return order[finish <= until], until, 0.0, 0
        if first == len(order):
            return order, until, 0.0, 0
        first_class = int(classes[first:stop].min())
        level = float(rate[first:stop][classes[first:stop] == first_class].min())
        return order[:stop], at, level, first_class
