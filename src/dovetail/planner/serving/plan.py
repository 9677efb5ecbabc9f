"""Plans the serving of a model: a pool for prompts, a pool for outputs, their ratio and the price.

    GPUs of prefill per GPU of decoding = (prompt / output tokens) x decode tokens/s / input tokens/s
    dollars per million tokens          = price per GPU and hour / 3600 / tokens/s x 10^6

`best_pools` tries sizes of the expert-parallel group and of the groups in it that share attention's heads (`tp`), for
decoding each with the most requests that the output speed and memory allow. Redundant experts serve to balance loads;
loads are equal here, so the search takes as few as divide evenly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dovetail.planner.limits import SpeedLimit, speed_limit
from dovetail.planner.serving.decode import DecodePlan, decode_pool, evaluate_decode, fullest
from dovetail.planner.serving.goal import ServingGoal
from dovetail.planner.serving.memory import DoesNotFitError
from dovetail.planner.serving.prefill import PrefillPlan, evaluate_prefill
from dovetail.spec.band import Band
from dovetail.spec.hardware import Cluster
from dovetail.spec.layout import Layout, check_layout, divisors
from dovetail.spec.model import ModelSpec
from dovetail.spec.precision import Recipe

if TYPE_CHECKING:
    from dovetail.network.delivery.layout_traffic import LayoutTraffic

EXPERTS_PER_RANK = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # numbers that are tried
REDUNDANT_SHARE = 1 / 8  # of the experts; none is tried too. DeepSeek has 32 of 256 [V3 §3.4]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The parts of a pool's layout that are given; None is searched."""

    ep: int | None = None
    tp: int | None = None


FREE = Wanted()


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What both pools are searched for. Raises ValueError for layouts wanted that no pool can have."""

    spec: ModelSpec
    cluster: Cluster  # of prompts
    decode_cluster: Cluster
    recipe: Recipe
    goal: ServingGoal
    prefill: Wanted = FREE
    decode: Wanted = FREE

    def __post_init__(self) -> None:
        for wanted, cluster in ((self.prefill, self.cluster), (self.decode, self.decode_cluster)):
            _check_wanted(wanted, self.spec, cluster)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPlan:
    """The plan of both pools. Rates are per GPU."""

    prefill: PrefillPlan
    decode: DecodePlan
    limit: SpeedLimit | None  # what exchanges alone allow for decoding's micro-batches at the achieved bandwidth

    @property
    def goal(self) -> ServingGoal:
        return self.decode.goal

    @property
    def prefill_per_decode(self) -> Band | None:
        """The number of prefill GPUs for each decode GPU; None if the goal has no output length."""
        output = self.goal.output
        if output is None:
            return None
        return self.goal.prompt / output * self.decode.tokens_per_second / self.prefill.input_per_second

    @property
    def dollars_per_million_input(self) -> Band | None:
        """The price of input tokens, those found in the cache included."""
        return _dollars(self.prefill.work.cluster, self.prefill.input_per_second)

    @property
    def dollars_per_million_output(self) -> Band | None:
        """The price of output tokens, for decoding alone."""
        return _dollars(self.decode.work.cluster, self.decode.tokens_per_second)


def evaluate(
    spec: ModelSpec,
    cluster: Cluster,
    prefill_layout: Layout,
    decode_layout: Layout,
    recipe: Recipe,
    goal: ServingGoal,
    decode_cluster: Cluster | None = None,
) -> ServingPlan:
    """Plan both pools on `cluster`, or decoding on another one. Raises ValueError as `evaluate_prefill` and
    `evaluate_decode` do."""
    own = decode_cluster or cluster
    prefill = evaluate_prefill(spec, cluster, prefill_layout, recipe, goal)
    decode = evaluate_decode(spec, own, decode_layout, recipe, goal)
    return ServingPlan(prefill=prefill, decode=decode, limit=_limit(decode))


def best_pools(search: Search) -> ServingPlan:
    """Find both pools with the most tokens/s per GPU. Raises ValueError as `best_decode` and `best_prefill` do."""
    prefill = best_prefill(search.spec, search.cluster, search.recipe, search.goal, search.prefill)
    decode = best_decode(search.spec, search.decode_cluster, search.recipe, search.goal, search.decode)
    return ServingPlan(prefill=prefill, decode=decode, limit=_limit(decode))


def on_network(plan: ServingPlan, prefill: LayoutTraffic, decode: LayoutTraffic) -> ServingPlan:
    """Plan the layouts of `plan` again with simulated exchanges, and as many requests as then meet the goal.

    Raises ValueError if the output speed is no longer reached, and if failures cut GPUs off.
    """
    reads, writes = plan.prefill, plan.decode
    work = reads.work
    pool = decode_pool(writes.work.spec, writes.work.cluster, writes.layout, writes.work.recipe, writes.goal)
    slower = fullest(replace(pool, traffic=decode))
    again = evaluate_prefill(work.spec, work.cluster, reads.layout, work.recipe, reads.goal, prefill)
    return ServingPlan(prefill=again, decode=slower, limit=_limit(slower))


def best_prefill(
    spec: ModelSpec, cluster: Cluster, recipe: Recipe, goal: ServingGoal, wanted: Wanted = FREE
) -> PrefillPlan:
    """Find the plan with the most input tokens/s per GPU. Raises DoesNotFitError, for the layout that needs the least
    memory, if none fits."""
    plans: list[PrefillPlan] = []
    problems: list[DoesNotFitError] = []
    for layout in pool_layouts(spec, cluster, wanted):
        try:
            plans.append(evaluate_prefill(spec, cluster, layout, recipe, goal))
        except DoesNotFitError as problem:
            problems.append(problem)
    if not plans:
        raise _least_needed(problems)
    return max(plans, key=lambda plan: plan.input_per_second.value)


def best_decode(
    spec: ModelSpec, cluster: Cluster, recipe: Recipe, goal: ServingGoal, wanted: Wanted = FREE
) -> DecodePlan:
    """Find the plan with the most tokens/s per GPU, with one or two micro-batches.

    Raises DoesNotFitError, for the layout that needs the least memory, if none fits, and ValueError with the best speed
    if none is fast enough.
    """
    plans: list[DecodePlan] = []
    problems: list[DoesNotFitError] = []
    slow: list[ValueError] = []
    for layout in pool_layouts(spec, cluster, wanted):
        pool = decode_pool(spec, cluster, layout, recipe, goal)
        for microbatches in (2, 1) if goal.microbatches == 2 and pool.exchanges else (1,):
            try:
                plans.append(fullest(replace(pool, goal=goal.model_copy(update={"microbatches": microbatches}))))
            except DoesNotFitError as problem:
                problems.append(problem)
            except ValueError as problem:
                slow.append(problem)
    if plans:
        return max(plans, key=lambda plan: plan.tokens_per_second.value)
    if slow:
        raise ValueError(_too_slow(spec, cluster, recipe, goal, wanted))
    raise _least_needed(problems)


def pool_layouts(spec: ModelSpec, cluster: Cluster, wanted: Wanted = FREE) -> Iterator[Layout]:
    """Yield the layouts of a pool that are tried: sizes of expert-parallel groups, each with every `tp` that divides
    the group, a node and attention's heads. Without experts a pool is one group of tp ranks."""
    sizes = [(wanted.ep, _fewest_redundant(spec, wanted.ep))] if wanted.ep else _group_sizes(spec, cluster)
    heads = spec.attention.num_attention_heads
    for ep, redundant in sizes:
        for tp in [wanted.tp] if wanted.tp else divisors(cluster.gpus_per_node):
            ranks = ep if spec.moe else tp
            if ranks % tp == 0 and heads % tp == 0:
                yield Layout(ep=ep, dp=ranks // tp, tp=tp, redundant_experts=redundant)


def _group_sizes(spec: ModelSpec, cluster: Cluster) -> list[tuple[int, int]]:
    """Return ep and the number of redundant experts, for each number of experts per rank without and with an eighth
    redundant, if ep is a whole number of nodes or a divisor of one."""
    if spec.moe is None:
        return [(1, 0)]
    experts = spec.moe.n_routed_experts
    found: dict[tuple[int, int], None] = {}
    for per_rank in EXPERTS_PER_RANK:
        for slots in (experts, round(experts * (1 + REDUNDANT_SHARE))):
            ep = _whole(slots / per_rank, cluster.gpus_per_node)
            redundant = ep * per_rank - experts
            if 0 <= redundant <= 2 * REDUNDANT_SHARE * experts and ep <= cluster.gpus:
                found[ep, redundant] = None
    within = [(ep, 0) for ep in divisors(cluster.gpus_per_node) if experts % ep == 0]
    return list(found | dict.fromkeys(within))


def _whole(ranks: float, gpus_per_node: int) -> int:
    if ranks <= gpus_per_node:
        return next(each for each in range(1, gpus_per_node + 1) if gpus_per_node % each == 0 and each >= ranks)
    return -int(-ranks // gpus_per_node) * gpus_per_node


def _fewest_redundant(spec: ModelSpec, ep: int) -> int:
    """Return as few redundant experts as make `ep` divide evenly."""
    return -spec.moe.n_routed_experts % ep if spec.moe else 0


def _check_wanted(wanted: Wanted, spec: ModelSpec, cluster: Cluster) -> None:
    ep, tp = wanted.ep, wanted.tp or 1
    if ep is not None and spec.moe and ep % tp:
        raise ValueError(f"--tp {tp} does not divide --ep {ep}: the {ep} ranks of a pool are dp x tp")
    ranks, redundant = (ep, _fewest_redundant(spec, ep)) if ep is not None else (tp, 0)
    layout = Layout(ep=ep or 1, dp=max(1, ranks // tp), tp=tp, redundant_experts=redundant)
    check_layout(layout, spec, cluster.gpus)
    if not any(pool_layouts(spec, cluster, wanted)):
        raise ValueError(
            f"--tp {tp} divides no pool that is tried on the {cluster.gpus} GPUs of {cluster.name}; give --ep as well"
        )


def _least_needed(problems: Sequence[DoesNotFitError]) -> DoesNotFitError:
    """Return the problem of the layout that needs the least memory."""
    return min(problems, key=lambda each: each.holding.total)


def _too_slow(spec: ModelSpec, cluster: Cluster, recipe: Recipe, goal: ServingGoal, wanted: Wanted) -> str:
    unbound = goal.model_copy(update={"output_speed": None, "requests_per_gpu": 1, "microbatches": 1})
    plans = []
    for layout in pool_layouts(spec, cluster, wanted):
        try:
            plans.append(evaluate_decode(spec, cluster, layout, recipe, unbound))
        except DoesNotFitError:
            continue
    best = max(plans, key=lambda plan: plan.speed.value)
    return (
        f"output_speed = {goal.output_speed:g} tokens/s is not reached on {cluster.name}: the best is "
        f"{best.speed.value:.3g} tokens/s (expected {best.speed.low:.3g} to {best.speed.high:.3g}), one request per "
        f"GPU with ep = {best.layout.ep}, tp = {best.layout.tp} and context {goal.mean_context:g}"
    )


def _limit(decode: DecodePlan) -> SpeedLimit | None:
    if decode.work.spec.moe is None or decode.layout.ep == 1:
        return None
    work = decode.work
    return speed_limit(work.spec, work.cluster, tokens=work.own_tokens, achieved=True, ranks=work.layout.ep)


def _dollars(cluster: Cluster, rate: Band) -> Band | None:
    return cluster.price * (1e6 / 3600) / rate if cluster.price else None
