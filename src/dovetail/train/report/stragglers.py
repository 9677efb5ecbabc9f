"""Names the ranks that the others wait for, step after step.

A rank is compared with the ranks that do the same work: those at its place in the pipeline, or all of them where it is
alone there. Over the last steps, the median of its seconds is set against the lower median of theirs: one slow step, of
a disk or of a compiler, counts for nothing, and of two ranks the faster one is the measure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median, median_low

from dovetail.train.report.metrics import StragglerMetrics

STEPS = 8  # that a rank has to be slow over
SLOW = 1.5  # times the median


class Stragglers:
    """Looks at each step of a run whose ranks stand in `pp` places of a pipeline."""

    def __init__(self, pp: int = 1) -> None:
        self._pp = pp
        self._steps: deque[Sequence[float]] = deque(maxlen=STEPS)
        self._named: set[int] = set()

    def look(self, step: int, seconds: Sequence[float]) -> list[StragglerMetrics]:
        """Those to be named after `step`, in which ranks worked for so many seconds; each is named once."""
        self._steps.append(seconds)
        if len(self._steps) < STEPS or len(seconds) < 2:
            return []
        usual = [median(each) for each in zip(*self._steps, strict=True)]
        width = len(usual) // self._pp
        found = []
        for rank, own in enumerate(usual):
            place = rank // width * width
            like = usual[place : place + width] if width > 1 else usual
            ratio = own / max(median_low(like), 1e-9)
            if ratio >= SLOW and rank not in self._named:
                self._named.add(rank)
                found.append(StragglerMetrics(step=step, rank=rank, ratio=ratio, seconds=own))
        return found


def straggler_line(metrics: StragglerMetrics) -> str:
    return f"straggler: rank {metrics.rank}, {metrics.ratio:.1f} x the median"
