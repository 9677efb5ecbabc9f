"""Answers to a `Question`: a collective on each fabric, whole and with what fails, sizes and GPU counts one by one.

All-to-all with sprayed packets is folded by symmetry (`network.symmetry`) where nodes are alike; everything else is
simulated flow by flow. What would take more than about 4 GiB is refused before anything is run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dovetail.network import demands
from dovetail.network.answer import Answer, Case, CutOff, FabricSummary, Run
from dovetail.network.delivery import Delivery, deliver
from dovetail.network.flows import Flows
from dovetail.network.link_use import link_uses
from dovetail.network.memory import needed_bytes
from dovetail.network.price import bill
from dovetail.network.question import Question, build_fabrics, changes_of, check_gpus
from dovetail.network.simulation import Change
from dovetail.network.symmetry import Classes, classes_of, folded_all_to_all, named_gpus, simulate_folded
from dovetail.network.topology import Fabric

MOST_BYTES = 4 * 2**30
_NAMED = 8  # GPUs cut off that are named


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """What is simulated for each size."""

    question: Question
    fabric: Fabric
    gpus: int
    trials: list[tuple[Change, ...]]  # what fails in each; none where nothing does


def ask(question: Question) -> Answer:
    """Simulate all that is asked. Raises ValueError, one line, for what `question` has wrong, and for what would need
    more than 4 GiB of memory."""
    fabrics = build_fabrics(question)
    changes = [
        [changes_of(question, fabric, trial) for trial in range(question.trials if question.has_failures else 0)]
        for fabric in fabrics
    ]
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


def _job(question: Question, fabric: Fabric, gpus: int, trials: list[tuple[Change, ...]]) -> Job:
    """Raises ValueError for more memory than is allowed."""
    job = Job(question=question, fabric=fabric, gpus=gpus, trials=trials)
    _check_memory(job)
    return job


def _folds(job: Job, gpus: int, changes: tuple[Change, ...]) -> Classes | None:
    """What the first `gpus` are folded by; None where that makes no flow less."""
    if job.question.collective != "all-to-all" or job.question.routing != "adaptive":
        return None
    classes = classes_of(job.fabric, changes, gpus)
    return classes if classes.num_flows < gpus * (gpus - 1) else None


def _check_memory(job: Job) -> None:
    flows, needed = _needs(job, job.gpus)
    if needed <= MOST_BYTES:
        return
    fitting = job.gpus // 2
    while fitting > 2 and _needs(job, fitting)[1] > MOST_BYTES:
        fitting //= 2
    question, folds = job.question, ""
    if question.collective == "all-to-all" and question.routing != "adaptive":
        sprayed = replace(job, question=replace(question, routing="adaptive", queue_pairs=1))
        folds = ", or all with adaptive routing, which is folded" if _needs(sprayed, job.gpus)[1] <= MOST_BYTES else ""
    raise ValueError(
        f"{question.collective} among {job.gpus} GPUs of {job.fabric.name} is {flows:,} flows and would need about "
        f"{needed / 2**30:,.1f} GiB, more than {MOST_BYTES / 2**30:.0f}: --gpus {fitting} can be simulated{folds}"
    )


def _needs(job: Job, gpus: int) -> tuple[int, float]:
    """Most flows that are simulated at once, and the bytes for them."""
    policy, needs = job.question.policy, []
    for changes in ((), *job.trials):
        classes = _folds(job, gpus, changes)
        flows = classes.num_flows if classes else _flows(job, gpus)
        needs.append((flows, needed_bytes(job.fabric, gpus, flows, policy, changes, classes)))
    return max(needs, key=lambda need: need[1])


def _flows(job: Job, gpus: int) -> int:
    if job.question.collective == "all-to-all":
        return gpus**2
    return gpus * (job.question.channels or job.fabric.gpus_per_node)


def _case(job: Job, size: float) -> Case:
    healthy, *failed = (_run(job, size, changes) for changes in ((), *job.trials))
    first = job.trials[0] if job.trials else ()
    lost = np.unique(np.concatenate([np.zeros(0, np.int32), *(change.links for change in first)]) // 2)
    end = failed[0].seconds if failed and failed[0].is_complete else np.inf
    return Case(
        fabric=job.fabric.name,
        gpus=job.gpus,
        size=size,
        healthy=healthy,
        failed=tuple(failed),
        cables_lost=len(lost),
        late_failures=sum(change.seconds >= end for change in first),
    )


def _run(job: Job, size: float, changes: tuple[Change, ...]) -> Run:
    return (_folded if _folds(job, job.gpus, changes) else _simulated)(job, size, changes)


def _folded(job: Job, size: float, changes: tuple[Change, ...]) -> Run:
    folded = folded_all_to_all(job.fabric, size, changes, job.gpus)
    result = simulate_folded(job.fabric, folded, changes, reroute_seconds=job.question.reroute_seconds)
    named, has_more = named_gpus(result, _NAMED)
    rate = size / result.seconds if result.seconds and not result.num_cut_off else 0.0
    return Run(
        seconds=result.seconds,
        latency_seconds=result.latency_seconds,
        algorithm_bandwidth=rate,
        bus_bandwidth=rate * (job.gpus - 1) / job.gpus,
        flows=len(folded.flows),
        is_folded=True,
        links=link_uses(job.fabric, result.link_bytes, result.seconds),
        cut_off=CutOff(
            flows=result.num_cut_off,
            gpus=tuple(sorted(named)),
            has_more_gpus=has_more,
            delivered_share=result.delivered_share,
        ),
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
    left = flows
    named: list[int] = []
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
