"""All layouts of a training job on a cluster, and which of them are worth having.

Every legal layout is estimated without a schedule (`training.estimate`), those that do not fit in memory are dropped,
and the fastest are evaluated whole. The front is Pareto's over the step's time, the largest memory of a rank and what
the run costs: nothing in the list is beaten in all three.

Powers of two are tried for every degree, and multiples of them where the number of GPUs has other factors. TP is tried
within a node only. Schedules that split micro-batches over both directions or over chunks are tried where they divide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dovetail.cost.rank_memory import pipeline_memory
from dovetail.parallel.pipelines import SCHEDULES
from dovetail.planner.chunks import Costs, Workload
from dovetail.planner.training import RUNTIME_BYTES, TrainingGoal, TrainingPlan, estimate, evaluate
from dovetail.spec.layout import Layout, ScheduleName, check_layout
from dovetail.spec.model import ModelSpec

FINALISTS = 12  # that are evaluated whole
MICROBATCH_SIZES = (1, 2, 4)  # sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layout with what the estimate gives; `memory` is the most bytes that a rank needs."""

    work: Workload
    seconds: float
    memory: float

    @property
    def gpu_seconds(self) -> float:
        return self.seconds * self.work.layout.gpus

    @property
    def fits(self) -> bool:
        return self.memory + RUNTIME_BYTES <= self.work.cluster.gpu.memory_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search came back with: plans from the fastest on, Pareto's front among all that fit."""

    tried: int
    fitting: int
    plans: tuple[TrainingPlan, ...]
    front: tuple[Candidate, ...]
    smallest: Candidate | None  # the layout that needs the least memory, where none fits


def layouts(spec: ModelSpec, gpus: int, gpus_per_node: int, batch: int) -> Iterator[Layout]:
    """Every legal layout on exactly `gpus` GPUs for a step of `batch` sequences."""
    experts = spec.moe.n_routed_experts if spec.moe else 1
    for pp in (each for each in _divisors(gpus) if each <= spec.num_hidden_layers):
        for tp in (each for each in _divisors(gpus // pp) if each <= gpus_per_node):
            dp = gpus // (pp * tp)
            for ep in (each for each in _divisors(dp * tp) if experts % each == 0):
                for size in MICROBATCH_SIZES:
                    if batch % (dp * size):
                        continue
                    for schedule in SCHEDULES if pp > 1 else ("1f1b",):
                        layout = Layout(
                            pp=pp,
                            tp=tp,
                            ep=ep,
                            dp=dp,
                            microbatches=batch // (dp * size),
                            microbatch_size=size,
                            schedule=_name(schedule),
                        )
                        if _is_legal(layout, spec):
                            yield layout


def search(work: Workload, goal: TrainingGoal, gpus: int | None = None) -> Found:
    """The best layouts for `work.spec` on `gpus` GPUs (None: all) of `work.cluster`; `work.layout` is not looked at.

    Raises ValueError where no layout is legal: the batch does not divide, say.
    """
    return search_all([work], goal, gpus)


def search_all(works: Sequence[Workload], goal: TrainingGoal, gpus: int | None = None) -> Found:
    """The same over several models or recipes on one cluster, as `vary` makes them."""
    candidates: list[Candidate] = []
    costs_of = [Costs() for _ in works]
    for index, work in enumerate(works):
        count = gpus or work.cluster.gpus
        for layout in layouts(work.spec, count, work.cluster.gpus_per_node, goal.batch):
            candidates.append(_candidate(replace(work, layout=layout), costs_of[index]))
    if not candidates:
        cluster = works[0].cluster
        raise ValueError(
            f"no layout on {gpus or cluster.gpus} GPUs of {cluster.name} makes steps of {goal.batch} sequences: take a"
            f" batch that they divide, such as {max(1, round(goal.batch / cluster.gpus)) * cluster.gpus}"
        )
    fitting = sorted((each for each in candidates if each.fits), key=lambda each: each.seconds)
    index_of = {id(work.spec): index for index, work in enumerate(works)}
    plans = [evaluate(each.work, goal, costs_of[index_of[id(each.work.spec)]]) for each in fitting[:FINALISTS]]
    return Found(
        tried=len(candidates),
        fitting=len(fitting),
        plans=tuple(sorted(plans, key=lambda plan: plan.step_seconds.value)),
        front=tuple(pareto_front(fitting)),
        smallest=None if fitting else min(candidates, key=lambda each: each.memory),
    )


def pareto_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats in time, memory and GPU time at once, fastest first."""
    front: list[Candidate] = []
    for each in sorted(candidates, key=lambda one: (one.seconds, one.memory, one.gpu_seconds)):
        if not any(one.memory <= each.memory and one.gpu_seconds <= each.gpu_seconds for one in front):
            front.append(each)
    return front


def _candidate(work: Workload, costs: Costs) -> Candidate:
    memory = pipeline_memory(work.spec, work.layout, work.recipe, work.sequence_length)
    return Candidate(work=work, seconds=estimate(work, costs), memory=max(rank.total for rank in memory))


def _is_legal(layout: Layout, spec: ModelSpec) -> bool:
    try:
        check_layout(layout, spec)
    except ValueError:
        return False
    return True


def _name(schedule: str) -> ScheduleName:
    assert schedule in ("1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev")
    return schedule


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
