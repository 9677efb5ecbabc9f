"""Times two micro-batches that take turns: one computes while the other's tokens are sent.

A rank has two resources, its multiprocessors and its network, and each does its work in a fixed order. A piece starts
when its resource is free and what it needs is done. The orders are DeepSeek's [day 6], for each layer:

    prompts    compute   ATTN(1) SHARED(0) ATTN(0) MLP(1) MLP(0) SHARED(1)       108 of 132 multiprocessors
               network   COMBINE(0) DISPATCH(1) DISPATCH(0) COMBINE(1)           24 of 132
    decoding   compute   SHARED(0) ATTN-0(1) | MLP(0) | ATTN-1(1), and the same with 0 and 1 exchanged    all 132
               network   DISPATCH(0)                  | COMBINE(0)

SHARED(0) and COMBINE(0) of prompts are those of the layer before. ATTN-0 is the work between a combine and the
attention core, ATTN-1 the core and what follows up to the gate. In decoding, a short kernel issues messages, which are
on the network while the multiprocessors do something else, and another short kernel receives them [day 6; DeepEP's
receive hook].

Because the order of each resource is given, one pass over the pieces gives exact times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal, NamedTuple

from dovetail.spec.band import Band

Resource = Literal["compute", "network"]
NOTHING = Band.exact(0.0)
TRIED = (6, 16)  # numbers of layers to simulate first


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """Seconds of one layer with experts and one micro-batch; all but `dispatch` and `combine` are computation."""

    before: Band  # up to the attention core (ATTN-0), with the sum of experts' outputs and residual
    core: Band  # the attention core, o_proj, gate (ATTN-1); for prompts both are one (ATTN)
    experts: Band = NOTHING
    shared: Band = NOTHING
    dispatch: Band = NOTHING  # on the network
    combine: Band = NOTHING
    issue_dispatch: Band = NOTHING  # kernels of decoding
    take_dispatch: Band = NOTHING
    issue_combine: Band = NOTHING
    take_combine: Band = NOTHING

    @property
    def compute(self) -> Band:
        """The seconds of all computation."""
        names = (name for name in PIECES if name not in ("dispatch", "combine"))
        return sum((getattr(self, name) for name in names), NOTHING)


PIECES = tuple(field.name for field in fields(Pieces))


class Task(NamedTuple):
    """One piece of one micro-batch; `after` are the places in the list of the tasks that it needs."""

    resource: Resource
    piece: str
    after: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlapped:
    """The seconds of all layers with experts and all micro-batches, and those in which the multiprocessors work."""

    seconds: Band
    compute: Band

    @property
    def exposed(self) -> Band:
        """The seconds in which the multiprocessors wait."""
        value = self.seconds.value - self.compute.value
        ends = (self.seconds.low - self.compute.low, self.seconds.high - self.compute.high)
        return Band(value, min(value, *ends), max(value, *ends))


def overlap(pieces: Pieces, phase: Literal["prefill", "decode"], layers: int, microbatches: int) -> Overlapped:
    """Return the time of `layers` equal layers for one or two micro-batches, each with these pieces."""
    each = ({name: getattr(getattr(pieces, name), end) for name in PIECES} for end in ("low", "value", "high"))
    low, value, high = (finish(seconds, phase, layers, microbatches) for seconds in each)
    return Overlapped(seconds=Band(value, low, high), compute=layers * microbatches * pieces.compute)


def finish(seconds: Mapping[str, float], phase: Literal["prefill", "decode"], layers: int, microbatches: int) -> float:
    """Return when the last task of `layers` layers ends, in seconds.

    The times of a layer follow from those of the layer before. So once all tasks of a layer end by the same time after
    the same tasks of the layer before, every further layer adds that time too, and need not be simulated.
    """
    for fewer in TRIED:
        if fewer >= layers:
            break
        tasks = schedule(phase, fewer, microbatches)
        period = len(tasks) - len(schedule(phase, fewer - 1, microbatches))
        done = ends(seconds, tasks)
        end = len(done) - period - 2  # of the layers that are not the last
        gaps = [done[index] - done[index - period] for index in range(end - period, end)]
        if max(gaps) - min(gaps) <= 1e-12 * done[-1]:
            return max(done) + (layers - fewer) * gaps[0]
    return max(ends(seconds, schedule(phase, layers, microbatches)), default=0.0)


def ends(seconds: Mapping[str, float], tasks: tuple[Task, ...]) -> list[float]:
    """Return when each task ends. It starts when its resource has done the tasks before it and its inputs are there."""
    free = {"compute": 0.0, "network": 0.0}
    done: list[float] = []
    for resource, piece, after in tasks:
        start = free[resource]
        for index in after:
            if done[index] > start:
                start = done[index]
        free[resource] = start = start + seconds[piece]
        done.append(start)
    return done


@lru_cache(maxsize=256)
def schedule(phase: Literal["prefill", "decode"], layers: int, microbatches: int) -> tuple[Task, ...]:
    """Return the tasks of `layers` layers with experts, in the order of their resource."""
    assert microbatches in (1, 2), microbatches
    if layers == 0:
        return ()
    if microbatches == 1:
        return _alone(layers)
    return _prompts(layers) if phase == "prefill" else _decoding(layers)


class _List:
    """A list of tasks being made."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []

    def add(self, piece: str, *after: int) -> int:
        """Add a task, and return its place."""
        resource: Resource = "network" if piece in ("dispatch", "combine") else "compute"
        self.tasks.append(Task(resource, piece, tuple(index for index in after if index >= 0)))
        return len(self.tasks) - 1

    def send(self, piece: str, *after: int) -> int:
        """Add the kernel that issues messages and then the messages, and return their place."""
        return self.add(piece, self.add(f"issue_{piece}", *after))


def _alone(layers: int) -> tuple[Task, ...]:
    """Return the tasks of a single micro-batch: only shared experts run while tokens are sent."""
    tasks, combined = _List(), -1
    for _ in range(layers):
        attention = tasks.add("core", tasks.add("before", combined))
        dispatched = tasks.send("dispatch", attention)
        tasks.add("shared", attention)
        experts = tasks.add("experts", tasks.add("take_dispatch", dispatched))
        combined = tasks.add("take_combine", tasks.send("combine", experts))
    return tuple(tasks.tasks)


def _prompts(layers: int) -> tuple[Task, ...]:
    tasks, combined0, combined1 = _List(), -1, -1
    for layer in range(layers):
        attention1 = tasks.add("core", tasks.add("before", combined1))
        if layer:
            tasks.add("shared")  # of micro-batch 0 and the layer before
        dispatched1 = tasks.add("dispatch", attention1)
        attention0 = tasks.add("core", tasks.add("before", combined0))
        experts1 = tasks.add("experts", dispatched1)
        dispatched0 = tasks.add("dispatch", attention0)
        combined1 = tasks.add("combine", experts1)
        experts0 = tasks.add("experts", dispatched0)
        tasks.add("shared")  # of micro-batch 1
        combined0 = tasks.add("combine", experts0)
    tasks.add("shared")
    return tuple(tasks.tasks)


def _decoding(layers: int) -> tuple[Task, ...]:
    tasks, combined1 = _List(), -1
    attention0 = tasks.add("core", tasks.add("before"))
    for layer in range(layers):
        dispatched0 = tasks.send("dispatch", attention0)
        tasks.add("shared")
        if layer:
            combined1 = tasks.add("take_combine", combined1)
        before1 = tasks.add("before", combined1)
        experts0 = tasks.add("experts", tasks.add("take_dispatch", dispatched0))
        combined0 = tasks.send("combine", experts0)
        attention1 = tasks.add("core", before1)
        dispatched1 = tasks.send("dispatch", attention1)
        tasks.add("shared")
        taken0 = tasks.add("take_combine", combined0)
        before0 = tasks.add("before", taken0) if layer + 1 < layers else taken0
        experts1 = tasks.add("experts", tasks.add("take_dispatch", dispatched1))
        combined1 = tasks.send("combine", experts1)
        if layer + 1 < layers:
            attention0 = tasks.add("core", before0)
    tasks.add("take_combine", combined1)
    return tuple(tasks.tasks)
