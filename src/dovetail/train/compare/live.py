"""Shows a running comparison on stderr: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable
from statistics import median

from rich.console import Console
from rich.live import Live
from rich.text import Text

from dovetail.train.compare.gap import percent, smooth
from dovetail.train.compare.pairs import Pair
from dovetail.train.report.display import REFRESH_SECONDS, STEPS_TIMED, duration

STEPS_SMOOTHED = 60  # 0.9 to the power of these is next to nothing


class CompareDisplay:
    """Shows `num_seeds` seeds of `num_steps` pairs of steps on `console` (stderr), where A and B have `names`."""

    def __init__(
        self,
        num_seeds: int,
        num_steps: int,
        names: tuple[str, str],
        is_paired: bool = True,
        console: Console | None = None,
        line_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_seeds, self.num_steps, self.is_paired = num_seeds, num_steps, is_paired
        self.console = console or Console(stderr=True, highlight=False)
        self._line_seconds, self._clock = line_seconds, clock
        self._differences: deque[float] = deque(maxlen=STEPS_SMOOTHED)
        self._pair_seconds: deque[float] = deque(maxlen=STEPS_TIMED)
        self._shown_at = -math.inf
        self._live: Live | None = None
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(console=self.console, auto_refresh=False, redirect_stdout=sys.stdout.isatty())
            self._live.start()
        self.message(f"A: {names[0]}; B: {names[1]}")

    def update(self, pair: Pair, num_done: int) -> None:
        """Take in a pair of the seed that comes after `num_done` whole ones; show it if it is time."""
        if pair.step == 1:
            self._differences.clear()
        self._differences.append(pair.difference if self.is_paired else math.nan)
        self._pair_seconds.append(sum(side.seconds for side in (pair.a, pair.b) if side is not None))
        now, wait = self._clock(), REFRESH_SECONDS if self._live else self._line_seconds
        if now - self._shown_at < wait and pair.step < self.num_steps:
            return
        self._shown_at = now
        pairs_left = (self.num_seeds - num_done) * self.num_steps - pair.step
        gap = float(smooth(self._differences)[-1])
        text = line(pair, num_done + 1, self.num_seeds, self.num_steps, gap, median(self._pair_seconds) * pairs_left)
        if self._live is None:
            self.message(text)
        else:
            self._live.update(Text(text), refresh=True)

    def message(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Call it however the comparison ends, or the cursor stays hidden."""
        if self._live is not None:
            self._live.stop()


def line(pair: Pair, number: int, num_seeds: int, num_steps: int, gap: float, seconds_left: float) -> str:
    """One plain line; `number` counts seeds from 1, `gap` is smoothed, and NaN where there is none."""
    parts = [f"seed {pair.seed} ({number}/{num_seeds})", f"step {pair.step}/{num_steps}"]
    parts += [f"{name} {side.loss:.4f}" for name, side in (("A", pair.a), ("B", pair.b)) if side is not None]
    parts += [] if math.isnan(gap) else [f"difference {percent(gap)}"]
    parts += [f"{name} {1000 * side.seconds:.0f} ms" for name, side in (("A", pair.a), ("B", pair.b)) if side]
    return "  ".join([*parts, f"{duration(seconds_left)} left"])
