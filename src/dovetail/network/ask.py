"""Answers to a `Question`: a collective on each fabric, whole and with what fails, sizes and GPU counts one by one.

    algorithm bandwidth  size / time                      bus bandwidth  that x (n - 1) / n, twice it for all-reduce
    latency share        time of an empty message / time  price          of the whole fabric, per GPU and per GB/s of
                                                                         bus bandwidth that a GPU gets

All-to-all with sprayed packets, among all GPUs of some leaves and with nothing failing, is folded by symmetry
(`network.symmetry`); everything else is simulated flow by flow. What would take more than about 4 GiB is refused before
anything is run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dovetail.catalog.fabrics import resized
from dovetail.network import demands
from dovetail.network.delivery import Delivery, deliver
from dovetail.network.flows import Flows
from dovetail.network.link_use import LinkUse, link_uses
from dovetail.network.memory import needed_bytes
from dovetail.network.price import bill
from dovetail.network.question import Question, build_fabrics, changes_of, check_gpus
from dovetail.network.routing import Ecmp, route
from dovetail.network.simulation import Change
from dovetail.network.symmetry import classes_of, folded_all_to_all, simulate_folded
from dovetail.network.topology import Fabric, build

MOST_BYTES = 4 * 2**30
_NAMED = 8  # GPUs cut off that are named


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
    flows: int
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
class Case:
    """One fabric, number of GPUs and size. `failed` is None where nothing fails."""

    fabric: str
    gpus: int
    size: float  # bytes
    healthy: Run
    failed: Run | None
    cables_lost: int
    late_failures: int  # that came only when all had arrived

    @property
    def bandwidth_lost(self) -> float | None:
        """Share of the bus bandwidth that failures take; None without any, and where something is cut off."""
        if self.failed is None or not self.failed.is_complete or not self.healthy.bus_bandwidth:
            return None
        return 1 - self.failed.bus_bandwidth / self.healthy.bus_bandwidth

    @property
    def time_added(self) -> float | None:
        """Share of the healthy time that failures add; None as above."""
        if self.failed is None or not self.failed.is_complete or not self.healthy.seconds:
            return None
        return self.failed.seconds / self.healthy.seconds - 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """What is simulated for each size."""

    question: Question
    fabric: Fabric
    gpus: int
    changes: tuple[Change, ...]
    folded_as: Fabric | None  # whose classes of GPUs are those of the job; None: flow by flow


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


def ask(question: Question) -> Answer:
    """Simulate all that is asked. Raises ValueError, one line, for what `question` has wrong, and for what would need
    more than 4 GiB of memory."""
    fabrics = build_fabrics(question)
    changes = [changes_of(question, fabric) for fabric in fabrics]
    jobs = [
        _job(question, fabric, check_gpus(fabric, gpus), failing)
        for fabric, failing in zip(fabrics, changes, strict=True)
        for gpus in question.gpu_counts
    ]
    cases = [_case(job, size) for job in jobs for size in question.sizes]
    return Answer(question=question, fabrics=tuple(map(_summary, fabrics)), cases=tuple(cases))


def _summary(fabric: Fabric) -> FabricSummary:
    priced = bill(fabric)
    return FabricSummary(
        name=fabric.name,
        endpoints=fabric.endpoints,
        dollars_per_endpoint=priced.dollars_per_endpoint,
        price_basis=priced.basis.source,
    )


def _job(question: Question, fabric: Fabric, gpus: int, changes: tuple[Change, ...]) -> Job:
    """Raises ValueError for more memory than is allowed."""
    folds = question.collective == "all-to-all" and question.routing == "adaptive"
    folded_as = _folds_as(fabric, gpus) if folds else None
    job = Job(question=question, fabric=fabric, gpus=gpus, changes=changes, folded_as=folded_as)
    _check_memory(job)
    return job


def _folds_as(fabric: Fabric, gpus: int) -> Fabric | None:
    """A fabric of `gpus` whose GPUs are alike just where the first `gpus` of this one are; None where there is none."""
    if gpus == fabric.endpoints:
        return fabric
    if gpus % fabric.gpus_per_node:
        return None
    try:
        smaller = build(resized(fabric.spec, endpoints=gpus))
    except ValueError:
        return None
    if fabric.planes != smaller.planes or fabric.gpus_per_node != smaller.gpus_per_node:
        return None
    alike, alike_there = classes_of(fabric).gpu_class, classes_of(smaller).gpu_class
    is_whole = not np.isin(alike[gpus:], alike[:gpus]).any()
    pairs = len(np.unique(np.column_stack([alike[:gpus], alike_there]), axis=0))
    is_same = pairs == len(np.unique(alike[:gpus])) == len(np.unique(alike_there))
    return smaller if is_whole and is_same else None


def _check_memory(job: Job) -> None:
    flows = _flows(job, job.gpus)
    if job.folded_as is not None and not job.changes:
        flows = len(np.unique(classes_of(job.folded_as).gpu_class)) ** 2
    needed, fitting = _needed(job, job.gpus, flows), job.gpus
    if needed <= MOST_BYTES:
        return
    while _needed(job, fitting, _flows(job, fitting)) > MOST_BYTES:
        fitting //= 2
    question, folds = job.question, ""
    if question.collective == "all-to-all" and job.folded_as is None:
        folds = ", or adaptive routing among all GPUs of some leaves and without failures, which is folded"
    raise ValueError(
        f"{question.collective} among {job.gpus} GPUs of {job.fabric.name} is {flows:,} flows and would need about "
        f"{needed / 2**30:,.1f} GiB, more than {MOST_BYTES / 2**30:.0f}: --gpus {fitting} can be simulated{folds}"
    )


def _flows(job: Job, gpus: int) -> int:
    if job.question.collective == "all-to-all":
        return gpus**2
    return gpus * (job.question.channels or job.fabric.gpus_per_node)


def _needed(job: Job, gpus: int, flows: int) -> float:
    is_rerouted = any(change.seconds > 0 for change in job.changes)
    return needed_bytes(job.fabric, gpus, flows, job.question.policy, is_rerouted)


def _case(job: Job, size: float) -> Case:
    healthy = _folded(job, size) if job.folded_as is not None else _simulated(job, size, ())
    failed = _simulated(job, size, job.changes) if job.changes else None
    lost = np.unique(np.concatenate([np.zeros(0, np.int32), *(change.links for change in job.changes)]) // 2)
    end = failed.seconds if failed is not None and failed.is_complete else np.inf
    return Case(
        fabric=job.fabric.name,
        gpus=job.gpus,
        size=size,
        healthy=healthy,
        failed=failed,
        cables_lost=len(lost),
        late_failures=sum(change.seconds >= end for change in job.changes),
    )


def _folded(job: Job, size: float) -> Run:
    assert job.folded_as is not None
    folded = folded_all_to_all(job.folded_as, size)
    result = simulate_folded(job.fabric, folded)
    # Of the longest path; all shortest ones between two leaves are as long, so one of them will do.
    latency = float(route(job.fabric, folded.flows, Ecmp()).latency.max(initial=0.0))
    rate = size / result.seconds if result.seconds else 0.0
    return Run(
        seconds=result.seconds,
        latency_seconds=latency,
        algorithm_bandwidth=rate,
        bus_bandwidth=rate * (job.gpus - 1) / job.gpus,
        flows=len(folded.flows),
        is_folded=True,
        links=link_uses(job.fabric, result.link_bytes, result.seconds),
        cut_off=CutOff(),
    )


def _simulated(job: Job, size: float, changes: tuple[Change, ...]) -> Run:
    question, fabric, gpus = job.question, job.fabric, job.gpus
    channels = question.channels or fabric.gpus_per_node
    demand = demands.collective(question.collective, range(gpus), size, fabric.gpus_per_node, channels)
    delivery = deliver(fabric, demand, question.policy, changes=changes, reroute_seconds=question.reroute_seconds)
    return Run(
        seconds=delivery.seconds,
        latency_seconds=delivery.latency_seconds,
        algorithm_bandwidth=delivery.algorithm_bandwidth,
        bus_bandwidth=delivery.bus_bandwidth,
        flows=sum(len(step.flows) for step in demand.steps),
        is_folded=False,
        links=link_uses(fabric, delivery.link_bytes, delivery.seconds),
        cut_off=_cut_off(delivery.cut_off, _delivered_share(delivery)),
    )


def _delivered_share(delivery: Delivery) -> float:
    if delivery.is_complete or not delivery.outcomes:
        return 1.0
    last = delivery.outcomes[-1].delivered
    meant = delivery.demand.steps[-1].flows.bytes
    return float(last.sum() / meant.sum()) if meant.sum() else 0.0


def _cut_off(flows: Flows, delivered_share: float) -> CutOff:
    """The GPU with most flows that are cut off first, then that of those left."""
    left, named = flows, []
    while len(left) and len(named) < _NAMED:
        worst = int(np.argmax(np.bincount(np.concatenate([left.source, left.destination]))))
        named.append(worst)
        left = left.take((left.source != worst) & (left.destination != worst))
    return CutOff(
        flows=len(flows),
        gpus=tuple(sorted(named)),
        has_more_gpus=len(left) > 0,
        delivered_share=delivered_share,
    )
