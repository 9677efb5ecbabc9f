"""Makes the schedules 1F1B, interleaved and zero-bubble ZB1P, and any schedule by its name.

Their idle times are in `planner.training.bubbles`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from dovetail.parallel.schedules.dualpipe import dualpipe, dualpipev
from dovetail.parallel.schedules.schedule import Action, Schedule

SCHEDULES = ("1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev")


@lru_cache(maxsize=128)  # about a megabyte each
def make_schedule(name: str, ranks: int, microbatches: int, chunks: int = 2) -> Schedule:
    """Make the schedule `name` (one of `SCHEDULES`) for `ranks` ranks; `chunks` is used only by "interleaved".

    Raises ValueError for an unknown name or illegal sizes, with the nearest legal ones.
    """
    if name == "interleaved":
        return interleaved(ranks, microbatches, chunks)
    makers = {"1f1b": one_f_one_b, "zb1p": zero_bubble, "dualpipe": dualpipe, "dualpipev": dualpipev}
    if name not in makers:
        raise ValueError(f"no schedule {name!r}; there are {', '.join(SCHEDULES)}")
    return makers[name](ranks, microbatches)


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    """Make 1F1B [PipeDream-Flush, Megatron]: rank r runs PP-1-r forwards, then one forward and one backward in turn.

    Rank r holds at most PP-r activations. Raises ValueError for sizes below 1.
    """
    _check_sizes(ranks, microbatches)
    actions = []
    for rank in range(ranks):
        backwards = [(Action("B", index, rank),) for index in range(microbatches)]
        actions.append(_in_turn(rank, ranks, backwards))
    return Schedule(
        name="1f1b",
        microbatches=microbatches,
        placement=(tuple(range(ranks)),),
        actions=tuple(actions),
        activation_limit=tuple(min(ranks - rank, microbatches) for rank in range(ranks)),
    )


def interleaved(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """Make interleaved 1F1B [arXiv 2104.04473]: rank r holds the `chunks` stages r, r + PP, ...

    Micro-batches go in rounds of PP through one chunk after the other. Raises ValueError unless `microbatches` is a
    multiple of `ranks`.
    """
    _check_sizes(ranks, microbatches)
    if chunks < 1:
        raise ValueError(f"interleaved: chunks = {chunks}: a rank holds at least 1 stage")
    if microbatches % ranks:
        nearest = max(1, round(microbatches / ranks)) * ranks
        raise ValueError(
            f"interleaved: microbatches = {microbatches} is not a multiple of {ranks} ranks; nearest: {nearest}"
        )
    work = chunks * microbatches
    visits = [  # (round of PP micro-batches, chunk, micro-batch of the round), first to last
        (start + index, chunk)
        for start in range(0, microbatches, ranks)
        for chunk in range(chunks)
        for index in range(ranks)
    ]
    actions, limits = [], []
    for rank in range(ranks):
        ahead = min((chunks - 1) * ranks + 2 * (ranks - 1 - rank), work)
        forwards = [Action("F", index, chunk * ranks + rank) for index, chunk in visits]
        backwards = [Action("B", index, (chunks - 1 - chunk) * ranks + rank) for index, chunk in visits]
        steps = forwards[:ahead]
        for turn, backward in enumerate(backwards):
            steps += forwards[ahead + turn : ahead + turn + 1]
            steps.append(backward)
        actions.append(tuple(steps))
        limits.append(min(ahead + 1, work))
    return Schedule(
        name="interleaved",
        microbatches=microbatches,
        placement=(tuple(stage % ranks for stage in range(ranks * chunks)),),
        actions=tuple(actions),
        activation_limit=tuple(limits),
    )


def zero_bubble(ranks: int, microbatches: int) -> Schedule:
    """Make ZB1P (ZB-H1) [arXiv 2401.10241]: 1F1B with every backward split; rank r postpones W by r micro-batches.

    The idle time at the end of 1F1B is filled with W, and every rank holds up to PP activations. Raises ValueError for
    sizes below 1.
    """
    _check_sizes(ranks, microbatches)
    actions = []
    for rank in range(ranks):
        late = [(Action("W", index - rank, rank),) if index >= rank else () for index in range(microbatches)]
        backwards = [(Action("I", index, rank), *late[index]) for index in range(microbatches)]
        rest = (Action("W", index, rank) for index in range(max(0, microbatches - rank), microbatches))
        actions.append((*_in_turn(rank, ranks, backwards), *rest))
    return Schedule(
        name="zb1p",
        microbatches=microbatches,
        placement=(tuple(range(ranks)),),
        actions=tuple(actions),
        activation_limit=(min(ranks, microbatches),) * ranks,
    )


def _in_turn(rank: int, ranks: int, backwards: Sequence[tuple[Action, ...]]) -> tuple[Action, ...]:
    """Return PP-1-r forwards, then in turn one forward and what `backwards` has for one micro-batch."""
    microbatches = len(backwards)
    ahead = min(ranks - 1 - rank, microbatches)
    steps = [Action("F", index, rank) for index in range(ahead)]
    for index, backward in enumerate(backwards):
        if index + ahead < microbatches:
            steps.append(Action("F", index + ahead, rank))
        steps += backward
    return tuple(steps)


def _check_sizes(ranks: int, microbatches: int) -> None:
    if ranks < 1 or microbatches < 1:
        raise ValueError(f"ranks = {ranks}, microbatches = {microbatches}: a pipeline needs at least 1 of each")
