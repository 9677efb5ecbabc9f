"""Replays a pipeline schedule: when each step starts and ends, given how long each kind takes.

A step starts when its rank is free and its inputs are there; the result of another rank arrives `send` seconds after it
is made. With e the end, d the duration, p the rank's step before and i the inputs from other ranks,

    e(step) = max(e(p), e(i) + send, ...) + d(step)

for one step after the other, in an order in which they can run (`Schedule.order`). Sending takes no time from the
ranks; what it adds to their waits is reported as exposed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

from dovetail.parallel.schedules.schedule import NO_INPUT, Schedule, activation_peaks

PerStage = float | Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """Seconds of each kind of work: one number for all stages, or one for each stage.

    Stages differ: the first has the embedding, the last the head and MTP. Schedules that split a backward need
    `input_backward` and `weight_backward`, which may add up to another time than `backward`. `pair` is given for the
    stage of the pair's forward (its backward is at the mirrored stage, S-1-s); None means that forward and backward run
    one after the other. `send` is from one rank to its neighbour.
    """

    forward: PerStage
    backward: PerStage
    input_backward: PerStage | None = None
    weight_backward: PerStage | None = None
    pair: PerStage | None = None
    send: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """The seconds of a rank by kind of work, which add up to `seconds`, the time of the pipeline.

    A full backward is given by its halves (all input if `Durations` has no halves), so that `input_backward +
    full_input` are the input gradients that a rank computes alone, and `weight_backward + full_weight` the weight
    gradients. ISCA Table 4 has such parts as 1F, 1B, 1W, 1F1B and bubble. It calls 1B the input and 1W the weight half,
    and does not say where full backwards count.
    """

    forward: float
    full_input: float
    full_weight: float
    input_backward: float
    weight_backward: float
    pair: float
    bubble: float

    @property
    def full_backward(self) -> float:
        return self.full_input + self.full_weight

    @property
    def seconds(self) -> float:
        return math.fsum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The start and end of every step of a schedule, in seconds from the first start [rank][step of the rank]."""

    schedule: Schedule
    durations: Durations
    start: tuple[tuple[float, ...], ...]
    end: tuple[tuple[float, ...], ...]
    busy: tuple[float, ...]  # seconds that each rank works
    seconds: float  # until the last rank has finished

    @property
    def bubble(self) -> tuple[float, ...]:
        """The seconds that each rank idles."""
        return tuple(self.seconds - busy for busy in self.busy)

    @property
    def activation_peaks(self) -> tuple[float, ...]:
        """The most micro-batches whose activations each rank holds at once."""
        return activation_peaks(self.schedule)

    def exposed_sends(self) -> tuple[float, ...]:
        """Return the seconds that each rank waits for a message on its way, which are the sends that no work hides."""
        start = [moment for moments in self.start for moment in moments]
        end = [moment for moments in self.end for moment in moments]
        free = [0.0] * self.schedule.ranks
        waits = [0.0] * self.schedule.ranks
        for number, rank, first, second in self.schedule.order.steps:
            ready = free[rank]
            for source in (first, second):
                if source != NO_INPUT and end[source] > ready:
                    ready = end[source]
            waits[rank] += start[number] - ready
            free[rank] = end[number]
        return tuple(waits)

    def breakdown(self, rank: int | None = None) -> Breakdown:
        """Return the seconds of `rank` by kind of work, or with None their mean over ranks."""
        if rank is None:
            each = [self.breakdown(index) for index in range(self.schedule.ranks)]
            names = [field.name for field in fields(Breakdown)]
            return Breakdown(**{name: math.fsum(getattr(one, name) for one in each) / len(each) for name in names})
        order, stages = self.schedule.order, self.schedule.stages
        found = dict.fromkeys(("F", "B", "I", "W", "FB", "weight"), 0.0)
        for work, times in Counter(order.work_of[slice(*order.offsets[rank : rank + 2])]).items():
            kind, places = order.works[work]
            seconds = times * step_seconds(self.durations, kind, places, stages)
            found[kind] += seconds
            if kind == "B":
                found["weight"] += seconds * _weight_share(self.durations, places, stages)
        return Breakdown(
            forward=found["F"],
            full_input=found["B"] - found["weight"],
            full_weight=found["weight"],
            input_backward=found["I"],
            weight_backward=found["W"],
            pair=found["FB"],
            bubble=self.bubble[rank],
        )


def replay(schedule: Schedule, durations: Durations) -> Timeline:
    """Return the timeline of `schedule` with steps of these `durations`.

    Raises ValueError for durations that are negative, not finite, missing, or not one per stage, and for a schedule
    whose ranks wait for each other in a circle.
    """
    order = schedule.order
    table = [step_seconds(durations, kind, stages, schedule.stages) for kind, stages in order.works]
    seconds = [table[work] for work in order.work_of]
    start, end = [0.0] * len(seconds), [0.0] * len(seconds)
    free = [0.0] * schedule.ranks
    send = _legal(durations.send, "send")
    for number, rank, first, second in order.steps:
        moment = free[rank]
        if first >= 0 and (arrival := end[first] + send) > moment:
            moment = arrival
        if second >= 0 and (arrival := end[second] + send) > moment:
            moment = arrival
        start[number] = moment
        end[number] = free[rank] = moment + seconds[number]
    bounds = list(pairwise(order.offsets))
    return Timeline(
        schedule=schedule,
        durations=durations,
        start=tuple(tuple(start[low:high]) for low, high in bounds),
        end=tuple(tuple(end[low:high]) for low, high in bounds),
        busy=tuple(math.fsum(seconds[low:high]) for low, high in bounds),
        seconds=max(free),
    )


def step_seconds(durations: Durations, kind: str, stages: tuple[int, ...], num_stages: int) -> float:
    """Return the seconds of one step of `kind` (F, B, I, W, FB); `stages` are those of its halves, forward first.

    Raises ValueError for a duration that is negative, not finite, missing, or not one per stage.
    """
    if kind == "FB" and durations.pair is None:
        forward, backward = stages
        return step_seconds(durations, "F", (forward,), num_stages) + step_seconds(
            durations, "B", (backward,), num_stages
        )
    name = {"F": "forward", "B": "backward", "I": "input_backward", "W": "weight_backward", "FB": "pair"}[kind]
    value: PerStage | None = getattr(durations, name)
    if value is None:
        raise ValueError(f"{name} has no duration, and this schedule splits backwards: give input_ and weight_backward")
    if isinstance(value, int | float):
        return _legal(value, name)
    if len(value) != num_stages:
        raise ValueError(f"{name} has {len(value)} durations for {num_stages} stages; give one number, or one for each")
    return _legal(value[stages[0]], name)


def _weight_share(durations: Durations, places: tuple[int, ...], num_stages: int) -> float:
    """Return the share of the weight half in the sum of both halves of a full backward at the stage."""
    if durations.input_backward is None or durations.weight_backward is None:
        return 0.0
    weight = step_seconds(durations, "W", places, num_stages)
    both = weight + step_seconds(durations, "I", places, num_stages)
    return weight / both if both else 0.0


def _legal(seconds: float, name: str) -> float:
    if not 0.0 <= seconds < math.inf:
        raise ValueError(f"{name} = {seconds} seconds: a duration is 0 or more, and finite")
    return seconds
