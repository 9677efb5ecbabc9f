"""Where a row was measured, with what, and the machine's own ceilings that floors are stated against."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dovetail.train.report.peak import measure_peak

MEGABYTES = 512  # of the arrays for memory rates: many times the last-level cache
REPEATS = 5
LIBRARIES = ("dovetail", "torch", "numba", "numpy", "transformers", "tokenizers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Best of a few, with all threads."""

    bf16_flop_per_s: float  # square BF16 matrix product
    read_bytes_per_s: float
    copy_bytes_per_s: float  # bytes read plus bytes written

    def __str__(self) -> str:
        return (
            f"BF16 GEMM {self.bf16_flop_per_s / 1e9:.0f} GFLOP/s, memory read {self.read_bytes_per_s / 1e9:.1f} GB/s,"
            f" copy {self.copy_bytes_per_s / 1e9:.1f} GB/s"
        )


def measure_ceilings() -> Ceilings:
    source = torch.ones(MEGABYTES * 250_000)  # FP32
    target = torch.empty_like(source)
    return Ceilings(
        bf16_flop_per_s=measure_peak(torch.bfloat16, torch.device("cpu")),
        read_bytes_per_s=source.nbytes / _best(lambda: source.sum()),
        copy_bytes_per_s=2 * source.nbytes / _best(lambda: target.copy_(source)),
    )


def provenance() -> dict[str, Any]:
    """What every row carries: device, date, commit, versions."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "has_bf16": bool(torch.cpu._is_avx512_bf16_supported()),  # type: ignore[no-untyped-call]
            "has_amx": bool(torch.cpu._is_amx_tile_supported()),  # type: ignore[no-untyped-call]
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
    }


def use_threads(threads: int | None) -> None:
    """For this process, and through the environment for those that it starts; None leaves them alone."""
    if threads is not None:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # torch and numba both read it at their start


def _best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _cpu_name() -> str:
    """Model name and, since virtual machines shorten that, family and model numbers."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in path.read_text().splitlines())
    fields = {key.strip(): value.strip() for key, _, value in lines}
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')} model {fields.get('model', '?')})"


def _commit() -> str:
    """Short hash, with + where the source differs from it; "unknown" outside a repository."""

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(Path(__file__).parent), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "../src") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
