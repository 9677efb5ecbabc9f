"""Answers a question about networks by simulating the collective on each fabric.

It is simulated healthy and with failures, for each size and number of GPUs. An all-to-all with sprayed packets needs
only the loads of links on fabrics of one plane (`network.delivery.loads`), and is folded by symmetry where nodes are
alike (`network.delivery.symmetry`); everything else is simulated flow by flow. A question that would take more than
about 4 GiB is refused before anything is run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dovetail.network.ask.answer import Answer, Case, CutOff, FabricSummary, Run
from dovetail.network.ask.jobs import Task, amounts_of, check_task, num_flows, task_of
from dovetail.network.ask.question import Question, build_fabrics, changes_of, check_gpus
from dovetail.network.delivery.contention import contend, window_of
from dovetail.network.delivery.deliver import Delivery, deliver
from dovetail.network.delivery.loads import Loads, all_to_all_loads, has_loads
from dovetail.network.delivery.memory import MOST_BYTES, needed_bytes
from dovetail.network.delivery.symmetry import Classes, classes_of, folded_all_to_all, named_gpus, simulate_folded
from dovetail.network.fabric.price import bill
from dovetail.network.fabric.topology import Fabric
from dovetail.network.flows.failures import NotThereError
from dovetail.network.flows.flows import Flows
from dovetail.network.flows.link_use import link_uses
from dovetail.network.flows.simulation import Change

_NAMED = 8  # at most so many GPUs that are cut off are named


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """A collective on one fabric and number of GPUs, to be simulated for each size."""

    question: Question
    fabric: Fabric
    gpus: int
    trials: list[tuple[Change, ...]]  # the failures of each trial; empty if nothing fails
    lacks: str  # the part that is to fail and that this fabric lacks; "" if it lacks none
    # For the healthy fabric and for each trial: the loads, or the classes to fold flows by; None: flow by flow.
    ways: tuple[Loads | Classes | None, ...]

    @property
    def states(self) -> list[tuple[Change, ...]]:
        """The failures of each state: none, and then those of each trial."""
        return [(), *self.trials]


def ask(question: Question) -> Answer:
    """Simulate all that is asked. Raises ValueError, one line, for a mistake in `question`, and for a simulation that
    would need more than 4 GiB of memory."""
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
    """Return for each fabric the failures of each trial, or the name of a part that is to fail and that it lacks.
    Raises ValueError if no fabric has all of the parts."""
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
    """Prepare the simulation. Raises ValueError if it needs more memory than is allowed."""
    lacks, trials = (failing, []) if isinstance(failing, str) else ("", failing)
    job = Job(question=question, fabric=fabric, gpus=gpus, trials=trials, lacks=lacks, ways=())
    told = [_is_told(job, changes) for changes in job.states]
    _check_memory(job, told)
    pairs = list(zip(job.states, told, strict=True))
    loads = [all_to_all_loads(fabric, gpus, changes) if is_told else None for changes, is_told in pairs]
    _check_memory(job, [each is not None for each in loads])  # no loads if some are cut off: flows are needed
    ways = (each or _folds(job, gpus, changes) for each, changes in zip(loads, job.states, strict=True))
    return replace(job, ways=tuple(ways))


def _is_told(job: Job, changes: tuple[Change, ...]) -> bool:
    """Return whether the loads of links may be enough to know the time."""
    return job.question.is_sprayed_to_all and has_loads(job.fabric, job.gpus, changes)


def _folds(job: Job, gpus: int, changes: tuple[Change, ...]) -> Classes | None:
    """Return the classes to fold the flows among the first `gpus` by, or None if that makes them no fewer."""
    if not job.question.is_sprayed_to_all:
        return None
    classes = classes_of(job.fabric, changes, gpus)
    return classes if classes.num_flows < gpus * (gpus - 1) else None


def _check_memory(job: Job, told: list[bool]) -> None:
    """Raise ValueError if the simulation needs too much memory. `told` marks states that simulate no flows."""
    flows, needed = _needs(job, job.gpus, told)
    if needed <= MOST_BYTES:
        return
    fitting = job.gpus // 2
    while fitting > 2 and _needs(job, fitting, told)[1] > MOST_BYTES:
        fitting //= 2
    question, instead = job.question, ""
    if question.collective == "all-to-all" and question.routing != "adaptive":
        sprayed = replace(job, question=replace(question, routing="adaptive", queue_pairs=1))
        may_be_told = [_is_told(sprayed, changes) for changes in job.states]
        if _needs(sprayed, job.gpus, may_be_told)[1] <= MOST_BYTES:
            instead = ", or all with --routing adaptive"
    raise ValueError(
        f"{question.collective} among {job.gpus} GPUs of {job.fabric.name} is {flows:,} flows and would need about "
        f"{needed / 2**30:,.1f} GiB, more than {MOST_BYTES / 2**30:.0f}: --gpus {fitting} can be simulated{instead}"
    )


def _needs(job: Job, gpus: int, told: list[bool]) -> tuple[int, float]:
    """Return the most flows that are simulated at once, and the bytes for them."""
    question, fabric, needs = job.question, job.fabric, []
    each = [num_flows(question, name, fabric, gpus) for name in _names(question)]
    for changes, is_told in zip(job.states, told, strict=True):
        if is_told:
            continue
        classes = _folds(job, gpus, changes)
        flows = classes.num_flows if classes else each[0]
        needs.append((flows, needed_bytes(fabric, gpus, flows, question.policy, changes, classes)))
    if question.beside is not None:  # never folded, and routed twice: alone and together
        needs.append((sum(each), 2 * needed_bytes(fabric, gpus, sum(each), question.policy)))
    return max(needs, key=lambda need: need[1], default=(0, 0.0))


def _names(question: Question) -> list[str]:
    """Return the names of the collective and of what runs beside it."""
    return [question.collective, *(question.other[:1] if question.other else ())]


def _case(job: Job, amount: float) -> Case:
    question, fabric = job.question, job.fabric
    task = None
    if question.other or None in job.ways:
        task = task_of(question, question.collective, fabric, job.gpus, amount)
    healthy, *failed = (
        _run(job, task, amount, changes, way) for changes, way in zip(job.states, job.ways, strict=True)
    )
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
        failed=tuple(failed),
        cables_lost=len(lost),
        late_failures=sum(change.seconds >= end for change in first),
        lacks=job.lacks,
        experts=task.copies if task else None,
        contention=contention,
    )


def _run(job: Job, task: Task | None, amount: float, changes: tuple[Change, ...], way: Loads | Classes | None) -> Run:
    if isinstance(way, Loads):
        return _by_loads(job, amount, way)
    if way is not None:
        return _folded(job, amount, changes)
    assert task is not None
    return _simulated(job, task, changes)


def _by_loads(job: Job, size: float, loads: Loads) -> Run:
    part = size / job.gpus
    seconds = loads.seconds(part)
    rate = size / seconds if seconds else 0.0
    return Run(
        seconds=seconds,
        latency_seconds=loads.latency_seconds,
        algorithm_bandwidth=rate,
        bus_bandwidth=rate * (job.gpus - 1) / job.gpus,
        flows=0,
        is_folded=False,
        links=link_uses(job.fabric, loads.link_flows * part, seconds),
        cut_off=CutOff(),
    )


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


def _simulated(job: Job, task: Task, changes: tuple[Change, ...]) -> Run:
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
    """Name the GPU with the most flows that are cut off, then the one with the most of those left, and so on."""
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
