"""Measures the machine's rate of matrix products, which MFU is a share of."""

from __future__ import annotations

import time

import torch

SIZE = 2048
REPEATS = 4


def measure_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the best of a few SIZE x SIZE x SIZE products; takes a fraction of a second."""
    left, right = (torch.randn(SIZE, SIZE, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * SIZE**3 / best
