"""One GPU: what it is, its own ceilings, kernel times without the host's, and the published shapes.

Times are of the GPU alone: it sleeps while the host enqueues, the cache is overwritten before each repetition, and
events stand around the work. The roofline of a row is the slower of its FLOP at the measured FP8 (or BF16) matrix
product rate and its bytes at the measured memory rate.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

PEAK_SIZE = 8192
MEMORY_BYTES = 1 << 30
CACHE_BYTES = 256 << 20  # several times the second-level cache
SLEEP_CYCLES = 2_000_000  # about a millisecond: longer than it takes to enqueue

# Weights [N, K] of DeepSeek-V3's products, and TFLOPS at M = 64, 128, 4096 on an H800 [DeepGEMM, March 2025]
WEIGHTS = {
    "q_a + kv_a": (2112, 7168, (206, 352, 1009)),
    "q_b": (24576, 1536, (289, 535, 1125)),
    "kv_b": (32768, 512, (219, 358, 751)),
    "o_proj": (7168, 16384, (336, 645, 1426)),
    "gate + up": (4096, 7168, (287, 533, 1265)),
    "down": (7168, 2048, (295, 510, 1168)),
}
ROWS = (64, 128, 4096)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Best of a few on this device."""

    bf16_flop_per_s: float
    fp8_flop_per_s: float
    memory_bytes_per_s: float  # read, or read and written

    def __str__(self) -> str:
        return (
            f"BF16 {self.bf16_flop_per_s / 1e12:.0f} TFLOPS, FP8 {self.fp8_flop_per_s / 1e12:.0f} TFLOPS,"
            f" memory {self.memory_bytes_per_s / 1e9:.0f} GB/s"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def summary(self) -> dict[str, Any]:
        return {
            "median_s": self.median,
            "min_s": min(self.seconds),
            "max_s": max(self.seconds),
            "repeats": len(self.seconds),
        }


def require_gpu(capability: tuple[int, int]) -> torch.device:
    """Ends the script with one line where there is no such GPU, or no Triton."""
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs an NVIDIA GPU, and torch sees none here; nothing was measured.")
    found = torch.cuda.get_device_capability()
    if found < capability:
        sys.exit(
            f"This benchmark needs compute capability {capability[0]}.{capability[1]} or later;"
            f" {torch.cuda.get_device_name()} has {found[0]}.{found[1]}; nothing was measured."
        )
    try:
        import triton
    except ImportError:
        sys.exit("This benchmark needs Triton, which comes with torch's CUDA builds; nothing was measured.")
    print(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, Triton {triton.__version__}", file=sys.stderr)
    return torch.device("cuda")


def describe_gpu() -> dict[str, Any]:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def measure_ceilings() -> Ceilings:
    left, right = (torch.randn(PEAK_SIZE, PEAK_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    narrow_left, narrow_right = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()
    one = torch.ones((), device="cuda")

    def fp8_product() -> Tensor:
        recipe = ScalingType.TensorWise
        return F.scaled_mm(narrow_left, narrow_right, one, recipe, one, recipe, use_fast_accum=True)

    flop = 2.0 * PEAK_SIZE**3
    source = torch.zeros(MEMORY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    read = source.nbytes / min(time_gpu(lambda: source.sum()).seconds)
    copied = 2 * source.nbytes / min(time_gpu(lambda: target.copy_(source)).seconds)
    return Ceilings(
        bf16_flop_per_s=flop / min(time_gpu(lambda: left @ right).seconds),
        fp8_flop_per_s=flop / min(time_gpu(fp8_product).seconds),
        memory_bytes_per_s=max(read, copied),
    )


def time_gpu(work: Callable[[], object], repeats: int = 20, warmup: int = 3) -> Times:
    """Seconds on the GPU of each of `repeats` runs, from a cache that holds none of the data."""
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(warmup):
        work()
    seconds = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        cache.zero_()
        start.record()  # type: ignore[no-untyped-call]
        work()
        end.record()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)  # type: ignore[no-untyped-call]
    return Times(seconds=seconds)


def reason(error: Exception) -> str:
    """What it says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:240]
