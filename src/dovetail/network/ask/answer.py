"""The answer to a question about networks: times, bandwidths and prices, healthy and with failures.

    algorithm bandwidth  size / time
    bus bandwidth        algorithm bandwidth x (n - 1) / n for n GPUs, twice that for an all-reduce
    latency share        time of empty messages / time
    price                of the whole fabric, per GPU, and per GB/s of bus bandwidth that a GPU gets

For dispatch and combine the size is that of a GPU's tokens, each counted once, and bus bandwidth is based on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dovetail.network.ask.expert_traffic import ExpertCopies
from dovetail.network.ask.question import Question
from dovetail.network.delivery.contention import Contention
from dovetail.network.flows.link_use import LinkUse


@dataclass(frozen=True, slots=True, kw_only=True)
class CutOff:
    """The flows that are never delivered; empty if all are."""

    flows: int = 0
    gpus: tuple[int, ...] = ()  # some of the GPUs without which nothing would be cut off
    has_more_gpus: bool = False  # whether there are more of them
    delivered_share: float = 1.0  # of the bytes of the step in which flows were cut off


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One collective on one fabric in one state. Bandwidths are bytes/s, and 0 if flows are cut off."""

    seconds: float  # until everything that arrives has arrived
    latency_seconds: float
    algorithm_bandwidth: float
    bus_bandwidth: float
    flows: int  # number simulated; 0 if the time follows from the loads of links
    is_folded: bool
    links: tuple[LinkUse, ...]
    cut_off: CutOff

    @property
    def is_complete(self) -> bool:
        return not self.cut_off.flows

    @property
    def latency_share(self) -> float:
        return self.latency_seconds / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A share's mean and range over trials."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The results for one fabric, number of GPUs and size."""

    fabric: str
    gpus: int
    size: float  # bytes
    healthy: Run
    failed: tuple[Run, ...]  # one for each trial; empty if nothing fails
    cables_lost: int  # in each trial
    late_failures: int  # failures of the first trial that came only after everything had arrived
    lacks: str = ""  # the part that was to fail and that this fabric lacks, such as "plane 3"; then `failed` is empty
    experts: ExpertCopies | None = None  # for dispatch and combine
    contention: Contention | None = None  # if something runs at the same time

    def counted_bandwidth(self, run: Run) -> float | None:
        """Return the bytes/s of dispatch or combine as DeepEP's benchmarks count copies, or None.

        None is for other collectives, and if flows are cut off.
        """
        if self.experts is None or not run.is_complete or not run.seconds:
            return None
        return self.experts.counted_bytes / run.seconds

    @property
    def num_cut_off(self) -> int:
        """The number of trials in which something was never delivered."""
        return sum(not run.is_complete for run in self.failed)

    @property
    def bandwidth_lost(self) -> Spread | None:
        """The share of the bus bandwidth that failures take, over the trials that cut nothing off; None if none do."""
        whole = self.healthy.bus_bandwidth
        return _spread([1 - run.bus_bandwidth / whole for run in self.failed if run.is_complete and whole])

    @property
    def time_added(self) -> Spread | None:
        """The time that failures add, as a share of the healthy fabric's time; None as above."""
        whole = self.healthy.seconds
        return _spread([run.seconds / whole - 1 for run in self.failed if run.is_complete and whole])


def _spread(shares: Sequence[float]) -> Spread | None:
    return Spread(mean=sum(shares) / len(shares), low=min(shares), high=max(shares)) if shares else None


@dataclass(frozen=True, slots=True, kw_only=True)
class FabricSummary:
    """The figures of a fabric that do not depend on the size and the number of GPUs asked for."""

    name: str
    endpoints: int
    dollars_per_endpoint: float
    price_basis: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    question: Question
    fabrics: tuple[FabricSummary, ...]
    cases: tuple[Case, ...]  # those of the first fabric, then those of the next

    def dollars_per_rate(self, case: Case) -> float | None:
        """Return the fabric's dollars per GB/s of bus bandwidth that a GPU gets; None if that is 0."""
        rate = case.healthy.bus_bandwidth
        return self.summary(case).dollars_per_endpoint / rate * 1e9 if rate else None

    def summary(self, case: Case) -> FabricSummary:
        return next(each for each in self.fabrics if each.name == case.fabric)
