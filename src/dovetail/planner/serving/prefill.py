"""Plans a pool of GPUs that reads prompts: the time of a step, and the time to first token.

    step    = embedding + dense layers + layers with experts, two micro-batches overlapped + head of a token per prompt
    tokens  = computed tokens / step; input tokens include those found in the cache: computed / (1 - hits)
    TTFT    = the wait for the running step (half a step on average), the prompt's own steps, and the transfer of its
              latents to the pool that decodes

Left out: queues of more prompts than a step takes, and reading stored latents, which 3FS does at up to 40 GB/s per
client beside the computation [3FS].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dovetail.cost.memory.inference import InferenceMemory, inference_memory
from dovetail.network.demands.closed_forms import send_time
from dovetail.planner.serving.goal import ServingGoal
from dovetail.planner.serving.memory import DoesNotFitError, Holding
from dovetail.planner.serving.microbatches import NOTHING, Overlapped, Pieces, overlap
from dovetail.planner.serving.pieces import Work, dense_layer_seconds, ends_seconds, layer_pieces, mtp_pieces
from dovetail.spec.band import Band
from dovetail.spec.hardware import Cluster
from dovetail.spec.layout import Layout, check_layout
from dovetail.spec.model import Mla, ModelSpec
from dovetail.spec.precision import Recipe

if TYPE_CHECKING:
    from dovetail.network.delivery.layout_traffic import LayoutTraffic


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPlan:
    """A prefill pool's step. Times are in seconds; tokens are those of one GPU, of which tp share theirs."""

    work: Work  # of one micro-batch
    goal: ServingGoal
    pieces: Pieces  # of one layer with experts and one micro-batch
    layers: Overlapped  # all layers with experts
    dense_seconds: Band  # all layers without experts
    ends_seconds: Band
    mtp_seconds: Band
    memory: InferenceMemory
    activation_bytes: float

    @property
    def layout(self) -> Layout:
        return self.work.layout

    @property
    def tokens_per_step(self) -> int:
        """The tokens that one GPU computes in a step."""
        return self.goal.prefill_tokens

    @property
    def shared_tokens(self) -> int:
        """The tokens that the tp GPUs with the same prompts compute in a step."""
        return self.tokens_per_step * self.layout.tp

    @property
    def step_seconds(self) -> Band:
        return self.layers.seconds + self.dense_seconds + self.ends_seconds + self.mtp_seconds

    @property
    def computed_per_second(self) -> Band:
        """The computed tokens per second of one GPU."""
        return self.tokens_per_step / self.step_seconds

    @property
    def input_per_second(self) -> Band:
        """The input tokens per second of one GPU, those found in the cache included."""
        return self.computed_per_second / (1 - self.goal.cache_hit)

    @property
    def computed_per_node(self) -> Band:
        return self.work.cluster.gpus_per_node * self.computed_per_second

    @property
    def input_per_node(self) -> Band:
        return self.work.cluster.gpus_per_node * self.input_per_second

    @property
    def steps_per_prompt(self) -> int:
        return math.ceil(self.goal.computed_per_prompt / self.shared_tokens)

    @property
    def sampled(self) -> float:
        """The number of prompts whose last token goes through the head in a step."""
        return max(1.0, self.shared_tokens / self.goal.computed_per_prompt)

    @property
    def transfer_seconds(self) -> Band:
        """The seconds to send a prompt's latents to the pool that decodes, over one GPU's link."""
        return send_time(self.goal.prompt * self.memory.cache_per_token, self.work.cluster).seconds

    @property
    def ttft(self) -> Band:
        """The seconds to the first token; its band goes from no wait to a wait of a whole step."""
        step, own = self.step_seconds, self.steps_per_prompt
        waited = Band((own + 0.5) * step.value, own * step.low, (own + 1) * step.high)
        return waited + self.transfer_seconds

    @property
    def seconds_by_use(self) -> dict[str, Band]:
        """The parts of a step's time, which add up to it."""
        count, pieces = self.work.spec.num_moe_layers * self.goal.microbatches, self.pieces
        return {
            "attention and gate": count * (pieces.before + pieces.core),
            "experts": count * pieces.experts,
            "shared experts": count * pieces.shared,
            "waiting for exchanges": self.layers.exposed,
            "dense layers": self.dense_seconds,
            "embedding and head": self.ends_seconds,
            "MTP": self.mtp_seconds,
        }


def evaluate_prefill(
    spec: ModelSpec,
    cluster: Cluster,
    layout: Layout,
    recipe: Recipe,
    goal: ServingGoal,
    traffic: LayoutTraffic | None = None,
) -> PrefillPlan:
    """Plan the pool. Raises ValueError for an illegal layout, and DoesNotFitError for a model that does not fit."""
    check_layout(layout, spec, cluster.gpus)
    check_pool(layout, spec)
    tokens, dense = goal.prefill_tokens * layout.tp, spec.num_hidden_layers - spec.num_moe_layers
    sequences = tokens / goal.computed_per_prompt
    work = Work(
        spec=spec,
        cluster=cluster,
        layout=layout,
        recipe=recipe,
        phase="prefill",
        tokens=tokens / goal.microbatches,
        context=goal.prompt,
        sequences=sequences / goal.microbatches,
        low_latency=False,
        imbalance=goal.expert_imbalance,
        traffic=traffic,
    )
    has_mtp = goal.mtp_acceptance is not None
    memory, activations = _fitting_memory(work, goal)
    pieces = layer_pieces(work)
    mtp = overlap(mtp_pieces(work), "prefill", spec.num_nextn_predict_layers, goal.microbatches)
    return PrefillPlan(
        work=work,
        goal=goal,
        pieces=pieces,
        layers=overlap(pieces, "prefill", spec.num_moe_layers, goal.microbatches),
        dense_seconds=dense * goal.microbatches * dense_layer_seconds(work) if dense else NOTHING,
        ends_seconds=ends_seconds(replace(work, tokens=tokens), max(1.0, sequences)),
        mtp_seconds=mtp.seconds if has_mtp else NOTHING,
        memory=memory,
        activation_bytes=activations,
    )


def activation_bytes(spec: ModelSpec, layout: Layout, tokens: float, keys: float) -> float:
    """Return the most bytes of activations on a rank, for `tokens` that tp ranks share.

    These are, for one micro-batch, attention's queries, keys and values or the experts' rows (FP8 in, both SwiGLU
    inputs, its output, BF16 out), whichever are more, and the residuals of both micro-batches.
    """
    mla = spec.attention
    assert isinstance(mla, Mla)
    core = 2 * mla.num_attention_heads / layout.tp * (tokens + keys) * (mla.qk_head_dim + mla.v_head_dim)
    rows = 0.0
    if spec.moe is not None:
        width = spec.moe.moe_intermediate_size
        rows = tokens / layout.tp * spec.moe.num_experts_per_tok * (3 * spec.hidden_size + 5 * width)
    return max(core, rows) + 2 * 4 * tokens / layout.tp * spec.hidden_size


def check_pool(layout: Layout, spec: ModelSpec) -> None:
    """Raise ValueError for what serving pools do not have: pipelines, and attention that is not latent."""
    if not isinstance(spec.attention, Mla):
        raise ValueError("grouped-query attention is described for counting; plans are made for latent attention")
    if layout.pp > 1:
        raise ValueError(f"pp = {layout.pp}: pools of serving have whole models, without pipelines; use pp = 1")


def _fitting_memory(work: Work, goal: ServingGoal) -> tuple[InferenceMemory, float]:
    """Return the memory and the bytes of activations. Raises DoesNotFitError if a GPU has not as much."""
    spec, layout, gpu = work.spec, work.layout, work.cluster.gpu
    has_mtp = goal.mtp_acceptance is not None
    memory = inference_memory(spec, layout, absorbed=False, fp8=bool(work.recipe.sites), mtp=has_mtp)
    activations = activation_bytes(spec, layout, work.tokens, work.sequences * goal.prompt)
    holding = Holding(
        weights=memory.weights,
        activations=activations,
        cache=work.sequences * goal.microbatches * goal.prompt * memory.cache_per_token,
        runtime=gpu.runtime_bytes,
    )
    if holding.total > gpu.memory_bytes:
        raise DoesNotFitError("prefill", "a prefill GPU", layout, holding, gpu)
    return memory, activations
