"""Bytes on the ranks of a pipeline in training.

Weights are held in BF16 (norms and router in FP32) and quantised when they are used: FP8 copies in both orders that
products need would not fit beside the rest for DeepSeek-V3 on 80 GB. Gradients add up in FP32; a gradient to which
nothing is added is in BF16. Master weights (FP32) and the two moments (in the recipe's format: BF16 [V3 §3.3.3]) are
divided among all ranks that hold the same weight (ZeRO-1): data-parallel ranks, the replicas of routed experts, and
both copies of a stage where DualPipe has two. With `zero = 0` in the layout every rank has them whole. The moving
average is in the host's memory [V3 §3.2.3].

Activations are those of `cost.memory.activations` with its recomputation, times the micro-batches in flight:

    1f1b, zb1p     pp - rank, and pp, of the rank's stage [V3 Table 2]
    interleaved    (chunks - 1) pp + 2 (pp - rank) - 1 of its chunks, in the mix that takes most [arXiv 2104.04473]
    dualpipe       pp - rank of stage `rank`, and rank + 1 of stage pp - 1 - rank: pp + 1 together
    dualpipev      the same with 2 pp stages

Experts' outputs are in that list but not kept here: the gradient of the gate's weights needs them only if the weights
are applied after the experts, and not in their SwiGLU [TileKernels]. Buffers are an estimate for one layer forward and
one backward at the same time. The runtime (CUDA's context, communicators) is not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from dovetail.cost.memory.activations import SavedTensor, saved_by_layer, saved_by_part
from dovetail.cost.memory.held import Held, held_by_ends, held_by_layer, held_by_mtp
from dovetail.cost.memory.process import moment_bytes
from dovetail.cost.memory.stages import Stage, stages
from dovetail.cost.ops.ops import BF16, FP32
from dovetail.spec.layout import Layout
from dovetail.spec.model import Mla, ModelSpec
from dovetail.spec.precision import Recipe

BAND = (0.9, 1.15)  # on activations and buffers, for unequal loads of experts and the allocator's holes; unverified


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes of one GPU by use. `host_average`, the share of the moving average in the host's memory, is in no total."""

    rank: int
    weights: int  # BF16; norms and router FP32
    gradients: int
    master_weights: int
    moments: int
    activations: int
    buffers: int
    host_average: int
    in_flight: tuple[tuple[int, int], ...]  # (stage, micro-batches)

    @property
    def state(self) -> int:
        return self.weights + self.gradients + self.master_weights + self.moments

    @property
    def total(self) -> int:
        return self.state + self.activations + self.buffers

    @property
    def band(self) -> tuple[int, int]:
        """The least and the most to expect: state is exact, activations and buffers are within `BAND`."""
        moving = self.activations + self.buffers
        return self.state + int(BAND[0] * moving), self.state + int(BAND[1] * moving)


@dataclass(frozen=True, slots=True)
class _State:
    weights: int = 0
    gradients: int = 0
    master_weights: int = 0
    moments: int = 0
    host_average: int = 0

    def plus(self, other: _State, times: int = 1) -> _State:
        return _State(
            self.weights + times * other.weights,
            self.gradients + times * other.gradients,
            self.master_weights + times * other.master_weights,
            self.moments + times * other.moments,
            self.host_average + times * other.host_average,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kinds:
    """The state of a layer and the bytes that a token keeps in it, by whether it has experts, and those of the rest.

    A kind of layer that the model lacks has no entry.
    """

    moment_bytes: int
    states: dict[bool, _State]
    kept: dict[bool, int]
    mtp_state: _State
    mtp_kept: int
    head_kept: int
    codes: int  # bytes of the last layer's weights in FP8


def rank_memory(
    spec: ModelSpec, layout: Layout, recipe: Recipe, sequence_length: int, rank: int = 0, recompute: bool = True
) -> RankMemory:
    """Return the bytes on pipeline rank `rank`.

    Micro-batches are `layout.microbatch_size` sequences of `sequence_length` tokens. Raises ValueError if attention is
    not MLA.
    """
    kinds, all_stages = _kinds(spec, layout, recipe, recompute), stages(spec, layout, sequence_length)
    return _rank(spec, layout, sequence_length, rank, kinds, all_stages)


def pipeline_memory(
    spec: ModelSpec, layout: Layout, recipe: Recipe, sequence_length: int, recompute: bool = True
) -> tuple[RankMemory, ...]:
    """Return `rank_memory` for all ranks of one pipeline."""
    kinds, all_stages = _kinds(spec, layout, recipe, recompute), stages(spec, layout, sequence_length)
    return tuple(_rank(spec, layout, sequence_length, rank, kinds, all_stages) for rank in range(layout.pp))


def kept_by_stage(
    spec: ModelSpec, recipe: Recipe, stage: Stage, recompute: bool = True
) -> tuple[tuple[str, SavedTensor], ...]:
    """Return (part, tensor) of all that a stage keeps of one micro-batch for its backward pass; bytes are per token."""
    kept = [(f"layer {layer}", tensor) for layer in stage.layers for tensor in _kept(spec, layer, recipe, recompute)]
    if stage.has_head:
        kept += _kept_by_head_and_mtp(spec, recipe, recompute)
    return tuple(kept)


def in_flight(layout: Layout, rank: int, stage: int) -> int:
    """Return the most micro-batches of which `stage` on `rank` keeps activations at the same time."""
    if layout.schedule == "interleaved":
        chunk = layout.stages_of(rank).index(stage)
        return max(counts[chunk] for counts in _interleaved(layout.pp, layout.chunks, layout.microbatches, rank))
    most = layout.pp if layout.schedule == "zb1p" else layout.num_stages - stage
    return min(most, layout.microbatches)


def _flights(layout: Layout, rank: int, kept: Sequence[int]) -> tuple[int, ...]:
    """Return the micro-batches in flight on all of the rank's stages at the moment when they keep most together.

    `kept` are the bytes per token that each stage keeps of a micro-batch.
    """
    if layout.schedule != "interleaved":
        return tuple(in_flight(layout, rank, stage) for stage in layout.stages_of(rank))
    moments = _interleaved(layout.pp, layout.chunks, layout.microbatches, rank)
    return max(moments, key=lambda counts: sum(count * each for count, each in zip(counts, kept, strict=True)))


@lru_cache(maxsize=1024)
def _interleaved(pp: int, chunks: int, microbatches: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """Return the micro-batches in flight on each of the rank's chunks, for every state of the schedule after a forward.

    Rounds of pp micro-batches go through one chunk after the other, and backward in the reverse order, with `ahead`
    forwards before the first backward. After two rounds through all chunks the states repeat.
    """
    work = chunks * microbatches
    ahead = min((chunks - 1) * pp + 2 * (pp - 1 - rank), work)
    counts = [0] * chunks
    for visit in range(ahead):
        counts[visit // pp % chunks] += 1
    moments = {tuple(counts): None}
    for turn in range(min(work, 2 * chunks * pp)):
        if ahead + turn < work:
            counts[(ahead + turn) // pp % chunks] += 1
            moments[tuple(counts)] = None
        counts[chunks - 1 - turn // pp % chunks] -= 1
    return tuple(moments)


def _rank(
    spec: ModelSpec, layout: Layout, sequence_length: int, rank: int, kinds: _Kinds, all_stages: tuple[Stage, ...]
) -> RankMemory:
    tokens = layout.microbatch_size * sequence_length
    numbers = layout.stages_of(rank)
    mine = [all_stages[index] for index in numbers]
    has_head = any(stage.has_head for stage in mine)
    state = _state(layout, held_by_ends(spec, layout, mine), kinds.moment_bytes)
    kept = [kinds.head_kept + kinds.mtp_kept if stage.has_head else 0 for stage in mine]
    for index, stage in enumerate(mine):
        with_experts = sum(map(spec.is_moe_layer, stage.layers))
        for has_experts, layers in ((True, with_experts), (False, len(stage.layers) - with_experts)):
            if layers:
                state = state.plus(kinds.states[has_experts], layers)
                kept[index] += layers * kinds.kept[has_experts]
        if stage.has_head:
            state = state.plus(kinds.mtp_state, stage.mtp_modules(spec))
    flights = _flights(layout, rank, kept)
    per_token = sum(count * each for count, each in zip(flights, kept, strict=True))
    return RankMemory(
        rank=rank,
        weights=state.weights,
        gradients=state.gradients,
        master_weights=state.master_weights,
        moments=state.moments,
        host_average=state.host_average,
        activations=per_token * tokens // layout.tp,
        buffers=_buffers(spec, layout, tokens, has_head) + kinds.codes,
        in_flight=tuple(zip(numbers, flights, strict=True)),
    )


def _kinds(spec: ModelSpec, layout: Layout, recipe: Recipe, recompute: bool) -> _Kinds:
    layers = {spec.is_moe_layer(layer): layer for layer in range(spec.num_hidden_layers)}
    rest, moment = _kept_by_head_and_mtp(spec, recipe, recompute), moment_bytes(recipe)
    held = {kind: held_by_layer(spec, layer, layout) for kind, layer in layers.items()}
    last = held[spec.is_moe_layer(spec.num_hidden_layers - 1)]
    return _Kinds(
        moment_bytes=moment,
        states={kind: _state(layout, each, moment) for kind, each in held.items()},
        kept={
            kind: sum(tensor.bytes for tensor in _kept(spec, layer, recipe, recompute))
            for kind, layer in layers.items()
        },
        mtp_state=_state(layout, held_by_mtp(spec, layout), moment) if spec.num_nextn_predict_layers else _State(),
        mtp_kept=sum(tensor.bytes for part, tensor in rest if part != "ends"),
        head_kept=sum(tensor.bytes for part, tensor in rest if part == "ends"),
        codes=sum(each.elements for each in last if each.site),
    )


def _kept(spec: ModelSpec, layer: int, recipe: Recipe, recompute: bool) -> list[SavedTensor]:
    return [each for each in saved_by_layer(spec, layer, recipe, recompute) if each.name != "expert outputs"]


def _kept_by_head_and_mtp(spec: ModelSpec, recipe: Recipe, recompute: bool) -> list[tuple[str, SavedTensor]]:
    without_layers = spec.model_copy(update={"num_hidden_layers": 0})
    if spec.moe is not None:
        moe = spec.moe.model_copy(update={"first_k_dense_replace": 0})
        without_layers = without_layers.model_copy(update={"moe": moe})
    return [
        (part.name, tensor)
        for part in saved_by_part(without_layers, recipe, recompute)
        for tensor in part.tensors
        if tensor.name != "expert outputs"
    ]


def _state(layout: Layout, held: Iterable[Held], moment_bytes: int) -> _State:
    weights = gradients = master = moments = average = 0
    for each in held:
        weights += (FP32 if each.is_wide else BF16) * each.elements
        if each.has_gradient:
            holders = each.replicas * layout.stage_copies if layout.zero else 1
            share = -(-each.elements // holders)
            gradients += (FP32 if each.is_wide or layout.adds_gradients else BF16) * each.elements
            master += 0 if each.is_wide else FP32 * share
            moments += 2 * moment_bytes * share
            average += FP32 * share
    return _State(weights, gradients, master, moments, average)


def _buffers(spec: ModelSpec, layout: Layout, tokens: int, has_head: bool) -> int:
    """Return the bytes of work buffers for one layer forward and one backward at the same time, in BF16.

    These are rows at the experts before and after their products, both halves of SwiGLU's input and their gradients;
    recomputed queries, keys and values and their gradients; and logits on the last stage. The codes of a layer's
    weights come on top (`_Kinds.codes`).
    """
    mla, hidden, moe = spec.attention, spec.hidden_size, spec.moe
    assert isinstance(mla, Mla)
    rows, width = (moe.num_experts_per_tok, moe.moe_intermediate_size) if moe else (1, spec.intermediate_size)
    experts = 2 * rows * (2 * hidden + 5 * width)
    heads = 2 * mla.num_attention_heads * (2 * mla.qk_head_dim + 2 * mla.v_head_dim)
    logits = spec.vocab_size if has_head else 0
    return BF16 * tokens * (experts + heads + logits) // layout.tp
