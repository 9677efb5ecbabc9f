"""Shows a run on stderr while it trains: a live panel on a terminal, plain lines elsewhere.

The same `Display` is given each step's metrics; what they look like is in `panel` and `line`, functions of the
metrics alone, so that both can be tested and drawn without a run.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dovetail.train.report.metrics import HeldOutMetrics, StepMetrics, WholeHeldOutMetrics
from dovetail.train.report.ranks import ranks_line

BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"  # one eighth to eight eighths of a character cell
PLAIN_BARS = "12345678"  # for a terminal that is not UTF-8
REFRESH_SECONDS = 0.2
LOSSES_SHOWN = 48
STEPS_TIMED = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """All that is on the screen at one moment."""

    title: str
    metrics: StepMetrics
    num_steps: int
    seconds_left: float
    losses: Sequence[float]  # the last ones, oldest first
    held_out: HeldOutMetrics | None = None


class Display:
    """Shows a run of `num_steps` steps on `console` (stderr); plain lines come every `line_seconds`."""

    def __init__(
        self,
        title: str,
        num_steps: int,
        console: Console | None = None,
        line_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self.num_steps = title, num_steps
        self.console = console or Console(stderr=True, highlight=False)
        self._line_seconds, self._clock = line_seconds, clock
        self._losses: deque[float] = deque(maxlen=LOSSES_SHOWN)
        self._step_seconds: deque[float] = deque(maxlen=STEPS_TIMED)
        self._held_out: HeldOutMetrics | None = None
        self._view: View | None = None  # the latest, if it is not on the screen yet
        self._shown_at = -math.inf
        self._live: Live | None = None
        self._panel: RenderableType = Text()
        self._work: tuple[str, float] | None = None  # what `progress` last heard of, and when it was shown
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            # No thread of its own: it would compete with the step, and nothing changes between two steps.
            # Warnings go above the panel; what is printed to a file or pipe as data must still get there.
            self._live = Live(console=self.console, auto_refresh=False, redirect_stdout=sys.stdout.isatty())
            self._live.start()

    def update(
        self, metrics: StepMetrics | HeldOutMetrics | WholeHeldOutMetrics, seconds_left: float | None = None
    ) -> None:
        """Take in a record, and show it if it is time. Time left is estimated from recent steps if not given."""
        if isinstance(metrics, WholeHeldOutMetrics):
            self._show()
            self.message(held_out_line(metrics))
            return
        if isinstance(metrics, HeldOutMetrics):
            self._held_out = metrics
            if self._live is None:
                self.message(held_out_line(metrics))
            return
        self._losses.append(metrics.loss)
        self._step_seconds.append(metrics.seconds)
        if seconds_left is None:
            seconds_left = median(self._step_seconds) * max(0, self.num_steps - metrics.step)
        self._view = View(
            title=self.title,
            metrics=metrics,
            num_steps=self.num_steps,
            seconds_left=seconds_left,
            losses=tuple(self._losses),
            held_out=self._held_out,
        )
        now, wait = self._clock(), REFRESH_SECONDS if self._live else self._line_seconds
        if now - self._shown_at >= wait:
            self._shown_at = now
            self._show()

    def progress(self, what: str, done: int, total: int) -> None:
        """Say how far a piece of work is: below the live panel until it is done, or in plain lines if it takes long."""
        now, share = self._clock(), f"{what}: {done / max(total, 1):.0%}"
        if self._work is None or self._work[0] != what:
            self._work = (what, now)
        if self._live is not None:
            rows = [self._panel] if done >= total else [self._panel, Text(share, "dim")]
            self._live.update(Group(*rows), refresh=True)
        elif now - self._work[1] >= self._line_seconds:
            self._work = (what, now)
            self.message(share)
        if done >= total:
            self._work = None

    def message(self, text: str) -> None:
        """A line that stays: above the live panel, or among the plain lines."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the last state on the screen. Call it however the run ends, or the cursor stays hidden."""
        self._show()
        if self._live is not None:
            self._live.stop()

    def _show(self) -> None:
        view, self._view = self._view, None
        if view is None:
            return
        if self._live is None:
            self.message(line(view))
        else:
            bars = BARS if self.console.encoding.startswith("utf") else PLAIN_BARS
            self._panel = panel(view, bars)
            self._live.update(self._panel, refresh=True)


def line(view: View) -> str:
    """One plain line."""
    now = view.metrics
    parts = [f"step {now.step}/{view.num_steps}", f"loss {now.loss:.4f}"]
    if now.mtp_losses:
        parts.append(f"mtp {_each(now.mtp_losses)}")
    parts += [f"{now.tokens_per_second:.0f} tokens/s", f"mfu {now.mfu:.1%}"]
    if now.max_vio:
        parts.append(f"maxvio {_mean(now.max_vio):.2f} (worst {max(now.max_vio):.2f})")
    parts += [f"lr {now.learning_rate:.2e}", f"grad {now.grad_norm:.2f}", f"batch {now.batch_size}"]
    if now.rank_memory:
        parts += ranks_line(now)
    if now.skipped:
        parts.append(f"skipped {now.skipped}")
    return "  ".join([*parts, f"{duration(view.seconds_left)} left"])


def held_out_line(metrics: HeldOutMetrics | WholeHeldOutMetrics) -> str:
    what = "all held-out text" if isinstance(metrics, WholeHeldOutMetrics) else "held out"
    return f"{what} after step {metrics.step}: loss {metrics.loss:.4f}, {metrics.bits_per_byte:.4f} bits/byte"


def panel(view: View, bars: str = BARS) -> RenderableType:
    """The live view. `bars` are characters of rising height."""
    now = view.metrics
    rows = Table.grid(padding=(0, 2), expand=True)
    for _ in range(3):
        rows.add_column(ratio=1)
    mtp = _each(now.mtp_losses) or "-"
    held_out = f"{view.held_out.bits_per_byte:.4f} bits/byte" if view.held_out else "-"
    rows.add_row(_cell("loss", f"{now.loss:.4f}", "bold"), _cell("MTP loss", mtp), _cell("held out", held_out))
    rate = f"{now.tokens_per_second:,.0f}"
    rows.add_row(_cell("tokens/s", rate), _cell("MFU", f"{now.mfu:.1%}"), _cell("tokens", f"{now.tokens:,}"))
    rows.add_row(
        _cell("learning rate", f"{now.learning_rate:.2e}"),
        _cell("gradient norm", f"{now.grad_norm:.3f}"),
        _cell("batch", f"{now.batch_size} sequences"),
    )
    rows.add_row(
        _cell("MTP weight", f"{now.mtp_weight:g}"),
        _cell("bias speed", f"{now.gamma:g}"),
        _cell("skipped", str(now.skipped), "bold red" if now.skipped else ""),
    )
    body: list[RenderableType] = [_progress(view), rows, _loss_row(view.losses, bars)]
    if now.max_vio:
        body.append(_max_vio_row(now.max_vio, bars))
    if now.rank_memory:
        body.append(Text("  ".join(ranks_line(now)), "dim"))
    return Panel(Group(*body), title=view.title, title_align="left", border_style="dim")


def spark(values: Sequence[float], low: float, high: float, bars: str = BARS) -> str:
    """One character of `bars` per value, the lowest at `low` and the highest at `high`; `?` for a NaN."""
    span = high - low or 1.0
    ranks = [0 if math.isnan(value) else int((value - low) / span * len(bars)) for value in values]
    clamped = [bars[min(max(rank, 0), len(bars) - 1)] for rank in ranks]
    return "".join("?" if math.isnan(value) else bar for value, bar in zip(values, clamped, strict=True))


def duration(seconds: float) -> str:
    """As 45s, 3m05s, 2h07m or 5d03h; a dash for what is not known."""
    if not math.isfinite(seconds):
        return "-"
    whole = max(0, round(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def _progress(view: View) -> RenderableType:
    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True, justify="right")
    step = f"step {view.metrics.step} of {view.num_steps}"
    bar = ProgressBar(total=view.num_steps, completed=view.metrics.step)
    row.add_row(Text(step, "bold"), bar, f"{duration(view.seconds_left)} left")
    return row


def _loss_row(losses: Sequence[float], bars: str) -> Text:
    finite = [loss for loss in losses if math.isfinite(loss)] or [0.0]
    curve = spark([loss if math.isfinite(loss) else math.nan for loss in losses], min(finite), max(finite), bars)
    return Text.assemble(("loss    ", "dim"), (curve, "cyan"), (f"  {min(finite):.2f} to {max(finite):.2f}", "dim"))


def _max_vio_row(max_vio: Sequence[float], bars: str) -> Text:
    # From 0 (every expert has its share) to 1 (one has twice its share); worse is off the scale.
    text = Text.assemble(("MaxVio  ", "dim"))
    for value in max_vio:
        text.append(spark([value], 0.0, 1.0, bars), "green" if value < 0.3 else "yellow" if value < 1.0 else "red")
    text.append(f"  mean {_mean(max_vio):.2f}, worst {max(max_vio):.2f}", "dim")
    return text


def _cell(name: str, value: str, style: str = "") -> Text:
    return Text.assemble((f"{name} ", "dim"), (value, style))


def _each(losses: Sequence[float]) -> str:
    return " ".join(f"{loss:.4f}" for loss in losses)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
