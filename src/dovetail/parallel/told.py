"""What a rank has sent, worked and waited in a step, and what each tells all others at its end.

Work is timed on the clock, from the reading of a batch to the sums of gradients and without the waits for other ranks.
It is not the processor's time: so a rank counts as slow too whose machine is busy with other things, or waits for a
disk.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist

from dovetail.parallel.traffic import Traffic
from dovetail.parallel.turns import Turns, Waited


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """Of one rank, at the end of a step."""

    sent: Traffic  # in the step
    expected: Traffic  # likewise, before it was known
    sent_in_steps: Traffic  # since the process began
    expected_in_steps: Traffic
    sent_beside: Traffic  # likewise, and not in steps: to measure held-out text
    waited: Waited  # in the step
    worked: float  # seconds of the step
    memory: float  # bytes, the most that the rank has taken


class Account:
    """This rank's. `sent` is what it has sent so far."""

    def __init__(self, sent: Callable[[], Traffic], turns: Turns, device: torch.device) -> None:
        self._sent, self._turns, self._device = sent, turns, device
        self._before: Traffic | None = None  # sent until the step began that is under way
        self._in_steps, self._expected, self._expected_in_steps = Traffic(), Traffic(), Traffic()
        self._began, self._worked = time.perf_counter(), 0.0

    def begin(self) -> None:
        """A step begins."""
        self._began, self._before, self._turns.waited = time.perf_counter(), self._sent(), Waited()

    def expect(self, expected: Traffic) -> None:
        """What the step is to send."""
        self._expected = expected

    def end_work(self) -> None:
        """What follows in the step is done together."""
        self._worked = time.perf_counter() - self._began - self._turns.waited.total

    def tell(self) -> list[Told]:
        """What all ranks tell, by their number; they call it together. Ends the step, if there is one."""
        sent, expected = Traffic(), Traffic()
        if self._before is not None:
            sent, expected, self._before = self._sent() - self._before, self._expected, None
        self._in_steps += sent
        self._expected_in_steps += expected
        beside = self._sent() - self._in_steps
        parts = (sent, expected, self._in_steps, self._expected_in_steps, beside, self._turns.waited)
        said = [*sum(map(astuple, parts), ()), self._worked, _most_memory(self._device)]
        numbers = torch.tensor(said, dtype=torch.float64, device=self._device)
        rows = numbers.new_empty(dist.get_world_size(), len(said))
        dist.all_gather(list(rows), numbers)
        return [_told(row) for row in rows.tolist()]


def _told(row: list[float]) -> Told:
    pairs = (Traffic(*map(round, row[place : place + 2])) for place in range(0, 10, 2))
    sent, expected, in_steps, expected_in_steps, beside = pairs
    return Told(
        sent=sent,
        expected=expected,
        sent_in_steps=in_steps,
        expected_in_steps=expected_in_steps,
        sent_beside=beside,
        waited=Waited(*row[10:-2]),
        worked=row[-2],
        memory=row[-1],
    )


def _most_memory(device: torch.device) -> float:
    """Bytes: of this process, or of its GPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts KiB
