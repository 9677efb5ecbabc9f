"""Says how many threads a process may use, and has them wait for each other without wasting a core.

The command line calls `prepare` before torch is loaded, since OpenMP reads its settings when it is loaded. A program
of one's own does the same, first of all:

    from dovetail.threads import prepare
    prepare()
"""

from __future__ import annotations

import math
import os
from pathlib import Path

# An OpenMP thread that waits for the others first spins, then sleeps. libgomp spins some 300,000 rounds, milliseconds
# that are taken from the very thread it waits for when another process is on that core: a step then took 4 to 40
# times as long. Threads wait for 15 to 100 microseconds between the regions of one step, so this many rounds (some
# 75 microseconds) cost 1 to 4 % where nobody else wants the cores. benchmarks/beside.py measures both.
SPINS = 5_000

SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # what `prepare` looks at

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def prepare() -> None:
    """Set what OpenMP reads from the environment, where the user has not: the number of threads, and how they wait."""
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads()))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def num_threads() -> int:
    """OMP_NUM_THREADS; without it the cores of the affinity mask, or of the cgroup's CPU quota if that is fewer.

    Raises ValueError for an OMP_NUM_THREADS that is no number of threads.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # the first is for the outermost region
    if asked:
        if not asked.isdecimal() or int(asked) < 1:
            raise ValueError(f"OMP_NUM_THREADS = {asked!r}: give a number of threads from 1 on, or unset it")
        return int(asked)
    quota = _quota()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _quota() -> float | None:
    """CPUs that the process's cgroup, or one above it, may use; None for no limit."""
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return None
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "cpu", "cpu,cpuacct", "cpuacct,cpu"):
            continue
        own = (_CGROUPS / controllers / path.lstrip("/")).resolve()
        root = _CGROUPS / controllers
        # Inside a container the path is often the host's, and the container's own group is the root.
        for group in {root, *(each for each in (own, *own.parents) if each.is_relative_to(root))}:
            limit = _limit_v2(group) if controllers == "" else _limit_v1(group)
            limits += [] if limit is None else [limit]
    return min(limits, default=None)


def _limit_v2(group: Path) -> float | None:
    words = _words(group / "cpu.max")
    return float(words[0]) / float(words[1]) if len(words) == 2 and words[0] != "max" else None


def _limit_v1(group: Path) -> float | None:
    quota, period = (_words(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return float(quota[0]) / float(period[0]) if quota and period and float(quota[0]) > 0 else None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
