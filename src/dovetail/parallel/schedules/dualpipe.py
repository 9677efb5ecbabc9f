"""Makes the schedules DualPipe and DualPipeV.

In DualPipe micro-batches enter the pipeline from both ends. With h = PP/2, r the distance of a rank from its near end
and n micro-batches per direction, a rank runs eight phases; direction "near" enters at its end, "far" at the other [V3
§3.2.1, DualPipe repository]:

    1  2(h-r-1)     F near                       5  h-r-1    B far, {F far & B near}
    2  r+1          F near, F far                6  r+1      B far, B near; from the middle on only I, W put off
    3  h-r-1        I far, W, F far              7  h-r-1    W, I near
    4  n-PP+r+1     {F near & B far},            8  r+1      W
                    {F far & B near}

{..} run overlapped, except the very first pair on the two middle ranks, which would only delay its neighbours. Ws run
in the order of their Is. If all stages take the same time the bubble is (PP/2 - 1) (FB + B - 3 W), where FB is the time
of a pair; DualPipe needs twice the parameters and PP+1 activations [V3 Table 2].

DualPipeV folds one half of DualPipe's ranks onto the other: rank r holds stages r and 2h-1-r, which are its near and
far ones, and all micro-batches enter at rank 0.
"""

from __future__ import annotations

from collections import deque

from dovetail.parallel.schedules.schedule import Action, Kind, Pair, Schedule, Step

NEAR, FAR = 0, 1


def dualpipe(ranks: int, microbatches: int) -> Schedule:
    """Make DualPipe for `ranks` = PP ranks with PP stages, each of which is held twice.

    The second half of the micro-batches enters at the last rank, as direction 1. Raises ValueError unless `ranks` and
    `microbatches` are even and `microbatches` is at least 2 PP.
    """
    _check_even("ranks", ranks)
    _check_even("microbatches", microbatches)
    _check_enough("dualpipe", microbatches, 2 * ranks)
    half, per_direction = ranks // 2, microbatches // 2
    actions = []
    for rank in range(ranks):
        distance = min(rank, ranks - 1 - rank)
        ends = (rank, 0, 0), (ranks - 1 - rank, 1, per_direction)
        near, far = ends if rank < half else reversed(ends)
        actions.append(_phases(_Rank(near, far), distance, half, per_direction - ranks + distance + 1))
    return Schedule(
        name="dualpipe",
        microbatches=microbatches,
        placement=(tuple(range(ranks)), tuple(reversed(range(ranks)))),
        actions=tuple(actions),
        activation_limit=(ranks + 1,) * ranks,
    )


def dualpipev(ranks: int, microbatches: int) -> Schedule:
    """Make DualPipeV for `ranks` ranks with twice as many stages, two per rank [DualPipe repository].

    Raises ValueError unless `microbatches` is at least 2 `ranks`.
    """
    if ranks < 1:
        raise ValueError(f"dualpipev: ranks = {ranks}: a pipeline needs at least 1")
    _check_enough("dualpipev", microbatches, 2 * ranks)
    stages = 2 * ranks
    actions = []
    for rank in range(ranks):
        writer = _Rank((rank, 0, 0), (stages - 1 - rank, 0, 0))
        actions.append(_phases(writer, rank, ranks, microbatches - stages + rank + 1))
    return Schedule(
        name="dualpipev",
        microbatches=microbatches,
        placement=(tuple(min(stage, stages - 1 - stage) for stage in range(stages)),),
        actions=tuple(actions),
        activation_limit=(stages + 1,) * ranks,
    )


class _Rank:
    """The steps of one rank as they are made; it counts micro-batches and postponed Ws."""

    def __init__(self, near: tuple[int, int, int], far: tuple[int, int, int]) -> None:
        self.places = near, far  # (stage, direction, first micro-batch)
        self.next_forward = [0, 0]
        self.next_backward = [0, 0]
        self.put_off: deque[Action] = deque()
        self.steps: list[Step] = []

    def forward(self, side: int) -> None:
        self.steps.append(self._next("F", side))

    def backward(self, side: int, is_split: bool = False) -> None:
        action = self._next("I" if is_split else "B", side)
        self.steps.append(action)
        if is_split:
            self.put_off.append(Action("W", action.microbatch, action.stage, action.direction))

    def pair(self, forward_side: int, backward_side: int) -> None:
        self.steps.append(Pair(self._next("F", forward_side), self._next("B", backward_side)))

    def weight(self) -> None:
        self.steps.append(self.put_off.popleft())

    def _next(self, kind: Kind, side: int) -> Action:
        stage, direction, first = self.places[side]
        counter = self.next_forward if kind == "F" else self.next_backward
        counter[side] += 1
        return Action(kind, first + counter[side] - 1, stage, direction)


def _phases(rank: _Rank, distance: int, half: int, main: int) -> tuple[Step, ...]:
    """Return the eight phases of a rank `distance` from its near end; `main` is the number of steps in phase 4."""
    inner, is_middle = half - distance - 1, distance == half - 1
    for _ in range(2 * inner):
        rank.forward(NEAR)
    for _ in range(distance + 1):
        rank.forward(NEAR)
        rank.forward(FAR)
    for _ in range(inner):
        rank.backward(FAR, is_split=True)
        rank.weight()
        rank.forward(FAR)
    for turn in range(main):
        if turn == 0 and is_middle:
            rank.forward(NEAR)
            rank.backward(FAR)
        else:
            rank.pair(NEAR, FAR)
        rank.pair(FAR, NEAR)
    for _ in range(inner):
        rank.backward(FAR)
        rank.pair(FAR, NEAR)
    for turn in range(2 * (distance + 1)):  # the first distance + 1 of these 2 (distance + 1) backwards are whole
        rank.backward(NEAR if turn % 2 else FAR, is_split=turn > distance)
    for _ in range(inner):
        rank.weight()
        rank.backward(NEAR, is_split=True)
    for _ in range(distance + 1):
        rank.weight()
    assert not rank.put_off
    return tuple(rank.steps)


def _check_even(name: str, value: int) -> None:
    if value < 2 or value % 2:
        nearest = "2" if value < 3 else f"{value - 1} or {value + 1}"
        raise ValueError(f"dualpipe: {name} = {value}: both ends do the same, so it is even; nearest: {nearest}")


def _check_enough(name: str, microbatches: int, least: int) -> None:
    if microbatches < least:
        raise ValueError(f"{name}: {microbatches} micro-batches do not fill the pipeline; it takes at least {least}")
