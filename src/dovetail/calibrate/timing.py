"""Times operations on one rank, and exchanges between ranks."""

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

if TYPE_CHECKING:  # work loads the model
    from dovetail.calibrate.work import Work

ROUNDS = 3
LEAST_RUNS = 4  # runs of an operation in a round, at least
DISPATCHES = 20  # runs in a GPU's queue for one timing
SMALL, LARGE = 1 << 10, 16 << 20  # bytes to each rank, for the latency and for the bandwidth of an exchange
EXCHANGES = 10


@dataclass(frozen=True, slots=True)
class Times:
    """The seconds of each run of one operation.

    Other work on the machine can only add to them, so the fast runs show what the operation takes: `value` is the
    tenth percentile, and its band goes from the fastest run to the median.
    """

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
        """Return the times of one operation, where `count` of them ran one after the other."""
        return Times(tuple(run / count for run in self.runs))

    def less(self, seconds: float) -> Times:
        """Return the times without `seconds` of work that is counted elsewhere, but at least half of each."""
        return Times(tuple(max(run - seconds, run / 2) for run in self.runs))


def run_in_rounds(works: list[Work], seconds: float, device: torch.device) -> dict[str, Times]:
    """Run the operations in turn, in ROUNDS rounds, and return the times of each by its name.

    In each round an operation runs for its part of the time that is left, and at least LEAST_RUNS times.
    """
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
    """Return the seconds of one run; on a GPU the mean of several runs in its queue.

    On a CPU with one thread these are seconds of processor time, so that other processes do not count. With several
    threads it is the time on the clock, because processor time does not show how long they wait for each other.
    """
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
    """Return the value that counts in microseconds, in a band from the fastest run to the median."""
    return Estimate(value=times.value * 1e6, low=times.fastest * 1e6, high=times.median * 1e6, source=source)


def exchange_link(device: torch.device, ranks: int, source: str, size: int = LARGE) -> Link:
    """Time all-to-alls of torch.distributed within every `ranks` consecutive ranks; all ranks must call this.

    The bandwidth, one way per rank, is that of a large exchange, the latency that of a small one.
    """
    group = None
    if ranks < dist.get_world_size():
        group, _ = dist.new_subgroups(ranks)  # type: ignore[no-untyped-call]
    small, large = (_exchange_times(device, group, ranks, each) for each in (SMALL, size))
    sent = size * (ranks - 1) / 1e9
    why = f"{source}: all-to-all of {{}} to each of {ranks} ranks over {dist.get_backend()}"
    achieved = Estimate(
        value=sent / large.value, low=sent / large.median, high=sent / large.fastest, source=why.format(f"{size} bytes")
    )
    # No datasheet is read, so the link's own bandwidth is taken from the fastest run.
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
        if run > 0:  # the first run connects the ranks
            runs.append(time.perf_counter() - start)
    return Times(tuple(runs))
