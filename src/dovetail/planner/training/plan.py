"""Plans a training step on a cluster: its time and the parts of it, its memory and its price.

    stages -> seconds of F, I, W and overlapped pairs (`planner.training.chunks`) -> replay of the schedule
    (`planner.training.timeline`) -> step = pipeline + optimizer, divided as in ISCA Table 4

FLOP are counted as in the paper: matrix products and attention, without recomputation and without MTP; "causal" counts
half of the attention square [ISCA §2.2.2, Table 4]. All sums and gathers of the optimizer are taken to be exposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from dovetail.cost.count import training_flop_per_token
from dovetail.cost.memory.process import moment_bytes
from dovetail.cost.memory.rank import RankMemory, pipeline_memory
from dovetail.cost.memory.stages import stages
from dovetail.cost.ops.ops import BF16, Op, Send
from dovetail.cost.ops.step import step_ops
from dovetail.parallel.schedules.pipelines import make_schedule
from dovetail.planner.limits import DAY
from dovetail.planner.operation import operation_time
from dovetail.planner.training.bubbles import estimate_seconds
from dovetail.planner.training.chunks import Costs, StageSeconds, Workload
from dovetail.planner.training.timeline import Breakdown, Durations, Timeline, replay
from dovetail.spec.band import Band, sum_bands
from dovetail.spec.hardware import Cluster
from dovetail.spec.layout import Layout, check_layout
from dovetail.spec.model import ModelSpec

if TYPE_CHECKING:
    from dovetail.network.delivery.layout_traffic import LayoutTraffic


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingGoal:
    """The batch of a step and the tokens of a run."""

    batch: int  # sequences per step
    tokens: float | None = None  # of the whole run


@dataclass(frozen=True, slots=True, kw_only=True)
class StepParts:
    """Seconds of a step, as means over the ranks of a pipeline.

    In Table 4's names they are forwards alone (1F), gradients of inputs (1B) and of weights (1W) alone, overlapped
    pairs (1F1B), idle time, and the optimizer.
    """

    forward: Band
    input_backward: Band
    weight_backward: Band
    pair: Band
    bubble: Band
    optimizer: Band

    @property
    def total(self) -> Band:
        parts = (self.forward, self.input_backward, self.weight_backward, self.pair, self.bubble, self.optimizer)
        return sum_bands(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepUses:
    """The same seconds by their use; `exchanges` are those that no arithmetic hides, in pairs or alone."""

    arithmetic: Band
    collectives: Band  # of tensor-parallel ranks
    exchanges: Band
    bubble: Band
    optimizer: Band


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """One layout's step on a cluster, and what follows for a run."""

    work: Workload
    goal: TrainingGoal
    parts: StepParts
    uses: StepUses
    step_seconds: Band
    memory: tuple[RankMemory, ...]  # of each pipeline rank
    timeline: Timeline

    @property
    def largest_memory(self) -> RankMemory:
        return max(self.memory, key=lambda rank: rank.total)

    @property
    def fits(self) -> bool:
        return self.largest_memory.total <= self.work.cluster.gpu.usable_bytes

    @property
    def gpus(self) -> int:
        return self.work.layout.gpus

    @property
    def tokens_per_step(self) -> int:
        return self.goal.batch * self.work.sequence_length

    @property
    def tokens_per_day(self) -> Band:
        return self.tokens_per_step * DAY / self.step_seconds

    def flop_rate(self, causal: bool = True) -> Band:
        """Return the FLOP/s per GPU."""
        flop = training_flop_per_token(self.work.spec, self.work.sequence_length, causal)
        return flop * self.tokens_per_step / self.gpus / self.step_seconds

    def mfu(self, causal: bool = True) -> Band:
        """Return the share of the BF16 peak, whatever format products are in, as in the paper [ISCA Table 4]."""
        return self.flop_rate(causal) / self.work.cluster.gpu.peak("bf16")

    @property
    def seconds(self) -> Band | None:
        """The seconds of the whole run, if the goal has its tokens."""
        return self.goal.tokens / self.tokens_per_step * self.step_seconds if self.goal.tokens else None

    @property
    def gpu_hours(self) -> Band | None:
        return self.seconds * (self.gpus / 3600) if self.seconds else None

    @property
    def dollars(self) -> Band | None:
        price = self.work.cluster.price
        return self.gpu_hours * price if self.gpu_hours and price else None


def evaluate(work: Workload, goal: TrainingGoal, costs: Costs | None = None) -> TrainingPlan:
    """Plan a step. Raises ValueError for an illegal layout; a plan that does not fit in memory has `fits` False."""
    layout = work.layout
    check_layout(layout, work.spec, work.cluster.gpus, goal.batch)
    costs = costs or Costs()
    schedule = make_schedule(layout.schedule, layout.pp, layout.microbatches, layout.chunks)
    replays = {end: replay(schedule, _durations(work, costs, end)) for end in ("low", "value", "high")}
    _, optimizer = slowest_update(work)
    parts = _parts({end: timeline.breakdown() for end, timeline in replays.items()}, optimizer)
    pipeline = _band(*(replays[end].seconds for end in ("low", "value", "high")))
    return TrainingPlan(
        work=work,
        goal=goal,
        parts=parts,
        uses=_uses(parts, layout, costs.stages(work)),
        step_seconds=pipeline + optimizer,
        memory=pipeline_memory(work.spec, layout, work.recipe, work.sequence_length, work.recompute),
        timeline=replays["value"],
    )


def estimate(work: Workload, costs: Costs) -> float:
    """Estimate `evaluate(...).step_seconds.value` without a schedule, to prune a search."""
    layout = work.layout
    durations = _durations(work, costs, "value")
    pipeline = estimate_seconds(layout.schedule, layout.pp, layout.microbatches, durations, layout.chunks)
    return pipeline + slowest_update(work)[1].value


def replayed_seconds(work: Workload, costs: Costs) -> float:
    """Return `evaluate(...).step_seconds.value` and compute nothing else."""
    layout = work.layout
    schedule = make_schedule(layout.schedule, layout.pp, layout.microbatches, layout.chunks)
    return replay(schedule, _durations(work, costs, "value")).seconds + slowest_update(work)[1].value


def _durations(work: Workload, costs: Costs, end: str) -> Durations:
    layout, each, pairs = work.layout, costs.stages(work), None
    if layout.schedule in ("dualpipe", "dualpipev"):
        pairs = [getattr(pair, end) for pair in costs.pairs(work)]
    send = operation_time(stage_send(work), work.cluster, traffic=work.traffic).seconds
    return Durations(
        forward=[getattr(stage.forward, end) for stage in each],
        backward=[getattr(stage.backward, end) for stage in each],
        input_backward=[getattr(stage.input_backward, end) for stage in each],
        weight_backward=[getattr(stage.weight_backward, end) for stage in each],
        pair=pairs,
        send=getattr(send, end),
    )


def stage_send(work: Workload) -> Send:
    """Return the send of a micro-batch's activations to the next stage."""
    layout = work.layout
    sent = BF16 * work.tokens * work.spec.hidden_size / layout.tp
    return Send(bytes=sent, distance=layout.dp * layout.tp, gpus=layout.gpus)


def slowest_update(work: Workload) -> tuple[tuple[Op, ...], Band]:
    """Return the optimizer's operations on the slowest pipeline rank, for which all others wait, and its seconds."""
    # Only the fields that decide which rank holds which weights are kept, so that many layouts share one result.
    same = "1f1b" if work.layout.schedule == "zb1p" else work.layout.schedule
    changes = {"microbatches": min(work.layout.microbatches, 2), "microbatch_size": 1, "schedule": same}
    layout = work.layout.model_copy(update=changes)
    return _slowest_update(
        work.spec, layout, work.cluster, work.sequence_length, moment_bytes(work.recipe), work.traffic
    )


@lru_cache(maxsize=1 << 12)
def _slowest_update(
    spec: ModelSpec,
    layout: Layout,
    cluster: Cluster,
    sequence_length: int,
    moment_bytes: int,
    traffic: LayoutTraffic | None,
) -> tuple[tuple[Op, ...], Band]:
    """Compute `slowest_update`; ranks with as many layers of each kind, and the same ends, take the same time."""
    all_stages = stages(spec, layout, sequence_length)
    ranks: dict[tuple[object, ...], int] = {}
    for rank in range(layout.pp):
        mine = [all_stages[index] for index in layout.stages_of(rank)]
        has_experts = [spec.is_moe_layer(layer) for stage in mine for layer in stage.layers]
        ends = sorted((stage.has_embedding, stage.has_head) for stage in mine)
        ranks[sum(has_experts), len(has_experts), *ends] = rank
    each = (step_ops(spec, layout, rank, sequence_length, moment_bytes) for rank in ranks.values())
    timed = ((ops, sum_bands(operation_time(op, cluster, traffic=traffic).seconds for op in ops)) for ops in each)
    return max(timed, key=lambda update: update[1].value)


def _parts(of: dict[str, Breakdown], optimizer: Band) -> StepParts:
    def band(*names: str) -> Band:
        return _band(*(sum(getattr(of[end], name) for name in names) for end in ("low", "value", "high")))

    return StepParts(
        forward=band("forward"),
        input_backward=band("input_backward", "full_input"),
        weight_backward=band("weight_backward", "full_weight"),
        pair=band("pair"),
        bubble=band("bubble"),
        optimizer=optimizer,
    )


def _uses(parts: StepParts, layout: Layout, each: Sequence[StageSeconds]) -> StepUses:
    """Return the uses; every stage runs every micro-batch once, on whichever rank."""
    per_rank = layout.microbatches / layout.pp
    collectives = per_rank * sum_bands(stage.collectives for stage in each)
    arithmetic = per_rank * sum_bands(stage.arithmetic for stage in each)
    busy = sum_bands([parts.forward, parts.input_backward, parts.weight_backward, parts.pair])
    exposed = (
        max(0.0, getattr(busy, end) - getattr(arithmetic, end) - getattr(collectives, end))
        for end in ("low", "value", "high")
    )
    return StepUses(
        arithmetic=arithmetic,
        collectives=collectives,
        exchanges=_band(*exposed),
        bubble=parts.bubble,
        optimizer=parts.optimizer,
    )


def _band(low: float, value: float, high: float) -> Band:
    """Return a band of three values in any order, since idle time may shrink when work grows."""
    return Band(value, min(low, value, high), max(low, value, high))
