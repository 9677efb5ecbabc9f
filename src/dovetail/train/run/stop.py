"""Why a run stops before its end, and the signals for it, to be looked at between two steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Diverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that was not finite."""


class Interrupted(RuntimeError):
    """Ctrl-C or SIGTERM; the run is saved and can go on."""


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that a step is never cut in two; the second one stops at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
