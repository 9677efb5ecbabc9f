"""Decides, step by step, whether several threads share a short step or one does it alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numba

PROBE = 6  # steps that are timed, by one thread and by all in turn
PAUSE = 0.25  # least seconds between probes,
SHARE = 50  # which take at most one part in so many of the time


class Sharing:
    """All threads, or one alone where that was faster of late.

    A step of a small model has some twenty regions of 10 microseconds. All threads are faster on a quiet machine.
    Beside a busy process each region waits for a thread that is not running, and one thread is up to 50 times as fast.
    Timing may decide here, since the kernels of steps give the same bits for any number of threads.
    """

    def __init__(self) -> None:
        self.threads = self.most = numba.get_num_threads()
        self._rows = 0
        self._times: list[float] = []
        self._next_probe = 0.0

    @contextmanager
    def of_step(self, rows: int) -> Iterator[None]:
        """Run a step of so many rows within this."""
        if self.most == 1:
            yield
            return
        begin = time.perf_counter()
        is_probed = begin >= self._next_probe
        if is_probed:
            if rows != self._rows:
                self._rows, self._times = rows, []
            self.threads = (self.most, 1)[len(self._times) % 2]
        numba.set_num_threads(self.threads)
        try:
            yield
        finally:
            numba.set_num_threads(self.most)
        if is_probed:
            self._times.append(time.perf_counter() - begin)
            if len(self._times) == PROBE:
                self._decide()

    def _decide(self) -> None:
        together, alone = min(self._times[0::2]), min(self._times[1::2])
        self.threads = self.most if together <= alone else 1
        self._next_probe = time.perf_counter() + max(PAUSE, SHARE * sum(self._times))
        self._times = []
