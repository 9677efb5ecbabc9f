"""Plans the serving of a model: a pool for prompts, a pool for outputs, their ratio and the price.

    GPUs of prefill per GPU of decoding = (prompt / output tokens) x decode tokens/s / input tokens/s
    dollars per million tokens          = price per GPU and hour / 3600 / tokens/s x 10^6

`best_decode` tries sizes of the expert-parallel group, and for each the most requests that the output speed and memory
allow. Redundant experts serve to balance loads; loads are equal here, so the search takes as few as divide evenly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dovetail.planner.limits import SpeedLimit, speed_limit
from dovetail.planner.serving.decode import DecodePlan, decode_pool, evaluate_decode, fitting_gpus, fullest
from dovetail.planner.serving.goal import ServingGoal
from dovetail.planner.serving.prefill import PrefillPlan, evaluate_prefill
from dovetail.spec.band import Band
from dovetail.spec.hardware import Cluster
from dovetail.spec.layout import Layout, check_layout
from dovetail.spec.model import ModelSpec
from dovetail.spec.precision import Recipe

if TYPE_CHECKING:
    from dovetail.network.delivery.layout_traffic import LayoutTraffic

EXPERTS_PER_RANK = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # numbers that are tried
REDUNDANT_SHARE = 1 / 8  # of the experts; none is tried too. DeepSeek has 32 of 256 [V3 §3.4]


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


def best_pools(
    spec: ModelSpec,
    cluster: Cluster,
    recipe: Recipe,
    goal: ServingGoal,
    decode_cluster: Cluster | None = None,
    prefill_layout: Layout | None = None,
    decode_layout: Layout | None = None,
) -> ServingPlan:
    """Find both pools with the most tokens/s per GPU; a layout that is given is kept. Raises ValueError as
    `best_decode` and `best_prefill` do."""
    own = decode_cluster or cluster
    if prefill_layout is not None:
        prefill = evaluate_prefill(spec, cluster, prefill_layout, recipe, goal)
    else:
        prefill = best_prefill(spec, cluster, recipe, goal)
    decode = best_decode(spec, own, recipe, goal, decode_layout)
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


def best_prefill(spec: ModelSpec, cluster: Cluster, recipe: Recipe, goal: ServingGoal) -> PrefillPlan:
    """Find the plan with the most input tokens/s per GPU. Raises ValueError if none fits, with the reason for the
    largest group."""
    plans: list[PrefillPlan] = []
    problems: dict[int, ValueError] = {}
    for layout in decode_layouts(spec, cluster):
        try:
            plans.append(evaluate_prefill(spec, cluster, layout, recipe, goal))
        except ValueError as problem:
            problems[layout.ep] = problem
    if not plans:
        raise problems[max(problems)] if problems else ValueError(f"{cluster.name} has no GPUs for a pool")
    return max(plans, key=lambda plan: plan.input_per_second.value)


def best_decode(
    spec: ModelSpec, cluster: Cluster, recipe: Recipe, goal: ServingGoal, given: Layout | None = None
) -> DecodePlan:
    """Find the plan with the most tokens/s per GPU, with one or two micro-batches.

    It tries sizes of the expert-parallel group, or only the layout that is given. Raises ValueError if no size holds
    the model, with the number of GPUs that would, and if none is fast enough, with the best speed.
    """
    best: DecodePlan | None = None
    problems: list[str] = []
    if given is not None:
        check_layout(given, spec, cluster.gpus)
    for layout in decode_layouts(spec, cluster) if given is None else (given,):
        pool = decode_pool(spec, cluster, layout, recipe, goal)
        for microbatches in (2, 1) if goal.microbatches == 2 and pool.exchanges else (1,):
            own = replace(pool, goal=goal.model_copy(update={"microbatches": microbatches}))
            try:
                plan = fullest(own)
            except ValueError as problem:
                problems.append(str(problem))
                continue
            if best is None or plan.tokens_per_second.value > best.tokens_per_second.value:
                best = plan
    if best is not None:
        return best
    if given is not None:
        raise ValueError(problems[-1])
    raise ValueError(_why_none(spec, cluster, recipe, goal, problems))


def decode_layouts(spec: ModelSpec, cluster: Cluster) -> Iterator[Layout]:
    """Yield for each number of experts per rank, without and with an eighth redundant, the layout whose ep is a whole
    number of nodes or a divisor of one."""
    experts = spec.moe.n_routed_experts if spec.moe else 0
    if not experts:
        yield Layout()
        return
    seen = set()
    for per_rank in EXPERTS_PER_RANK:
        for slots in (experts, round(experts * (1 + REDUNDANT_SHARE))):
            ep = _whole(slots / per_rank, cluster.gpus_per_node)
            redundant = ep * per_rank - experts
            is_close = 0 <= redundant <= 2 * REDUNDANT_SHARE * experts
            if is_close and ep <= cluster.gpus and (ep, redundant) not in seen:
                seen.add((ep, redundant))
                yield Layout(ep=ep, dp=ep, redundant_experts=redundant)


def _whole(ranks: float, gpus_per_node: int) -> int:
    if ranks <= gpus_per_node:
        return next(each for each in range(1, gpus_per_node + 1) if gpus_per_node % each == 0 and each >= ranks)
    return -int(-ranks // gpus_per_node) * gpus_per_node


def _why_none(spec: ModelSpec, cluster: Cluster, recipe: Recipe, goal: ServingGoal, problems: list[str]) -> str:
    slow = [each for each in problems if each.startswith("output_speed")]
    if slow:
        unbound = goal.model_copy(update={"output_speed": None, "requests_per_gpu": 1, "microbatches": 1})
        plans = []
        for layout in decode_layouts(spec, cluster):
            try:
                plans.append(evaluate_decode(spec, cluster, layout, recipe, unbound))
            except ValueError:
                continue
        best = max(plans, key=lambda plan: plan.speed.value)
        return (
            f"output_speed = {goal.output_speed:g} tokens/s is not reached on {cluster.name}: the best is "
            f"{best.speed.value:.3g} tokens/s, one request per GPU with ep = {best.layout.ep} and context "
            f"{goal.mean_context:g}"
        )
    gpus = fitting_gpus(spec, cluster, recipe, goal, goal.requests_per_gpu or 1)
    remedy = f"{gpus} GPUs (ep = {gpus}) would hold it" if gpus else "no number of these GPUs would hold it"
    return f"the model does not fit on {cluster.name} ({cluster.gpus} GPUs): {remedy}"


def _limit(decode: DecodePlan) -> SpeedLimit | None:
    if decode.work.spec.moe is None or decode.layout.ep == 1:
        return None
    work = decode.work
    return speed_limit(work.spec, work.cluster, tokens=work.tokens, achieved=True, ranks=work.layout.ep)


def _dollars(cluster: Cluster, rate: Band) -> Band | None:
    return cluster.price * (1e6 / 3600) / rate if cluster.price else None
