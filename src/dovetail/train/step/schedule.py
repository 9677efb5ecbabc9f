"""Schedules of learning rate, batch size, bias update speed and MTP weight, as data.

A `Schedule` is a row of segments. Each ends at a number of steps, of consumed tokens, or at a fraction of the
run's budget (of tokens or of time, whichever the caller measures), and holds a constant or moves to its value
along a line or half a cosine. `value` is the one evaluator. The published schedules are in
`catalog/schedules`; `as_fractions` and `with_peak` fit them to a run of another length and size.

    linear:  v0 + (v1 - v0) x            cosine:  v1 + (v0 - v1) (1 + cos(pi x)) / 2        x from 0 to 1

Sources: [V3 §2.1.2, §2.2, §4.2], [V2 §3.1.2, App. B].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, model_validator

from dovetail import catalog
from dovetail.config import Record, load_toml, near_matches

Unit = Literal["steps", "tokens", "fraction"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a run is. Steps and tokens are those of the run so far; `fraction` is its share of the budget.

    `step` numbers the step being taken from 1, so that a warm-up of 2000 steps starts above zero and step 2000
    has the peak; `tokens` are those consumed before it.
    """

    step: int = 0
    tokens: int = 0
    fraction: float = 0.0

    def in_unit(self, unit: Unit) -> float:
        return {"steps": self.step, "tokens": self.tokens, "fraction": self.fraction}[unit]


class Segment(Record):
    """One part of a schedule, which moves to `value` until its end; a `constant` has that value from its start on.

    Only the last segment has no end.
    """

    value: float = Field(ge=0)
    shape: Literal["constant", "linear", "cosine"] = "constant"
    steps: int | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)
    fraction: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _has_one_end(self) -> Segment:
        if len(self._ends()) > 1:
            raise ValueError(f"a segment ends at one of steps, tokens or fraction, not at {self._ends()}")
        return self

    def _ends(self) -> dict[Unit, float]:
        ends: dict[Unit, float | None]
        ends = {"steps": self.steps, "tokens": self.tokens, "fraction": self.fraction}
        return {unit: end for unit, end in ends.items() if end is not None}

    @property
    def end(self) -> tuple[Unit, float] | None:
        """Unit and position of the end; None if it has none."""
        return next(iter(self._ends().items()), None)


class Schedule(Record):
    """Segments in order; the value before the first is `start`, and the last one never ends."""

    start: float = Field(default=0.0, ge=0)
    segments: tuple[Segment, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _segments_join(self) -> Schedule:
        last: dict[Unit, float] = dict.fromkeys(get_args(Unit), 0.0)
        previous: Unit | None = None  # unit of the boundary where the segment starts; None at the very start
        for index, segment in enumerate(self.segments):
            if segment.end is None:
                if index + 1 < len(self.segments):
                    raise ValueError(f"segment {index} has no end but is not the last: give it one")
                if segment.shape != "constant":
                    raise ValueError(f"the last segment is {segment.shape} but has no end; add a constant one after it")
                return self
            unit, end = segment.end
            if end <= last[unit]:
                raise ValueError(f"segment {index} ends at {end:g} {unit}, not after {last[unit]:g}")
            if segment.shape != "constant" and previous not in (None, unit):
                raise ValueError(
                    f"segment {index} is {segment.shape} over {unit} but starts at a boundary in {previous}; "
                    "put a constant segment between them"
                )
            last[unit], previous = end, unit
        raise ValueError("the last segment must have no end: its value holds for the rest of the run")


class TrainingSchedule(Record):
    """All that changes during a run. Batch sizes are in sequences; `source` says where the numbers are from."""

    source: str
    learning_rate: Schedule
    batch_size: Schedule
    gamma: Schedule = Schedule(segments=(Segment(value=0.0),))  # bias update speed
    mtp_weight: Schedule = Schedule(segments=(Segment(value=0.0),))  # lambda
    sequence_length: int | None = Field(default=None, gt=0)  # tokens
    total_tokens: int | None = Field(default=None, gt=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """What a `TrainingSchedule` asks for in one step."""

    learning_rate: float
    batch_size: int
    gamma: float
    mtp_weight: float


def value(schedule: Schedule, at: Position) -> float:
    """The scheduled value at `at`. A segment covers its start and not its end."""
    begin, before = 0.0, schedule.start
    for segment in schedule.segments:
        if segment.end is None:
            return segment.value
        unit, end = segment.end
        if at.in_unit(unit) < end:
            # Positions in another unit can lag behind a boundary already passed, hence the clamp.
            share = max(0.0, (at.in_unit(unit) - begin) / (end - begin)) if segment.shape != "constant" else 1.0
            return _between(segment, before, share)
        begin, before = end, segment.value
    raise AssertionError("a valid schedule ends with a segment that has no end")


def values(schedule: TrainingSchedule, at: Position, batch_multiple: int = 1) -> Values:
    """All scheduled values at `at`; the batch size is rounded to the nearest positive multiple of `batch_multiple`."""
    multiples = round(value(schedule.batch_size, at) / batch_multiple)
    return Values(
        learning_rate=value(schedule.learning_rate, at),
        batch_size=max(1, multiples) * batch_multiple,
        gamma=value(schedule.gamma, at),
        mtp_weight=value(schedule.mtp_weight, at),
    )


def tokens_after(schedule: TrainingSchedule, steps: int) -> int:
    """Tokens consumed by the first `steps` steps, the batch ramp included."""
    if schedule.sequence_length is None:
        raise ValueError("the schedule names no sequence_length, so steps cannot be turned into tokens")
    tokens = 0
    for step in range(1, steps + 1):
        at = Position(step=step, tokens=tokens)
        tokens += values(schedule, at).batch_size * schedule.sequence_length
    return tokens


def as_fractions(schedule: TrainingSchedule, warmup: float | None = None) -> TrainingSchedule:
    """The same shape over a budget of any length: every boundary becomes a fraction of `total_tokens`.

    Boundaries in steps become the fraction of tokens that those steps consume, or `warmup` where it is given:
    V3's 2000 steps are 0.2 % of its tokens, too few steps of a short run to warm up anything.
    Raises ValueError if boundaries need the schedule's total_tokens and it has none.
    """
    names = ("learning_rate", "batch_size", "gamma", "mtp_weight")
    return schedule.model_copy(
        update={name: _in_fractions(getattr(schedule, name), schedule, warmup) for name in names}
        | {"total_tokens": None}
    )


def with_peak(schedule: Schedule, peak: float) -> Schedule:
    """The same shape, scaled so that its largest value is `peak`."""
    top = max(schedule.start, *(segment.value for segment in schedule.segments))
    if top == 0:
        raise ValueError(f"a schedule that is zero throughout cannot be scaled to a peak of {peak:g}")

    # Divided first, so that the peak itself comes out exact.
    return schedule.model_copy(
        update={
            "start": schedule.start / top * peak,
            "segments": tuple(
                segment.model_copy(update={"value": segment.value / top * peak}) for segment in schedule.segments
            ),
        }
    )


def schedule_names() -> list[str]:
    """Names that `load_schedule` takes, sorted."""
    return sorted(path.stem for path in _schedules().glob("*.toml"))


def load_schedule(name: str) -> TrainingSchedule:
    """The catalog's schedule `name`.  Raises ValueError with near matches for an unknown one."""
    if name not in schedule_names():
        raise ValueError(f"no schedule {name!r}; {near_matches(name, schedule_names())}")
    return load_toml(_schedules() / f"{name}.toml", TrainingSchedule)


def _schedules() -> Path:
    assert catalog.__file__ is not None
    return Path(catalog.__file__).parent / "schedules"


def _between(segment: Segment, before: float, share: float) -> float:
    if segment.shape == "linear":
        return before + (segment.value - before) * share
    if segment.shape == "cosine":
        return segment.value + (before - segment.value) * (1 + math.cos(math.pi * share)) / 2
    return segment.value


def _in_fractions(schedule: Schedule, run: TrainingSchedule, warmup: float | None) -> Schedule:
    segments = []
    for segment in schedule.segments:
        if segment.end is None or segment.end[0] == "fraction":
            segments.append(segment)
            continue
        unit, end = segment.end
        fraction = warmup if unit == "steps" else None
        if fraction is None:
            if run.total_tokens is None:
                raise ValueError(f"a boundary at {end:g} {unit} needs total_tokens to become a fraction")
            fraction = (tokens_after(run, int(end)) if unit == "steps" else end) / run.total_tokens
        segments.append(Segment(value=segment.value, shape=segment.shape, fraction=fraction))
    return Schedule(start=schedule.start, segments=tuple(segments))
