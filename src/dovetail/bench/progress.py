"""Shows on stderr how far a measurement is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dovetail.bench.outcome import Outcome


class Watch:
    """Told of every outcome; shows requests done, failures and tokens per second so far."""

    def __init__(
        self,
        requests: int,
        console: Console | None = None,
        line_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requests, self._line_seconds, self._clock = requests, line_seconds, clock
        self._console = console or Console(stderr=True, highlight=False)
        self._done = self._failed = 0
        self._tokens = 0.0
        self._shown_at = -math.inf
        self._bar: Progress | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("", total=requests)

    def __enter__(self) -> Watch:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def hear(self, outcome: Outcome) -> None:
        self._done += 1
        self._failed += outcome.error is not None
        self._tokens += outcome.generated_tokens
        rate = f"{self._tokens / outcome.end:.0f} tokens/s" if outcome.end else ""
        text = f"{rate}, {self._failed} failed" if self._failed else rate
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=text)
        elif self._clock() - self._shown_at >= self._line_seconds or self._done == self._requests:
            self._shown_at = self._clock()
            self.say(f"{self._done} of {self._requests} requests done, {text}")
