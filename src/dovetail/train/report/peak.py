"""Measures the machine's rate of matrix products, which MFU is a share of.

A busy machine, or one whose clock rises, is slower at one moment than at the next. So the rate is the best of several
shapes over some time, it is measured again as the run goes on, and a step that was faster than all of them raises it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

Shape = tuple[int, int, int]  # rows, columns of the left matrix, columns of the right one

SECONDS = 0.3
AGAIN_EVERY, AGAIN_SECONDS = 60.0, 0.05


def measure_peak(
    dtype: torch.dtype, device: torch.device, shapes: Sequence[Shape] = (), seconds: float = SECONDS
) -> float:
    """FLOP/s of the best product in about `seconds`, of square matrices and of `shapes`; each runs twice at least."""
    sizes = (4096, 8192) if device.type == "cuda" else (1024, 2048)
    best = 0.0
    everything = [*shapes, *((size, size, size) for size in sizes)]
    for rows, inner, columns in everything:
        left, right = (torch.ones(shape, dtype=dtype, device=device) for shape in ((rows, inner), (inner, columns)))
        stop, times = time.perf_counter() + seconds / len(everything), list[float]()
        while len(times) < 2 or time.perf_counter() < stop:
            start = time.perf_counter()
            left @ right
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        best = max(best, 2 * rows * inner * columns / min(times))
    return best


class Peak:
    """The best rate seen so far: `measure(seconds)` gives one, and is asked again every minute."""

    def __init__(self, measure: Callable[[float], float], clock: Callable[[], float] = time.monotonic) -> None:
        self._measure, self._clock = measure, clock
        self._best, self._measured_at = measure(SECONDS), clock()

    def share(self, flop_per_s: float) -> float:
        """Return what share of the peak a rate is: at most 1, for a higher rate than any before is the peak from then
        on."""
        if self._clock() - self._measured_at >= AGAIN_EVERY:
            self._best = max(self._best, self._measure(AGAIN_SECONDS))
            self._measured_at = self._clock()
        self._best = max(self._best, flop_per_s)
        return flop_per_s / self._best
