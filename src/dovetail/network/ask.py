"""Answers to a `Question`: a collective on each fabric, whole and with what fails, sizes and GPU counts one by one.

All-to-all with sprayed packets, among all GPUs of some leaves and with nothing failing, is folded by symmetry
(`network.symmetry`); everything else is simulated flow by flow. What would take more than about 4 GiB is refused before
anything is run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dovetail.catalog.fabrics import resized
from dovetail.network.answer import Answer, Case, CutOff, FabricSummary, Run
from dovetail.network.contention import contend, window_of
from dovetail.network.delivery import Delivery, deliver, empty_seconds, most_messages
from dovetail.network.demands import Step
from dovetail.network.failures import NotThereError
from dovetail.network.flows import Flows
from dovetail.network.jobs import Task, amounts_of, check_task, num_flows, task_of
from dovetail.network.link_use import link_uses
from dovetail.network.memory import needed_bytes
from dovetail.network.price import bill
from dovetail.network.question import Question, build_fabrics, changes_of, check_gpus
from dovetail.network.routing import Ecmp, route
from dovetail.network.simulation import Change
from dovetail.network.symmetry import classes_of, folded_all_to_all, simulate_folded
from dovetail.network.topology import Fabric, build

MOST_BYTES = 4 * 2**30
_NAMED = 8  # GPUs cut off that are named


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """What is simulated for each size."""

    question: Question
    fabric: Fabric
    gpus: int
    trials: list[tuple[Change, ...]]  # what fails in each; none where nothing does
    lacks: str  # the part that is to fail and that this fabric has not; "": none
    folded_as: Fabric | None  # whose classes of GPUs are those of the job; None: flow by flow


def ask(question: Question) -> Answer:
    """Simulate all that is asked. Raises ValueError, one line, for what `question` has wrong, and for what would need
    more than 4 GiB of memory."""
    fabrics = build_fabrics(question)
    for fabric in fabrics:
        for gpus in question.gpu_counts:
            for name in _names(question):
                check_task(question, name, fabric, check_gpus(fabric, gpus))
    changes = _changes(question, fabrics)
    jobs = [
        _job(question, fabric, check_gpus(fabric, gpus), failing)
        for fabric, failing in zip(fabrics, changes, strict=True)
        for gpus in question.gpu_counts
    ]
    cases = [_case(job, amount) for job in jobs for amount in amounts_of(question)]
    return Answer(question=question, fabrics=tuple(map(_summary, fabrics)), cases=tuple(cases))


def _changes(question: Question, fabrics: list[Fabric]) -> list[list[tuple[Change, ...]] | str]:
    """Of each fabric what fails in each trial, or the part to fail that it has not. Raises ValueError where no fabric
    has all of them."""
    trials = range(question.trials if question.has_failures else 0)
    found: list[list[tuple[Change, ...]] | str] = []
    missing: list[NotThereError] = []
    for fabric in fabrics:
        try:
            found.append([changes_of(question, fabric, trial) for trial in trials])
        except NotThereError as error:
            found.append(error.part)
            missing.append(error)
    if missing and len(missing) == len(fabrics):
        raise missing[0]
    return found


def _summary(fabric: Fabric) -> FabricSummary:
    priced = bill(fabric)
    return FabricSummary(
        name=fabric.name,
        endpoints=fabric.endpoints,
        dollars_per_endpoint=priced.dollars_per_endpoint,
        price_basis=priced.basis.source,
    )


def _job(question: Question, fabric: Fabric, gpus: int, failing: list[tuple[Change, ...]] | str) -> Job:
    """Raises ValueError for more memory than is allowed."""
    folds = question.collective == "all-to-all" and question.routing == "adaptive"
    folded_as = _folds_as(fabric, gpus) if folds else None
    lacks, trials = (failing, []) if isinstance(failing, str) else ("", failing)
    job = Job(question=question, fabric=fabric, gpus=gpus, trials=trials, lacks=lacks, folded_as=folded_as)
    _check_memory(job)
    return job


def _folds_as(fabric: Fabric, gpus: int) -> Fabric | None:
    """A fabric of `gpus` whose GPUs are alike just where the first `gpus` of this one are; None where there is none."""
    alike = classes_of(fabric).gpu_class
    if gpus % fabric.gpus_per_node or len(np.unique(alike[:gpus])) == gpus:
        return None
    if gpus == fabric.endpoints:
        return fabric
    try:
        smaller = build(resized(fabric.spec, endpoints=gpus))
    except ValueError:
        return None
    alike_there = classes_of(smaller).gpu_class
    is_whole = not np.isin(alike[gpus:], alike[:gpus]).any()
    pairs = len(np.unique(np.column_stack([alike[:gpus], alike_there]), axis=0))
    is_same = pairs == len(np.unique(alike[:gpus])) == len(np.unique(alike_there))
    return smaller if is_whole and is_same else None


def _check_memory(job: Job) -> None:
    flows = _flows(job, job.gpus)
    if job.folded_as is not None and not job.trials and job.question.beside is None:
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
    return sum(num_flows(job.question, name, job.fabric, gpus) for name in _names(job.question))


def _names(question: Question) -> list[str]:
    """The collective, and what runs beside it."""
    return [question.collective, *(question.other[:1] if question.other else ())]


def _needed(job: Job, gpus: int, flows: int) -> float:
    has_two_routes = job.question.beside is not None
    has_two_routes |= any(change.seconds > 0 for changes in job.trials for change in changes)
    return needed_bytes(job.fabric, gpus, flows, job.question.policy, has_two_routes)


def _case(job: Job, amount: float) -> Case:
    question, fabric = job.question, job.fabric
    task = None
    if job.folded_as is None or job.trials or question.other:
        task = task_of(question, question.collective, fabric, job.gpus, amount)
    healthy = _folded(job, amount) if job.folded_as is not None else _simulated(job, task, ())
    failed = tuple(_simulated(job, task, changes) for changes in job.trials)
    first = job.trials[0] if job.trials else ()
    lost = np.unique(np.concatenate([np.zeros(0, np.int32), *(change.links for change in first)]) // 2)
    end = failed[0].seconds if failed and failed[0].is_complete else np.inf
    contention = None
    if task and question.other:
        name, much = question.other
        other = task_of(question, name, fabric, job.gpus, much).demand
        contention = contend(fabric, question.policy, task.demand, other, much)
    return Case(
        fabric=fabric.name,
        gpus=job.gpus,
        size=task.demand.size if task else amount,
        healthy=healthy,
        failed=failed,
        cables_lost=len(lost),
        late_failures=sum(change.seconds >= end for change in first),
        lacks=job.lacks,
        experts=task.copies if task else None,
        contention=contention,
    )


def _folded(job: Job, size: float) -> Run:
    assert job.folded_as is not None
    folded = folded_all_to_all(job.folded_as, size)
    result = simulate_folded(job.fabric, folded)
    # Of the longest path; all shortest ones between two leaves are as long, so one of them will do.
    latencies = route(job.fabric, folded.flows, Ecmp()).latency
    of_one = Step(flows=Flows.of(np.zeros(job.gpus, np.int32), np.arange(job.gpus), 0.0))
    _, latency = empty_seconds(job.fabric, folded.flows, latencies, most_messages(job.fabric, of_one))
    seconds = max(result.seconds, latency)
    rate = size / seconds if seconds else 0.0
    return Run(
        seconds=seconds,
        latency_seconds=latency,
        algorithm_bandwidth=rate,
        bus_bandwidth=rate * (job.gpus - 1) / job.gpus,
        flows=len(folded.flows),
        is_folded=True,
        links=link_uses(job.fabric, result.link_bytes, seconds),
        cut_off=CutOff(),
    )


def _simulated(job: Job, task: Task | None, changes: tuple[Change, ...]) -> Run:
    assert task is not None
    question, fabric, demand = job.question, job.fabric, task.demand
    delivery = deliver(
        fabric,
        demand,
        question.policy,
        changes=changes,
        window=window_of(fabric, question.policy, demand),
        reroute_seconds=question.reroute_seconds,
    )
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
