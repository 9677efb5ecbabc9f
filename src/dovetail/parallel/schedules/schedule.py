"""A pipeline schedule as data: the steps of every rank in order, and checks that they can run.

One object has several readers: a runtime executes it, `planner.training.timeline` times it, `planner.report.drawing`
draws it. Schedules are made in `parallel.schedules.pipelines` and `parallel.schedules.dualpipe`.

The model is divided into stages 0 .. S-1. A micro-batch runs forward through them in order and backward in reverse:

    F  forward                            needs F of the stage before
    B  full backward                      needs the stage's own F, and B or I of the stage after
    I  input half of a backward           needs the same; the stage before can continue after it
    W  weight half, for I's micro-batch   needs I; no other step waits for it [zero-bubble, V3 §3.2.1]

A `Pair` runs the F of one micro-batch and the B of another at once, so that the communication of each hides behind the
arithmetic of the other [V3 §3.2.1]; it needs the inputs of both and yields the outputs of both.

A rank executes its steps in order and blocks until a step's inputs are there; it never waits to hand over an output.
DualPipe feeds the pipeline from both ends: direction 1 enters at the last rank, and `placement` says which rank holds
each stage for each direction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NoReturn

Kind = Literal["F", "B", "I", "W"]
NO_INPUT = -1


@dataclass(frozen=True, slots=True)
class Action:
    """Work of one kind for one micro-batch at one stage; the direction chooses the copy of the stage."""

    kind: Kind
    microbatch: int  # 0 .. microbatches - 1, over all directions together
    stage: int
    direction: int = 0

    @property
    def halves(self) -> tuple[Action, ...]:
        return (self,)

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch} of stage {self.stage}"


@dataclass(frozen=True, slots=True)
class Pair:
    """A forward and a full backward that run overlapped."""

    forward: Action
    backward: Action

    @property
    def kind(self) -> Literal["FB"]:
        return "FB"

    @property
    def halves(self) -> tuple[Action, ...]:
        return self.forward, self.backward

    def __str__(self) -> str:
        return f"{self.forward} with {self.backward}"


Step = Action | Pair


@dataclass(frozen=True, slots=True)
class Order:
    """All steps in an order in which they can run. Steps are numbered through rank 0, then rank 1, and so on.

    `steps` holds (number, rank, input, input). Inputs are the numbers of steps of other ranks, or `NO_INPUT`; steps of
    the rank itself come before in its own order. `works` are the different (kind, stages of its halves), and `work_of`
    says which of them each step is, by its number.
    """

    offsets: tuple[int, ...]  # the number of each rank's first step, and at last the number of all steps
    steps: tuple[tuple[int, int, int, int], ...]
    works: tuple[tuple[str, tuple[int, ...]], ...]
    work_of: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The steps of every rank for one optimizer step."""

    name: str
    microbatches: int
    placement: tuple[tuple[int, ...], ...]  # placement[direction][stage]: the rank that holds this copy of the stage
    actions: tuple[tuple[Step, ...], ...]  # of each rank, in order
    activation_limit: tuple[int, ...]  # for each rank, the most (micro-batch, stage) that it may hold activations of

    @property
    def ranks(self) -> int:
        return len(self.actions)

    @property
    def stages(self) -> int:
        return len(self.placement[0])

    @cached_property
    def order(self) -> Order:
        """All steps in order. Raises ValueError if ranks wait for each other in a circle or for a missing step."""
        return _find_order(self)

    def held_by(self, rank: int) -> tuple[tuple[int, int], ...]:
        """Return the (stage, direction) copies that `rank` holds, in the order of stages."""
        places = [
            (stage, direction)
            for direction, stages in enumerate(self.placement)
            for stage, holder in enumerate(stages)
            if holder == rank
        ]
        return tuple(sorted(places))

    def rank_of(self, action: Action) -> int:
        return self.placement[action.direction][action.stage]

    def receives_from(self, action: Action) -> int | None:
        """Return the rank whose message `action` needs (activations for F, gradients for B and I), or None."""
        return self._neighbour(action, -1)

    def sends_to(self, action: Action) -> int | None:
        """Return the rank that needs the result of `action`, or None if it stays or is the last."""
        return self._neighbour(action, 1)

    def _neighbour(self, action: Action, ahead: int) -> int | None:
        stage = action.stage + (ahead if action.kind == "F" else -ahead)
        if action.kind == "W" or not 0 <= stage < self.stages:
            return None
        holder = self.placement[action.direction][stage]
        return None if holder == self.rank_of(action) else holder


def counts(schedule: Schedule, rank: int) -> dict[str, int]:
    """Count the steps of each kind (F, B, I, W, FB) that `rank` runs."""
    found = Counter(step.kind for step in schedule.actions[rank])
    return {kind: found[kind] for kind in ("F", "B", "I", "W", "FB")}


def activation_peaks(
    schedule: Schedule, held: Sequence[float] | None = None, kept: Sequence[float] | None = None
) -> tuple[float, ...]:
    """Return the most that each rank holds at the same time between forward and backward.

    `held` is what one micro-batch holds at each stage, in any unit (None: 1, so the peak counts micro-batches), and
    `kept` is the part that stays between I and W (None: all). A forward takes its share when it starts, and a backward
    releases it when it ends, so a pair counts both. Ranks run in order, so the peak does not depend on durations.
    """
    held = [1] * schedule.stages if held is None else held
    kept = held if kept is None else kept
    if len(held) != schedule.stages or len(kept) != schedule.stages:
        raise ValueError(f"held and kept need one value for each of {schedule.stages} stages: {len(held)}, {len(kept)}")
    peaks: list[float] = []
    for steps in schedule.actions:
        now = peak = 0.0
        for step in steps:
            for half in step.halves:
                if half.kind == "F":
                    now += held[half.stage]
            peak = max(peak, now)
            for half in step.halves:
                if half.kind == "B":
                    now -= held[half.stage]
                elif half.kind == "I":
                    now -= held[half.stage] - kept[half.stage]
                elif half.kind == "W":
                    now -= kept[half.stage]
        peaks.append(peak)
    return tuple(peaks)


def check(schedule: Schedule) -> None:
    """Raise ValueError unless the schedule can run and is complete.

    Every step must be on the rank that holds its stage; every micro-batch must pass every stage once forward and then
    once backward (B, or I and later W); the ranks must never wait in a circle; and no rank may hold more than its
    `activation_limit`.
    """
    seen: dict[tuple[int, int], str] = {}
    for rank, steps in enumerate(schedule.actions):
        for step in steps:
            for half in step.halves:
                _check_place(schedule, rank, half)
                _check_turn(seen, rank, half)
    for microbatch in range(schedule.microbatches):
        for stage in range(schedule.stages):
            done = seen.get((microbatch, stage), "")
            if done not in ("FB", "FIW"):
                raise ValueError(f"{schedule.name}: micro-batch {microbatch} at stage {stage} runs {done or 'nothing'}")
    _find_order(schedule)
    for rank, (peak, limit) in enumerate(zip(activation_peaks(schedule), schedule.activation_limit, strict=True)):
        if peak > limit:
            raise ValueError(f"{schedule.name}: rank {rank} holds {peak:.0f} activations at once, over its {limit}")


def _check_place(schedule: Schedule, rank: int, half: Action) -> None:
    if not 0 <= half.microbatch < schedule.microbatches:
        raise ValueError(f"rank {rank}: {half}: micro-batches are 0 to {schedule.microbatches - 1}")
    if not (0 <= half.direction < len(schedule.placement) and 0 <= half.stage < schedule.stages):
        raise ValueError(
            f"rank {rank}: {half}, direction {half.direction}: there are {schedule.stages} stages in "
            f"{len(schedule.placement)} direction(s)"
        )
    if schedule.rank_of(half) != rank:
        raise ValueError(f"rank {rank}: {half} belongs on rank {schedule.rank_of(half)}, which holds the stage")


def _check_turn(seen: dict[tuple[int, int], str], rank: int, half: Action) -> None:
    """Note `half` in `seen`. The kinds of one micro-batch at one stage must be F, B or F, I, W in this order."""
    place = half.microbatch, half.stage
    before = seen.get(place, "")
    if not any(spelled.startswith(before + half.kind) for spelled in ("FB", "FIW")):
        needs = {"F": "nothing", "B": "F", "I": "F", "W": "F and I"}[half.kind]
        raise ValueError(
            f"rank {rank}: {half} comes after {' and '.join(before) or 'nothing'} of that micro-batch there, "
            f"not after {needs}"
        )
    seen[place] = before + half.kind


def _find_order(schedule: Schedule) -> Order:
    """Find an order by running every rank as far as it can; a rank that blocks continues when its input is made."""
    offsets = [0]
    for steps in schedule.actions:
        offsets.append(offsets[-1] + len(steps))
    inputs = _inputs(schedule, offsets)
    next_step, is_done = offsets[:-1], bytearray(offsets[-1])
    waiting: dict[int, list[int]] = {}
    found: list[tuple[int, int, int, int]] = []
    ready = list(range(schedule.ranks))
    while ready:
        rank = ready.pop()
        number, end = next_step[rank], offsets[rank + 1]
        while number < end:
            first, second = inputs[number]
            if first >= 0 and not is_done[first]:
                waiting.setdefault(first, []).append(rank)
                break
            if second >= 0 and not is_done[second]:
                waiting.setdefault(second, []).append(rank)
                break
            is_done[number] = 1
            found.append((number, rank, first, second))
            if number in waiting:
                ready.extend(waiting.pop(number))
            number += 1
        next_step[rank] = number
    if len(found) != offsets[-1]:
        _reject_circle(schedule, offsets, next_step)
    works: dict[tuple[str, tuple[int, ...]], int] = {}
    work_of = tuple(
        works.setdefault((step.kind, tuple(half.stage for half in step.halves)), len(works))
        for steps in schedule.actions
        for step in steps
    )
    return Order(offsets=tuple(offsets), steps=tuple(found), works=tuple(works), work_of=work_of)


def _inputs(schedule: Schedule, offsets: Sequence[int]) -> list[tuple[int, int]]:
    """Return for each step the numbers of the steps on other ranks that it needs."""
    stages = schedule.stages
    forward: dict[int, int] = {}  # micro-batch * stages + stage -> number of the step that makes it
    backward: dict[int, int] = {}
    for rank, steps in enumerate(schedule.actions):
        for number, step in enumerate(steps, start=offsets[rank]):
            for half in step.halves:
                if half.kind != "W":
                    made = forward if half.kind == "F" else backward
                    made[half.microbatch * stages + half.stage] = number
    inputs: list[tuple[int, int]] = []
    for rank, steps in enumerate(schedule.actions):
        for number, step in enumerate(steps, start=offsets[rank]):
            needed = [NO_INPUT, NO_INPUT]
            for index, half in enumerate(step.halves):
                kind, stage = half.kind, half.stage
                if kind == "W" or (kind == "F" and stage == 0) or (kind != "F" and stage == stages - 1):
                    continue
                key = half.microbatch * stages + stage + (-1 if kind == "F" else 1)
                source = (forward if kind == "F" else backward).get(key)
                if source is None:
                    raise ValueError(f"rank {rank}: {half} waits for a stage that never runs that micro-batch")
                if not offsets[rank] <= source < number:  # not an earlier step of the same rank
                    needed[index] = source
            inputs.append((needed[0], needed[1]))
    return inputs


def _reject_circle(schedule: Schedule, offsets: Sequence[int], next_step: Sequence[int]) -> NoReturn:
    stuck = [
        f"rank {rank} before {schedule.actions[rank][number - offsets[rank]]}"
        for rank, number in enumerate(next_step)
        if number < offsets[rank + 1]
    ]
    raise ValueError(f"{schedule.name}: ranks wait for each other for ever: {'; '.join(stuck)}")
