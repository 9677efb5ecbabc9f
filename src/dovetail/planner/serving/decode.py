"""Plans a pool of GPUs that writes outputs: the time of a step, and the requests in it.

    step    = embedding + dense layers + layers with experts, two micro-batches overlapped + head
    TPOT    = step / tokens of one request in it: 1, or 1 + acceptance with MTP, whose step runs two tokens per request
              through the model and then its module [V3 §5.4.3]
    tokens  = requests / TPOT per GPU

All ranks work in step, so the slowest one sets the time; loads are equal except for the goal's `expert_imbalance`. Left
out: sampling parameters, the CPU's time between steps, requests that come and go (a batch that is not always full).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dovetail.cost.memory.inference import InferenceMemory, inference_memory, low_latency_buffer
from dovetail.planner.serving.goal import ServingGoal
from dovetail.planner.serving.memory import DoesNotFitError, Holding
from dovetail.planner.serving.microbatches import NOTHING, Overlapped, Pieces, overlap
from dovetail.planner.serving.pieces import (
    Work,
    dense_layer_seconds,
    ends_seconds,
    layer_pieces,
    mtp_pieces,
    timed_layer,
)
from dovetail.planner.serving.prefill import check_pool
from dovetail.spec.band import Band, sum_bands
from dovetail.spec.hardware import Cluster
from dovetail.spec.layout import Layout, check_layout
from dovetail.spec.model import ModelSpec
from dovetail.spec.precision import Recipe

if TYPE_CHECKING:
    from dovetail.network.delivery.layout_traffic import LayoutTraffic


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """A decoding pool's step. Times are in seconds; requests are those of one GPU."""

    work: Work  # of one micro-batch
    goal: ServingGoal
    requests: int
    pieces: Pieces
    layers: Overlapped
    dense_seconds: Band
    ends_seconds: Band
    mtp_seconds: Band
    memory: InferenceMemory
    requests_that_fit: int

    @property
    def layout(self) -> Layout:
        return self.work.layout

    @property
    def step_seconds(self) -> Band:
        return self.layers.seconds + self.dense_seconds + self.ends_seconds + self.mtp_seconds

    @property
    def tpot(self) -> Band:
        """The seconds per output token of one user."""
        return self.step_seconds / self.goal.tokens_per_step

    @property
    def speed(self) -> Band:
        """The output tokens per second of one user."""
        return self.tpot.inverse()

    @property
    def tokens_per_second(self) -> Band:
        """The output tokens per second of one GPU."""
        return self.requests / self.tpot

    @property
    def per_node(self) -> Band:
        return self.work.cluster.gpus_per_node * self.tokens_per_second

    @property
    def cache_bytes(self) -> float:
        """The bytes of the latents of all requests at their mean length, those of other ranks of tp too."""
        return self.requests * self.layout.tp * self.goal.mean_context * self.memory.cache_per_token

    @property
    def communication_seconds(self) -> Band:
        """The seconds of all exchanges of a step one after the other, without any computation: a lower bound."""
        layer = sum_bands(op.seconds for op in timed_layer(self.work) if op.piece in ("dispatch", "combine"))
        return self.work.spec.num_moe_layers * self.goal.microbatches * layer

    @property
    def seconds_by_use(self) -> dict[str, Band]:
        """The parts of a step's time, which add up to it."""
        count, pieces = self.work.spec.num_moe_layers * self.goal.microbatches, self.pieces
        kernels = (pieces.issue_dispatch, pieces.take_dispatch, pieces.issue_combine, pieces.take_combine)
        parts = {
            "attention projections": count * pieces.before,
            "attention core, o_proj, gate": count * pieces.core,
            "experts": count * pieces.experts,
            "shared experts": count * pieces.shared,
            "kernels of exchanges": count * sum(kernels, NOTHING),
            "waiting for exchanges": self.layers.exposed,
        }
        parts |= {"dense layers": self.dense_seconds, "embedding and head": self.ends_seconds}
        return parts | {"MTP": self.mtp_seconds}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """GPUs that decode, before the number of their requests is known."""

    spec: ModelSpec
    cluster: Cluster
    layout: Layout
    recipe: Recipe
    goal: ServingGoal
    held: InferenceMemory  # without buffers
    traffic: LayoutTraffic | None = None  # the exchanges of all such pools at once; None: closed forms

    @property
    def exchanges(self) -> bool:
        return self.spec.moe is not None and self.layout.ep > 1

    @property
    def tokens_per_request(self) -> int:
        """The tokens of a request that a step runs through the model: with MTP the last one and its draft."""
        return 1 if self.goal.mtp_acceptance is None else 2

    def memory(self, requests: int) -> InferenceMemory:
        """Return the bytes with buffers for `requests` in a step."""
        if self.spec.moe is None or not self.exchanges or self.goal.exchange == "normal":
            return self.held
        slots = self.spec.moe.n_routed_experts + self.layout.redundant_experts
        tokens = -(-requests * self.tokens_per_request // self.goal.microbatches)
        return replace(self.held, buffers=low_latency_buffer(self.spec.hidden_size, tokens, slots))

    def fit(self, requests: int) -> int:
        """Return how many requests' latents, at mean length, fit beside weights and buffers for `requests`."""
        tokens = self.memory(requests).tokens_that_fit(self.cluster.gpu.usable_bytes)
        return min(self.goal.max_requests_per_gpu, int(tokens / (self.goal.mean_context * self.layout.tp)))

    def most_that_fit(self) -> int:
        """Return the most requests that fit, found by bisection, because buffers grow with requests."""
        low, high = 0, self.goal.max_requests_per_gpu
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fit(middle) >= middle else (low, middle - 1)
        return low


def decode_pool(spec: ModelSpec, cluster: Cluster, layout: Layout, recipe: Recipe, goal: ServingGoal) -> Pool:
    """Return the pool. Raises ValueError for a layout that no serving pool can have, and for MTP without a module."""
    check_pool(layout, spec)
    if goal.mtp_acceptance is not None and not spec.num_nextn_predict_layers:
        raise ValueError("mtp_acceptance is given, but the model has no MTP module: leave it out")
    held = inference_memory(spec, layout, fp8=bool(recipe.sites), mtp=goal.mtp_acceptance is not None)
    return Pool(spec=spec, cluster=cluster, layout=layout, recipe=recipe, goal=goal, held=held)


def evaluate_decode(spec: ModelSpec, cluster: Cluster, layout: Layout, recipe: Recipe, goal: ServingGoal) -> DecodePlan:
    """Plan the pool with the goal's `requests_per_gpu`, or as many as memory holds and `output_speed` allows.

    Raises ValueError for an illegal layout and for a speed that even one request per micro-batch does not reach, and
    DoesNotFitError for a model or requests that do not fit.
    """
    check_layout(layout, spec, cluster.gpus)
    return fullest(decode_pool(spec, cluster, layout, recipe, goal))


def fullest(pool: Pool) -> DecodePlan:
    """Plan `pool` with the requests asked for, or as many as memory and speed allow. Raises DoesNotFitError if memory
    allows none, and ValueError if speed does."""
    goal, ep, tp = pool.goal, pool.layout.ep, pool.layout.tp
    if goal.requests_per_gpu is not None:
        return step_of(pool, goal.requests_per_gpu)
    most = pool.most_that_fit()
    least = step_of(pool, min(goal.microbatches, max(most, 1)))
    allowed = goal.step_seconds_allowed
    if allowed is None:
        return step_of(pool, most)
    if least.step_seconds.value > allowed:
        raise ValueError(
            f"output_speed = {goal.output_speed:g} tokens/s: with ep = {ep}, tp = {tp} on {pool.cluster.name} a "
            f"request gets {least.speed.value:.3g} tokens/s at best ({least.requests} per GPU, context "
            f"{goal.mean_context:g}); ask for less"
        )
    return _most_requests(pool, least, step_of(pool, most), allowed)


def _most_requests(pool: Pool, low: DecodePlan, high: DecodePlan, allowed: float) -> DecodePlan:
    """Return the plan with the most requests whose step takes at most `allowed` seconds, as `low`'s does."""
    if high.step_seconds.value <= allowed:
        return high
    while high.requests - low.requests > 1:
        # A step's time is nearly linear in requests, so the secant's place and the next one enclose the answer.
        slope = (high.step_seconds.value - low.step_seconds.value) / (high.requests - low.requests)
        guess = low.requests + int((allowed - low.step_seconds.value) / slope) if slope > 0 else 0
        for requests in (guess, guess + 1):
            if low.requests < requests < high.requests:
                plan = step_of(pool, requests)
                low, high = (plan, high) if plan.step_seconds.value <= allowed else (low, plan)
        if high.requests - low.requests > 1:
            plan = step_of(pool, (low.requests + high.requests) // 2)
            low, high = (plan, high) if plan.step_seconds.value <= allowed else (low, plan)
    return low


def step_of(pool: Pool, requests: int) -> DecodePlan:
    """Plan a step of `requests` per GPU. Raises DoesNotFitError if these do not fit."""
    fit = pool.fit(requests)
    if fit < requests:
        raise _no_fit(pool, requests)
    spec, goal, sequences = pool.spec, pool.goal, requests * pool.layout.tp
    microbatches = min(goal.microbatches, requests) if pool.exchanges else 1
    work = Work(
        spec=spec,
        cluster=pool.cluster,
        layout=pool.layout,
        recipe=pool.recipe,
        phase="decode",
        tokens=pool.tokens_per_request * sequences / microbatches,
        context=goal.mean_context,
        sequences=sequences / microbatches,
        low_latency=goal.exchange == "low-latency",
        imbalance=goal.expert_imbalance,
        traffic=pool.traffic,
    )
    pieces, dense = layer_pieces(work), spec.num_hidden_layers - spec.num_moe_layers
    all_tokens = replace(work, tokens=pool.tokens_per_request * sequences, sequences=sequences)
    mtp = NOTHING
    if goal.mtp_acceptance is not None:
        mtp = overlap(mtp_pieces(work), "decode", spec.num_nextn_predict_layers, microbatches).seconds
    return DecodePlan(
        work=work,
        goal=goal.model_copy(update={"microbatches": microbatches}),
        requests=requests,
        pieces=pieces,
        layers=overlap(pieces, "decode", spec.num_moe_layers, microbatches),
        dense_seconds=dense * microbatches * dense_layer_seconds(work) if dense else NOTHING,
        ends_seconds=ends_seconds(all_tokens, all_tokens.tokens),
        mtp_seconds=mtp,
        memory=pool.memory(requests),
        requests_that_fit=fit,
    )


def _no_fit(pool: Pool, requests: int) -> DoesNotFitError:
    memory, gpu = pool.memory(requests), pool.cluster.gpu
    holding = Holding(
        weights=memory.weights,
        cache=requests * pool.layout.tp * pool.goal.mean_context * memory.cache_per_token,
        buffers=memory.buffers,
        runtime=gpu.runtime_bytes,
    )
    whose = f"a decoding GPU for {requests} requests of context {pool.goal.mean_context:.0f}"
    return DoesNotFitError("decode", whose, pool.layout, holding, gpu)
