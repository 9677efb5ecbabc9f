"""The pieces of a pipeline's forwards and backwards as measured, and what the planner's replay makes of them.

Each half is cut where it waits for an exchange: arithmetic, wait, arithmetic, ... Of a layer with experts in one hop a
forward waits for counts, for dispatch and for combine; a backward for the dispatch of gradients and their combine.
What comes before a layer's dispatch is its attention (with a dense layer before it), what is left at the end the head.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np

from dovetail.parallel.pipeline.held import Held
from dovetail.parallel.schedules.schedule import Schedule
from dovetail.parallel.turns import Turns, UnderWay
from dovetail.planner.training.chunks import LayerSeconds, StageSeconds, pair_seconds
from dovetail.planner.training.timeline import Durations, replay
from dovetail.spec.band import Band

Pieces = Mapping[str, Sequence[float]]  # seconds of arithmetic and waits in turn, by stage and kind, such as "0F"


@contextmanager
def noted() -> Iterator[dict[str, list[list[float]]]]:
    """Of each half that runs here meanwhile: when it began, when it began and ended to wait, and when it ended."""
    found: defaultdict[str, list[list[float]]] = defaultdict(list)
    marks: list[float] = []
    wait = Turns.await_exchange

    def noting(kind_of: Callable[[dict[str, Any]], str], half: Callable[..., Any]) -> Callable[..., Any]:
        def run(held: Held, *arguments: Any, **settings: Any) -> Any:
            marks[:] = [time.perf_counter()]
            made = half(held, *arguments, **settings)
            found[f"{held.number}{kind_of(settings)}"].append([*marks, time.perf_counter()])
            return made

        return run

    def waiting(turns: Turns, work: UnderWay) -> None:
        marks.append(time.perf_counter())
        wait(turns, work)
        marks.append(time.perf_counter())

    halves = {
        "forward": noting(lambda _: "F", Held.forward),
        "backward": noting(lambda settings: "B" if settings["is_whole"] else "I", Held.backward),
        "weights": noting(lambda _: "W", Held.weights),
    }
    with patch.multiple(Held, **halves), patch.object(Turns, "await_exchange", waiting):
        yield found


def medians(found: Mapping[str, list[list[float]]]) -> Pieces:
    return {key: np.median(np.diff(marks), axis=0).tolist() for key, marks in found.items()}


def share_of_waits(pieces: Pieces) -> float:
    """Seconds of a micro-batch's waits by those of its arithmetic, on all stages here."""
    waits, arithmetic = (sum(sum(each[first::2]) for each in pieces.values()) for first in (1, 0))
    return waits / arithmetic


def replayed(pieces: Pieces, schedule: Schedule, send: float, is_overlapped: bool) -> float:
    """Seconds of a step. `send` is what hidden states need from rank to rank."""
    count = schedule.stages

    def seconds(kind: str) -> list[float]:
        return [sum(pieces.get(f"{stage}{kind}", ())) for stage in range(count)]

    pairs = None
    if is_overlapped:
        made = [_stage(pieces, stage) for stage in range(count)]
        pairs = [pair_seconds(made[stage], made[count - 1 - stage]).value for stage in range(count)]
    durations = Durations(
        forward=seconds("F"),
        backward=seconds("B"),
        input_backward=seconds("I"),
        weight_backward=seconds("W"),
        pair=pairs,
        send=send,
    )
    return replay(schedule, durations).seconds


def _stage(pieces: Pieces, stage: int) -> StageSeconds:
    """Both halves of the backward count as one: the executor's pairs have whole backwards."""
    forward, backward = pieces[f"{stage}F"], pieces[f"{stage}B"]
    *body, head_f = map(Band.exact, forward)
    head_b, *rest = map(Band.exact, backward)
    layers = []
    for first in range(0, len(body), 6):
        attn, counts, between, dispatch, mlp, combine = body[first : first + 6]
        layers.append({"attn_f": attn + between, "dispatch_f": counts + dispatch, "mlp_f": mlp, "combine_f": combine})
    for layer, last in zip(reversed(layers), range(0, len(rest), 4), strict=True):
        names = ("dispatch_b", "mlp_b", "combine_b", "attn_b")
        layer |= dict(zip(names, rest[last : last + 4], strict=True))
    return StageSeconds(
        forward=Band.exact(sum(forward)),
        input_backward=Band.exact(sum(backward)),
        weight_backward=Band.exact(0.0),
        layers=(*(LayerSeconds(**layer) for layer in layers), LayerSeconds(mlp_f=head_f, mlp_b=head_b)),
    )
