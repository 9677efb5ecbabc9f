"""How long a run is: its steps, which a budget of minutes plans again, and the epochs of its text.

A run of `train.minutes` starts with as many steps as a short measurement says. From then on it looks at the clock every
twentieth of its time, and more often at the end. Where the steps still to come would take another time than is left,
there become more or fewer of them. Every such change is written to out/budget.json before the next step is taken, and
what a step does depends on the changes that are written there, never on the clock: so a resumed run is the same run.

Schedules go by the share of the run that is done. A step advances it by an equal part of what remains:

    fraction(S') = fraction(S) + (1 - fraction(S)) (S' - S) / (N - S)        after step S there were to be N in all

So it never jumps, and it is 1 in the last step, however often N changed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dovetail.atomic import write_bytes
from dovetail.model.transformer import Transformer, initialize
from dovetail.text.corpus import num_samples, read_batch
from dovetail.text.shards import TokenStore
from dovetail.train.layout.ranks import rank_and_world
from dovetail.train.run.run_file import RunConfig, TrainConfig, build_optimizer
from dovetail.train.step import step as stepping
from dovetail.train.step.schedule import Position, TrainingSchedule, values
from dovetail.train.step.step import Objective, train_step
from dovetail.train.step.team import Alone

STEPS_TO_MEASURE = 8  # for a first guess, which the run's own steps correct
STEPS_TO_WARM_UP = 8  # compile kernels and set up matrix products; not counted
LOOK_EVERY = 0.05  # of the time, and half of what is left where that is less
CLOSEST_LOOKS = 0.005  # of the time
LOOKS_BACK = 3  # the speed is that since so many looks ago: a single slow moment counts for little
TOLERANCE = 0.03  # of the steps to come, which stay as they are if they fit this well,
SMALL = 0.002  # and of all steps

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """After step `after` the run was to have `num_steps` in all."""

    after: int
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The time that a run has, and where its changes are kept."""

    seconds: float
    path: Path
    ends_at: float = math.inf  # of the clock, where the caller must be done earlier


class Pace:
    """The number of steps of a run, and the share of the run that each of them is at."""

    def __init__(
        self,
        num_steps: int,
        changes: tuple[Change, ...] = (),
        limit: Limit | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._plan = [Change(after=0, num_steps=num_steps), *changes]
        self._limit, self._clock = limit, clock or time.monotonic
        self._next_look, self._next_step = math.inf, math.inf
        self._starts = [0.0]  # the fraction at which each part of the plan starts
        for change in changes:
            self._starts.append(_fraction(self._plan[len(self._starts) - 1], self._starts[-1], change.after))
        self.start(0, 0.0)

    @property
    def num_steps(self) -> int:
        return self._plan[-1].num_steps

    @property
    def seconds(self) -> float:
        """Of the run so far, over all sittings."""
        return self._before + self._clock() - self._started

    def fraction(self, step: int) -> float:
        """The share of the run that is done with `step`, which is counted from 1: a function of the plan alone."""
        part = max(index for index, change in enumerate(self._plan) if change.after < step)
        return _fraction(self._plan[part], self._starts[part], step)

    def start(self, step: int, seconds: float) -> None:
        """Begin a sitting after `step`, with the `seconds` that the run took until then."""
        self._before, self._started = seconds, self._clock()
        self._looks = deque([(step, seconds)], maxlen=LOOKS_BACK)
        self._plan_look(step, seconds)

    def look(self, step: int) -> str | None:
        """Plan the steps after `step` again if it is time and they do not fit; returns what changed, in words."""
        seconds = self.seconds
        is_time = seconds >= self._next_look or step >= self._next_step
        if self._limit is None or not is_time or not self._plan[-1].after < step < self.num_steps:
            return None
        (first, since), left = self._looks[0], self._end() - seconds
        self._looks.append((step, seconds))
        planned, fitting = self.num_steps - step, max(1, round(left * (step - first) / (seconds - since)))
        is_off = abs(fitting - planned) > max(1, TOLERANCE * planned, SMALL * self.num_steps)
        if is_off:
            self._starts.append(self.fraction(step))
            self._plan.append(Change(after=step, num_steps=step + fitting))
            _write(self._limit.path, self._plan)
        self._plan_look(step, seconds)
        return f"{step + fitting:,} steps in place of {step + planned:,}, in {max(0.0, left):.0f} s" if is_off else None

    def _end(self) -> float:
        """When the run is to end, on the clock of `seconds`."""
        assert self._limit is not None
        return min(self._limit.seconds, self._before + self._limit.ends_at - self._started)

    def _plan_look(self, step: int, seconds: float) -> None:
        """Look again some time later, and by the middle of the steps to come: they may be over before the time is."""
        if self._limit is not None:
            whole, left = self._limit.seconds, self._end() - seconds
            self._next_look = seconds + max(min(LOOK_EVERY * whole, left / 2), CLOSEST_LOOKS * whole)
            self._next_step = step + max(1, (self.num_steps - step) // 2)


def _fraction(part: Change, start: float, step: int) -> float:
    if step == part.num_steps:
        return 1.0
    return start + (1.0 - start) * ((step - part.after) / (part.num_steps - part.after))


def _write(path: Path, plan: list[Change]) -> None:
    record = {"num_steps": plan[0].num_steps, "changes": [dataclasses.asdict(change) for change in plan[1:]]}
    write_bytes(path, json.dumps(record, indent=1).encode())


def pace_of(
    config: RunConfig, measure: Callable[[], float], report: Callable[[str], None], ends_at: float = math.inf
) -> Pace:
    """Return the pace of a run as its settings or budget.json have it, or else from `measure()`, the seconds of a step.

    `ends_at` is a time of the clock at which the run is to be done even if it has minutes left.
    """
    train, path = config.train, config.out / "budget.json"
    if train.steps is not None:
        return Pace(train.steps)
    assert train.minutes is not None
    limit = Limit(seconds=60 * train.minutes, path=path, ends_at=ends_at)
    if path.exists():
        record = json.loads(path.read_text())
        changes = tuple(Change(**change) for change in record.get("changes", []))
        # Ranks would not decide alike, so several of them take the steps that one process planned.
        return Pace(record["num_steps"], changes, limit if rank_and_world()[1] == 1 else None)
    report(f"measuring the time of a step, to see how many fit in {train.minutes:g} minutes")
    seconds = measure()
    num_steps = max(1, math.floor(min(limit.seconds, ends_at - time.monotonic()) / seconds))
    report(f"{train.minutes:g} minutes at {1000 * seconds:.0f} ms a step: {num_steps} steps, to be planned again")
    pace = Pace(num_steps, limit=limit)
    _write(path, [Change(after=0, num_steps=num_steps)])
    return pace


def step_seconds(config: RunConfig, schedule: TrainingSchedule, model: Transformer, store: TokenStore) -> float:
    """Measure a step of the run, the median of a few; leaves weights behind that have to be set again."""
    train = config.train
    initialize(model, train.seed)
    optimizer, times = build_optimizer(config, Alone(model)), []
    for step in range(STEPS_TO_WARM_UP + STEPS_TO_MEASURE):
        start = time.perf_counter()
        now = values(schedule, Position(step=1, fraction=0.5), batch_multiple=train.microbatch_size)
        batch = read_batch(store, train.sequence_length, train.seed, step * now.batch_size, now.batch_size)
        train_step(model, optimizer, stepping.microbatches(batch, train.microbatch_size), now, Objective())
        times.append(time.perf_counter() - start)
    return sorted(times[STEPS_TO_WARM_UP:])[STEPS_TO_MEASURE // 2]


def budget_line(
    train: TrainConfig, schedule: TrainingSchedule, store: TokenStore, num_steps: int, microbatches: int = 1
) -> str:
    """Say how many epochs of the text the run is; see `samples_of`. Raises ValueError for text that is shorter than a
    sample."""
    samples, least, most = samples_of(train, schedule, num_steps, microbatches)
    batch = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    epochs = samples / num_samples(store, train.sequence_length)
    shown = f"{epochs:,.1f}" if epochs >= 1 else f"{epochs:.2g}"
    return f"{num_steps:,} steps of {batch} x {train.sequence_length} tokens: {shown} epochs of the training text"


def samples_of(
    train: TrainConfig, schedule: TrainingSchedule, num_steps: int, microbatches: int = 1
) -> tuple[int, int, int]:
    """Return the samples that the run takes, and the smallest and the largest of its batches, which are multiples of so
    many microbatches."""
    tokens, sizes = 0, Counter[int]()
    is_constant = len(schedule.batch_size.segments) == 1
    for step in range(1, (1 if is_constant else num_steps) + 1):
        at = Position(step=step, tokens=tokens, fraction=step / num_steps)
        size = values(schedule, at, batch_multiple=train.microbatch_size * microbatches).batch_size
        sizes[size] += num_steps if is_constant else 1
        tokens += size * train.sequence_length
    return sum(size * count for size, count in sizes.items()), min(sizes), max(sizes)
