"""Two pieces of work take turns: while the exchange of one is under way, the other computes.

    first    computes  posts a | waits               computes  posts b | waits
    second                     | computes  posts c                     | waits for c, computes

Only one of the two runs at any time, and it gives the turn away where it would wait for an exchange. So the order of
exchanges depends on nothing but the two pieces, and is the same on all ranks that do the same. Each piece has a thread
and with it a stack of its own, which is why neither has to be written in parts: a backward pass gives the turn away in
the middle of autograd.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition
from typing import Protocol, TypeVar

from dovetail.numerics.cpu.kernels import use_threads_of_torch

First = TypeVar("First")
Second = TypeVar("Second")
Result = TypeVar("Result")


class UnderWay(Protocol):
    """An exchange that has been posted, such as a `torch.distributed.Work`."""

    def wait(self) -> object: ...


@dataclass(slots=True)
class Waited:
    """Seconds for which a rank computed nothing, by what it waited for.

    On a GPU they are the host's, which waits for less: exchanges there are put in line behind the work.
    """

    stages: float = 0.0  # hidden states or their gradients from another stage, and its end: the bubble
    experts: float = 0.0  # rows on their way to experts or back
    gradients: float = 0.0  # sums of gradients and the gathering of weights, with the copies that they need

    @property
    def total(self) -> float:
        return self.stages + self.experts + self.gradients


class Turns:
    """Whose turn it is. Outside `both` nobody else is there, and `await_exchange` simply waits."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._turn = 0  # of the two pieces
        self._at_work = 0  # how many pieces have not ended
        self._has_failed = False
        self._thread: ThreadPoolExecutor | None = None
        self.waited = Waited()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Add the time within to `waited`, under that field."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self.waited, what, getattr(self.waited, what) + time.perf_counter() - start)

    def both(self, first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]:
        """The results of both; `first` begins. Where one raises, the other is left where it stands, and that error is
        raised here."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, initializer=use_threads_of_torch)
        self._turn, self._at_work, self._has_failed = 0, 2, False
        other = self._thread.submit(self._piece, 1, second)
        try:
            mine = self._piece(0, first)
        except _LeftError:
            return other.result()  # which raises
        finally:
            wait([other])
        return mine, other.result()

    def await_exchange(self, work: UnderWay) -> None:
        """Wait for an exchange that the piece whose turn it is has posted; meanwhile it is the other's turn."""
        if self._at_work == 2:
            with self._changed:
                mine = self._turn
                self._give_away(mine)
                self._changed.wait_for(lambda: self._turn == mine)
                if self._has_failed:
                    raise _LeftError
        with self.waiting("experts"):
            work.wait()

    def _piece(self, number: int, function: Callable[[], Result]) -> Result:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == number)
        try:
            if self._has_failed:
                raise _LeftError
            return function()
        except BaseException:
            self._has_failed = True
            raise
        finally:
            with self._changed:
                self._at_work -= 1
                self._give_away(number)

    def _give_away(self, number: int) -> None:
        self._turn = 1 - number
        self._changed.notify_all()


class _LeftError(Exception):
    """The other piece has failed."""
