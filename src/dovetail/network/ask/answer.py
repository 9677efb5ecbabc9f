"""What came of a `Question`: each collective on each fabric, whole and with what fails.

algorithm bandwidth  size / time                      bus bandwidth  that x (n - 1) / n, twice it for all-reduce
latency share        time of an empty message / time  price          of the whole fabric, per GPU and per GB/s of
                                                                     bus bandwidth that a GPU gets

Of dispatch and combine the size is that of a GPU's tokens, each counted once, and bus bandwidth goes by it.
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
    """What is never delivered; empty where all is."""

    flows: int = 0
    gpus: tuple[int, ...] = ()  # without which nothing would be cut off, as far as they are named
    has_more_gpus: bool = False
    delivered_share: float = 1.0  # of the bytes of the step in which it happened


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One collective on one fabric in one state. Bandwidths are bytes/s, and 0 where it is not delivered."""

    seconds: float  # until all that arrives has
    latency_seconds: float
    algorithm_bandwidth: float
    bus_bandwidth: float
    flows: int  # simulated; 0: told from the loads of links
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
    """Of a share over trials."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One fabric, number of GPUs and size."""

    fabric: str
    gpus: int
    size: float  # bytes
    healthy: Run
    failed: tuple[Run, ...]  # one for each trial; empty where nothing fails
    cables_lost: int  # in each
    late_failures: int  # that came only when all had arrived, of the first trial
    lacks: str = ""  # what was to fail and this fabric has not, such as "plane 3"; then `failed` is empty
    experts: ExpertCopies | None = None  # of dispatch and combine
    contention: Contention | None = None  # with what runs beside it

    def counted_bandwidth(self, run: Run) -> float | None:
        """Bytes/s of dispatch and combine as DeepEP's benchmarks count copies; None of others and where cut off."""
        if self.experts is None or not run.is_complete or not run.seconds:
            return None
        return self.experts.counted_bytes / run.seconds

    @property
    def num_cut_off(self) -> int:
        """Trials in which something was never delivered."""
        return sum(not run.is_complete for run in self.failed)

    @property
    def bandwidth_lost(self) -> Spread | None:
        """Share of the bus bandwidth that failures take, in trials that cut nothing off; None where there are none."""
        whole = self.healthy.bus_bandwidth
        return _spread([1 - run.bus_bandwidth / whole for run in self.failed if run.is_complete and whole])

    @property
    def time_added(self) -> Spread | None:
        """Share of the time of the whole fabric that failures add; None as above."""
        whole = self.healthy.seconds
        return _spread([run.seconds / whole - 1 for run in self.failed if run.is_complete and whole])


def _spread(shares: Sequence[float]) -> Spread | None:
    return Spread(mean=sum(shares) / len(shares), low=min(shares), high=max(shares)) if shares else None


@dataclass(frozen=True, slots=True, kw_only=True)
class FabricSummary:
    """What does not depend on size and GPUs."""

    name: str
    endpoints: int
    dollars_per_endpoint: float
    price_basis: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    question: Question
    fabrics: tuple[FabricSummary, ...]
    cases: tuple[Case, ...]  # fabric by fabric

    def dollars_per_rate(self, case: Case) -> float | None:
        """Dollars per GB/s of bus bandwidth of all GPUs, each having as much as those that take part; None for 0."""
        rate = case.healthy.bus_bandwidth
        return self.summary(case).dollars_per_endpoint / rate * 1e9 if rate else None

    def summary(self, case: Case) -> FabricSummary:
        return next(each for each in self.fabrics if each.name == case.fabric)
