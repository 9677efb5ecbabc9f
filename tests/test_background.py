"""A long call of foreign code reports progress, hands on what it returns or raises, and hears Ctrl-C."""

import os
import signal
import time
from threading import Event, Thread

import pytest

from dovetail import background
from dovetail.background import in_background


def test_what_the_work_returns_or_raises_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "REPORT_SECONDS", 0.01)
    waits: list[int] = []
    assert in_background(lambda stopped: stopped.wait(0.1), lambda: waits.append(1)) is False
    assert waits
    with pytest.raises(ZeroDivisionError):
        in_background(lambda stopped: 1 / 0, lambda: None)


def test_ctrl_c_is_heard_while_the_work_goes_on() -> None:
    seen: list[Event] = []
    finished = Event()

    def work(stopped: Event) -> None:
        seen.append(stopped)
        Thread(target=lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        stopped.wait(60)
        finished.set()

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        in_background(work, lambda: None)
    assert time.monotonic() - start < 30 and seen[0].is_set() and finished.wait(30)
