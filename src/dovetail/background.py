"""Runs a long call of foreign code so that Ctrl-C is heard and progress is reported.

Python acts on a signal only between its own instructions, and a library's call in C or Rust may take minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Event, Thread
from typing import TypeVar

Result = TypeVar("Result")

REPORT_SECONDS = 10.0
PATIENCE_SECONDS = 1.0  # after Ctrl-C, for a thread that is in Python code and sees that it is to stop


def in_background(work: Callable[[Event], Result], on_wait: Callable[[], None]) -> Result:
    """Return `work(stopped)`, which runs in a thread; every ten seconds of waiting `on_wait` is called.

    Ctrl-C is raised here at once. `stopped` is set then, for the parts of `work` that can look at it; the thread is no
    longer waited for, and ends with the process.
    """
    outcome: Future[Result] = Future()
    stopped = Event()

    def run() -> None:
        try:
            outcome.set_result(work(stopped))
        except BaseException as error:
            outcome.set_exception(error)

    thread = Thread(target=run, daemon=True)
    try:
        thread.start()  # Ctrl-C may come as early as in here
        while True:
            thread.join(REPORT_SECONDS)
            if not thread.is_alive():
                return outcome.result()
            on_wait()
    except BaseException:
        stopped.set()
        wait([outcome], PATIENCE_SECONDS)
        raise
