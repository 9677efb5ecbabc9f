"""How `dovetail.calibrate` times operations on one rank and exchanges between ranks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dovetail.spec.hardware import Link
from dovetail.spec.measurements import Estimate

if TYPE_CHECKING:  # which loads the model
    from dovetail.calibrate.work import Work

ROUNDS = 3
LEAST_RUNS = 4  # of an operation in a round
DISPATCHES = 20  # in a GPU's queue for one timing
SMALL, LARGE = 1 << 10, 16 << 20  # bytes to each rank, of exchanges for latency and for bandwidth
EXCHANGES = 10


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of the runs of one operation. Other work on the machine only ever adds to them, so the fast ones are
    what the operation takes: the tenth percentile, in a band from the fastest to the median."""

    runs: tuple[float, ...]

    @property
    def value(self) -> float:
        return sorted(self.runs)[len(self.runs) // 10]

    @property
    def fastest(self) -> float:
        return min(self.runs)

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    def of_each(self, count: int) -> Times:
        """Of so many that run one after the other."""
        return Times(tuple(run / count for run in self.runs))

    def less(self, seconds: float) -> Times:
        """Without what runs in the course of it and is counted elsewhere; most of it stays."""
        return Times(tuple(max(run - seconds, run / 2) for run in self.runs))


def run_in_rounds(works: list[Work], seconds: float, device: torch.device) -> dict[str, Times]:
    """The runs of every operation by name: its part of what time is left, in each round, and LEAST_RUNS at least."""
    runs: dict[str, list[float]] = {work.name: [] for work in works}
    assert len(runs) == len(works), "two operations of one name"
    deadline = time.perf_counter() + seconds
    for turn, work in enumerate(works * ROUNDS):
        until = time.perf_counter() + (deadline - time.perf_counter()) / (ROUNDS * len(works) - turn)
        operation = work.prepare()
        operation()  # compiles, sets up, fills caches
        count = 0
        while count < LEAST_RUNS or time.perf_counter() < until:
            runs[work.name].append(_seconds_of(operation, device))
            count += 1
    return {name: Times(tuple(each)) for name, each in runs.items()}


def _seconds_of(operation: Callable[[], Any], device: torch.device) -> float:
    """One run; on a GPU the mean of several in its queue, without the host's waiting. One thread's own seconds of the
    processor are what it would take undisturbed; of several threads only the clock tells how they wait."""
    if device.type != "cuda":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        operation()
        return clock() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(DISPATCHES):
        operation()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / DISPATCHES


def microseconds(times: Times, source: str) -> Estimate:
    """What counts, from the fastest to the median."""
    return Estimate(value=times.value * 1e6, low=times.fastest * 1e6, high=times.median * 1e6, source=source)


def exchange_link(device: torch.device, ranks: int, source: str, size: int = LARGE) -> Link:
    """All-to-all among each `ranks` consecutive ranks by torch.distributed, which all ranks join: bandwidth one way per
    rank of a large exchange, latency of a small one."""
    group = None
    if ranks < dist.get_world_size():
        group, _ = dist.new_subgroups(ranks)  # type: ignore[no-untyped-call]
    small, large = (_exchange_times(device, group, ranks, each) for each in (SMALL, size))
    sent = size * (ranks - 1) / 1e9
    why = f"{source}: all-to-all of {{}} to each of {ranks} ranks over {dist.get_backend()}"
    achieved = Estimate(
        value=sent / large.value, low=sent / large.median, high=sent / large.fastest, source=why.format(f"{size} bytes")
    )
    # No datasheet is read: the fastest run is the link's bandwidth.
    return Link(gbs=achieved.high, achieved_gbs=achieved, latency_us=microseconds(small, why.format(f"{SMALL} bytes")))


def _exchange_times(device: torch.device, group: dist.ProcessGroup | None, ranks: int, size: int) -> Times:
    sent = torch.zeros(ranks * size, dtype=torch.uint8, device=device)
    received, runs = torch.empty_like(sent), list[float]()
    for run in range(EXCHANGES + 1):
        dist.barrier(group)
        start = time.perf_counter()
        dist.all_to_all_single(received, sent, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if run > 0:  # the first one connects
            runs.append(time.perf_counter() - start)
    return Times(tuple(runs))
