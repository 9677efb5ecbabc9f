"""The messages of a schedule, as data: which step makes each, and which step of another rank needs it.

A forward hands hidden states to the stage after, and a backward (B, or the input half I) hands their gradient to the
stage before. Where both stages are on one rank, nothing is sent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dovetail.parallel.schedules.schedule import Action, Schedule

Key = tuple[bool, int, int]  # whether it goes forward, the micro-batch, and the stage that it is for


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Ranks are those of the pipeline; steps are numbered from 0 on each rank."""

    key: Key
    source: int
    target: int
    made: int  # the step of the source that sends it
    needed: int  # the step of the target that waits for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """A message on its way here. Those of one rank are received in the order in which they are sent."""

    message: Message
    step: int  # the first step here that needs it, or one that is sent after it


def key_for(action: Action) -> Key:
    """The message that `action` waits for."""
    return action.kind == "F", action.microbatch, action.stage


def key_of(action: Action) -> Key:
    """The message that `action` makes."""
    is_forward = action.kind == "F"
    return is_forward, action.microbatch, action.stage + (1 if is_forward else -1)


def messages(schedule: Schedule) -> tuple[Message, ...]:
    """All messages, those of each rank in the order in which it sends them."""
    needed = {
        key_for(half): number
        for steps in schedule.actions
        for number, step in enumerate(steps)
        for half in step.halves
        if half.kind != "W"
    }
    return tuple(
        Message(key=key_of(half), source=rank, target=target, made=number, needed=needed[key_of(half)])
        for rank, steps in enumerate(schedule.actions)
        for number, step in enumerate(steps)
        for half in step.halves
        if (target := schedule.sends_to(half)) is not None
    )


def arrivals(sent: Sequence[Message], rank: int) -> dict[int, tuple[Due, ...]]:
    """What comes to `rank`, by its source."""
    by_source = defaultdict[int, list[Message]](list)
    for message in sent:
        if message.target == rank:
            by_source[message.source].append(message)
    return {source: tuple(_due(found)) for source, found in by_source.items()}


def _due(found: Sequence[Message]) -> list[Due]:
    result: list[Due] = []
    for message in reversed(found):
        step = min(message.needed, result[-1].step) if result else message.needed
        result.append(Due(message=message, step=step))
    return result[::-1]
