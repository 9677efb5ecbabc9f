"""Searches all layouts of a training job on a cluster for the best ones.

    every legal layout                    `layouts`
    -> those that fit in memory           `cost.memory.rank`
    -> estimated, without a schedule      `planner.training.plan.estimate`, up to an eighth off
    -> replayed, if they may be on the front or among the fastest
    -> the fastest evaluated in full      `planner.training.plan.evaluate`, with simulated exchanges if asked for

The Pareto front is over the time of a step, the largest memory of a rank, and the GPU time, which decides the price:
no layout in it is beaten in all three.

Every degree takes the divisors of the number of GPUs, TP those of a node, and each schedule is tried if micro-batches
and layers allow it; "interleaved" has two chunks by default.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, NoReturn

from dovetail.cost.memory.rank import pipeline_memory
from dovetail.planner.training.chunks import Costs, Workload
from dovetail.planner.training.plan import (
    StepUses,
    TrainingGoal,
    TrainingPlan,
    estimate,
    evaluate,
    replayed_seconds,
)
from dovetail.planner.training.vary import FREE, Choices
from dovetail.spec.layout import Layout, ScheduleName, check_layout, divisors
from dovetail.spec.model import ModelSpec

if TYPE_CHECKING:
    from dovetail.network.delivery.layout_traffic import LayoutTraffic

FINALISTS = 12  # number of layouts that are evaluated in full
ESTIMATE_ERROR = 1 / 8  # the error that `bubbles.estimate_seconds` states


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layout, the seconds of a step, and the most bytes that a rank needs."""

    work: Workload
    seconds: float
    memory: float
    index: int = 0  # the number of its workload among those searched
    is_replayed: bool = False  # if not, `seconds` is an estimate

    @property
    def gpu_seconds(self) -> float:
        return self.seconds * self.work.layout.gpus

    @property
    def fits(self) -> bool:
        return self.memory <= self.work.cluster.gpu.usable_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The result of a search."""

    tried: int
    plans: tuple[TrainingPlan, ...]  # the fastest first
    front: tuple[Candidate, ...]  # the Pareto front of all that fit, the fastest first
    ranking: tuple[Candidate, ...]  # all that fit, the fastest first
    smallest: Candidate | None  # the layout that needs the least memory, if none fits

    @property
    def fitting(self) -> int:
        return len(self.ranking)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """A plan that is faster than another, and the seconds of a step that it saves by use (`StepUses`), the most first.
    Uses that take longer are negative; all add up to the difference of the steps."""

    plan: TrainingPlan
    seconds: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        layout = self.plan.work.layout
        changes = ", ".join(f"{name} {-saved:+.2f} s" for name, saved in self.seconds if abs(saved) >= 0.005)
        return (
            f"PP{layout.pp} EP{layout.ep} TP{layout.tp} {layout.schedule}, {layout.microbatches} micro-batches of "
            f"{layout.microbatch_size}: {self.plan.step_seconds.value:.2f} s; {changes or 'the same in every part'}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The place of one layout among all that were found."""

    plan: TrainingPlan
    place: int  # 1 if nothing that fits is faster
    behind: float  # its step over the best one's, minus 1
    better: tuple[Gain, ...]  # the faster plans of those evaluated, the fastest first


def layouts(spec: ModelSpec, gpus: int, gpus_per_node: int, batch: int, choices: Choices = FREE) -> Iterator[Layout]:
    """Yield every legal layout on exactly `gpus` GPUs for a step of `batch` sequences."""
    experts = spec.moe.n_routed_experts if spec.moe else 1
    for pp, tp, dp in _degrees(spec, gpus, gpus_per_node, choices):
        for size in choices.microbatch_size:
            if batch % (dp * size):
                continue
            for schedule, chunks in _schedules(pp, choices):
                for ep in choices.among("ep", [each for each in divisors(dp * tp) if experts % each == 0]):
                    layout = Layout(
                        pp=pp,
                        tp=tp,
                        ep=ep,
                        dp=dp,
                        microbatches=batch // (dp * size),
                        microbatch_size=size,
                        schedule=schedule,
                        chunks=chunks,
                    )
                    if not _is_legal(layout, spec):
                        break  # it fails for a rule that does not depend on ep
                    yield from (layout.model_copy(update={"zero": zero}) for zero in choices.zero)


def search(work: Workload, goal: TrainingGoal, gpus: int | None = None, choices: Choices = FREE) -> Found:
    """Find the best layouts for `work.spec` on `gpus` GPUs (None: all) of `work.cluster`; `work.layout` is not read.

    Raises ValueError if no layout is legal (if the batch does not divide, say), and if attention is not MLA.
    """
    return search_all([work], goal, gpus, choices)


def search_all(
    works: Sequence[Workload],
    goal: TrainingGoal,
    gpus: int | None = None,
    choices: Choices = FREE,
    traffic: LayoutTraffic | None = None,
) -> Found:
    """Do the same over several models or recipes on one cluster, as `vary` makes them. With `traffic` the finalists are
    ordered by their time on that network; the ranking and the front stay those of closed forms."""
    assert works, "nothing to search"
    sized = [each for index, work in enumerate(works) for each in _sized(work, index, goal, gpus, choices)]
    if not sized:
        _reject(works[0], goal, gpus or works[0].cluster.gpus, choices)
    costs = [Costs() for _ in works]
    fitting = [_estimated(each, costs) for each in sized if each.fits]
    ranking = _replayed(fitting, costs)
    plans = _evaluated(ranking[:FINALISTS], goal, costs, traffic)
    return Found(
        tried=len(sized),
        plans=tuple(plans),
        front=tuple(pareto_front(ranking)),
        ranking=tuple(ranking),
        smallest=None if fitting else _estimated(min(sized, key=lambda each: each.memory), costs),
    )


def _evaluated(
    finalists: Sequence[Candidate], goal: TrainingGoal, costs: Sequence[Costs], traffic: LayoutTraffic | None
) -> list[TrainingPlan]:
    if traffic is None:
        return [evaluate(each.work, goal, costs[each.index]) for each in finalists]
    slower = [Costs() for _ in costs]
    plans = [evaluate(replace(each.work, traffic=traffic), goal, slower[each.index]) for each in finalists]
    return sorted(plans, key=lambda plan: plan.step_seconds.value)


def compared(found: Found, work: Workload, goal: TrainingGoal) -> Comparison:
    """Compare the layout of `work` with those of a search over the same model, recipe and goal.

    Raises ValueError for an illegal layout.
    """
    plan = evaluate(work, goal)
    seconds = plan.step_seconds.value
    faster = [each for each in found.plans if each.step_seconds.value < seconds]
    return Comparison(
        plan=plan,
        place=1 + sum(each.seconds < seconds for each in found.ranking),
        behind=seconds / min([seconds, *(each.step_seconds.value for each in faster)]) - 1,
        better=tuple(Gain(plan=each, seconds=_gains(plan, each)) for each in faster),
    )


def _gains(own: TrainingPlan, other: TrainingPlan) -> tuple[tuple[str, float], ...]:
    names = [field.name for field in fields(StepUses)]
    saved = [(name, getattr(own.uses, name).value - getattr(other.uses, name).value) for name in names]
    return tuple(sorted(saved, key=lambda each: -each[1]))


def pareto_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return those that no other beats in time, memory and GPU time together, the fastest first; of equals one."""
    front: list[Candidate] = []
    for each in sorted(candidates, key=_rank):
        if not any(_is_beaten(each, one, each.seconds) for one in front):
            front.append(each)
    return front


def _is_beaten(each: Candidate, other: Candidate, seconds: float) -> bool:
    """Return whether `other` beats `each` if that takes `seconds`."""
    return (
        other.seconds <= seconds
        and other.memory <= each.memory
        and other.gpu_seconds <= seconds * each.work.layout.gpus
    )


def _sized(work: Workload, index: int, goal: TrainingGoal, gpus: int | None, choices: Choices) -> Iterator[Candidate]:
    """Yield all layouts of one workload with their memory, and without a time."""
    cluster = work.cluster
    if gpus is not None and gpus > cluster.gpus:
        raise ValueError(f"{gpus} GPUs: {cluster.name} has {cluster.gpus}")
    for layout in layouts(work.spec, gpus or cluster.gpus, cluster.gpus_per_node, goal.batch, choices):
        ranks = pipeline_memory(work.spec, layout, work.recipe, work.sequence_length, work.recompute)
        memory = max(rank.total for rank in ranks)
        yield Candidate(work=replace(work, layout=layout), seconds=0.0, memory=memory, index=index)


def _estimated(each: Candidate, costs: Sequence[Costs]) -> Candidate:
    return replace(each, seconds=estimate(each.work, costs[each.index]))


def _replayed(fitting: Sequence[Candidate], costs: Sequence[Costs]) -> list[Candidate]:
    """Return all, the fastest first, and replay the schedule of each that may be among the fastest or on the front.
    One may not if others beat it even when it is as much faster than its estimate as is possible."""
    known: list[Candidate] = []
    front: list[Candidate] = []
    rest: list[Candidate] = []
    for each in sorted(fitting, key=lambda one: one.seconds):
        least = each.seconds / (1 + ESTIMATE_ERROR)
        faster = sum(one.seconds < least for one in known)
        if faster >= FINALISTS and any(_is_beaten(each, one, least) for one in front):
            rest.append(each)
            continue
        seconds = replayed_seconds(each.work, costs[each.index])
        known.append(replace(each, seconds=seconds, is_replayed=True))
        front = pareto_front([*front, known[-1]])
    return sorted([*known, *rest], key=_rank)


def _rank(one: Candidate) -> tuple[float, float, float]:
    """Return what to sort by: time, then memory. The last digits of time do not count, since they are rounding."""
    return float(f"{one.seconds:.9g}"), one.memory, one.gpu_seconds


def _degrees(spec: ModelSpec, gpus: int, gpus_per_node: int, choices: Choices) -> Iterator[tuple[int, int, int]]:
    """Yield each pp, tp and dp whose product is `gpus`."""
    for pp in choices.among("pp", [each for each in divisors(gpus) if each <= spec.num_hidden_layers]):
        for tp in choices.among("tp", [each for each in divisors(gpus // pp) if gpus_per_node % each == 0]):
            dp = gpus // (pp * tp)
            if spec.attention.num_attention_heads % tp == 0 and choices.among("dp", [dp]):
                yield pp, tp, dp


def _schedules(pp: int, choices: Choices) -> Iterator[tuple[ScheduleName, int]]:
    """Yield schedules and chunks. On one rank DualPipeV overlaps its two stages, and all others are the same loop."""
    names = choices.schedule if pp > 1 else [name for name in choices.schedule if name in ("1f1b", "dualpipev")]
    for name in names:
        for chunks in choices.chunks if name == "interleaved" else (2,):
            yield name, chunks


def _reject(work: Workload, goal: TrainingGoal, gpus: int, choices: Choices) -> NoReturn:
    cluster, wanted = work.cluster, f" with {choices}" if str(choices) else ""
    what = f"no layout{wanted} on {gpus} GPUs of {cluster.name}"
    degrees = list(_degrees(work.spec, gpus, cluster.gpus_per_node, choices))
    if not degrees:
        raise ValueError(
            f"{what}: pp x tp has to divide the GPUs, with at most {work.spec.num_hidden_layers} stages for as many "
            f"layers, and tp both the {cluster.gpus_per_node} GPUs of a node and "
            f"{work.spec.attention.num_attention_heads} attention heads"
        )
    rounds = sorted({dp * size for _, _, dp in degrees for size in choices.microbatch_size})
    nearest = min((max(1, round(goal.batch / each)) * each for each in rounds), key=lambda one: abs(one - goal.batch))
    if nearest != goal.batch:
        raise ValueError(
            f"{what} makes steps of {goal.batch} sequences; the nearest batch that its ranks divide is {nearest}"
        )
    raise ValueError(
        f"{what} has micro-batches, stages and experts that its schedules take in steps of {goal.batch} sequences: "
        f"allow other schedules, degrees or a larger batch"
    )


def _is_legal(layout: Layout, spec: ModelSpec) -> bool:
    try:
        check_layout(layout, spec)
    except ValueError:
        return False
    return True
