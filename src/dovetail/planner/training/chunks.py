"""Times one micro-batch on one stage: forward, both halves of the backward, and overlapped pairs.

A layer is two pieces of arithmetic and two exchanges in each direction. F is the forward pass, B the gradients of
inputs (recomputation included), W the gradients of weights:

    attn    the work from combine to dispatch: the sum, norms, attention, gate, quantisation; and the same backward
    mlp     experts and shared experts (in dense layers the whole feed-forward)
    dispatch, combine     backward they change places: the outputs' gradient is dispatched, the inputs' combined

The embedding is part of the first layer's attn. The head and the losses, those of MTP modules too, are a layer of mlp
alone after the last layer: they come last in the forward pass and first in the backward pass.

Alone, a forward or backward runs its pieces one after the other and waits for every exchange. In a pair two streams run
at once, in the order that DeepSeek's profile shows for a layer [profile-data]:

    arithmetic     attn(F)   mlp(B)   mlp(W)   mlp(F)   attn(B)   attn(W)
    exchanges      dispatch(B)   dispatch(F)   combine(B)   combine(F)

(The profile names the backward exchanges by their forward ones: its combine(B) dispatches.) The layers of the forward,
in order, are paired with those of the backward, in reverse; the layers that one has more run alone. Exchanges take
their share of the multiprocessors from the arithmetic all the time [V3 §3.2.2]. Sums and gathers of tensor-parallel
ranks count as arithmetic, which waits for them. Not modelled: that these share the links within a node with a pair's
exchanges, and what uneven experts add, since all loads are taken to be equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from typing import TYPE_CHECKING

from dovetail.cost.memory.stages import stages
from dovetail.cost.ops.layer import embedding_ops, head_ops, layer_ops, mtp_ops
from dovetail.cost.ops.ops import Collective, Elementwise, Exchange, Gemm, Op
from dovetail.planner.operation import operation_time
from dovetail.spec.band import Band, sum_bands
from dovetail.spec.hardware import Cluster
from dovetail.spec.layout import Layout
from dovetail.spec.model import ModelSpec
from dovetail.spec.precision import Recipe

if TYPE_CHECKING:
    from dovetail.network.delivery.layout_traffic import LayoutTraffic

COMMUNICATION_MULTIPROCESSORS = 20  # of an H800's 132 [V3 §3.2.2]
NOTHING = Band.exact(0.0)

# Operations on experts' inputs and outputs on the tokens' own rank: before the dispatch, which waits for them (in the
# backward pass they count to the layer above), and after the combine.
AROUND_EXCHANGES = ("quantise to dispatch", "add experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The model, cluster, layout and precision of a training step."""

    spec: ModelSpec
    cluster: Cluster
    layout: Layout
    recipe: Recipe
    sequence_length: int
    recompute: bool = True  # of norms and attention's up-projections, as in DeepSeek-V3 [V3 §3.2.3]
    label: str = ""  # what distinguishes it from others that it is compared with
    traffic: LayoutTraffic | None = None  # the exchanges of all groups at once; None: closed forms

    @property
    def tokens(self) -> int:
        """The tokens of one micro-batch."""
        return self.layout.microbatch_size * self.sequence_length

    @property
    def multiprocessors(self) -> int:
        """The multiprocessors left to arithmetic; exchanges with experts take the same share of them as on an H800."""
        count = self.cluster.gpu.multiprocessors
        return count if self.layout.ep == 1 else max(1, round(count * (1 - COMMUNICATION_MULTIPROCESSORS / 132)))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSeconds:
    """The seconds of one layer's pieces."""

    attn_f: Band = NOTHING
    mlp_f: Band = NOTHING
    attn_b: Band = NOTHING
    mlp_b: Band = NOTHING
    attn_w: Band = NOTHING
    mlp_w: Band = NOTHING
    dispatch_f: Band = NOTHING
    combine_f: Band = NOTHING
    dispatch_b: Band = NOTHING  # of the outputs' gradient
    combine_b: Band = NOTHING
    collectives: Band = NOTHING  # sums and gathers of tensor-parallel ranks in all passes, part of the pieces above


PIECES = tuple(field.name for field in fields(LayerSeconds))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSeconds:
    """The seconds of one micro-batch on one stage, alone."""

    forward: Band
    input_backward: Band
    weight_backward: Band
    layers: tuple[LayerSeconds, ...]

    @property
    def backward(self) -> Band:
        return self.input_backward + self.weight_backward

    @property
    def collectives(self) -> Band:
        """The seconds of sums and gathers between tensor-parallel ranks, in all passes."""
        return _sum(self.layers, "collectives")

    @property
    def arithmetic(self) -> Band:
        """The seconds of all passes without exchanges and collectives."""
        names = ("attn_f", "mlp_f", "attn_b", "mlp_b", "attn_w", "mlp_w")
        both, part = _sum(self.layers, *names), self.collectives
        return Band(both.value - part.value, both.low - part.low, both.high - part.high)


StageKey = tuple[int, int, bool, bool]  # number of layers without and with experts, embedding, head: all that matters


class Costs:
    """The seconds of layers, stages and pairs, each kind computed once, because a search asks for the same ones in
    thousands of layouts. They are for one model, cluster, recipe and sequence length."""

    def __init__(self) -> None:
        self._of: Workload | None = None
        self._pieces: dict[tuple[object, ...], dict[str, Band]] = {}
        self._stages: dict[tuple[object, ...], StageSeconds] = {}
        self._pairs: dict[tuple[object, ...], Band] = {}

    def stages(self, work: Workload) -> list[StageSeconds]:
        """Return the seconds of every stage, with embedding and head. Raises ValueError if attention is not MLA."""
        return [self._stage(work, key) for key in _stage_keys(work)]

    def pairs(self, work: Workload) -> list[Band]:
        """Return `pair_seconds` of a forward on each stage and a backward on the mirrored one."""
        keys = _stage_keys(work)
        return [self._pair(work, front, back) for front, back in zip(keys, reversed(keys), strict=True)]

    def _stage(self, work: Workload, stage: StageKey) -> StageSeconds:
        key = *stage, *self._layout_key(work)
        if key not in self._stages:
            self._stages[key] = self._reckoned(work, stage)
        return self._stages[key]

    def _pair(self, work: Workload, front: StageKey, back: StageKey) -> Band:
        key = *front, *back, *self._layout_key(work)
        if key not in self._pairs:
            self._pairs[key] = pair_seconds(self._stage(work, front), self._stage(work, back))
        return self._pairs[key]

    def _reckoned(self, work: Workload, stage: StageKey) -> StageSeconds:
        dense, with_experts, has_embedding, has_head = stage
        kinds = ["dense"] * dense + ["experts"] * with_experts
        if has_head:
            kinds += ["mtp"] * work.spec.num_nextn_predict_layers
        pieces = [dict(self._kind(work, kind)) for kind in kinds]
        if has_embedding:
            _add(pieces[0], self._kind(work, "embedding"))
        if has_head:
            heads = dict(self._kind(work, "head"))
            for each in pieces:  # of MTP modules
                _add(heads, {f"mlp_{letter}": each.pop(f"head_{letter}", NOTHING) for letter in "fbw"})
            pieces.append(heads)
        layers = [LayerSeconds(**each) for each in pieces]
        return StageSeconds(
            forward=_sum(layers, "attn_f", "dispatch_f", "mlp_f", "combine_f"),
            input_backward=_sum(layers, "dispatch_b", "mlp_b", "combine_b", "attn_b"),
            weight_backward=_sum(layers, "mlp_w", "attn_w"),
            layers=tuple(layers),
        )

    def _kind(self, work: Workload, kind: str) -> dict[str, Band]:
        key = kind, *self._layout_key(work)
        if key not in self._pieces:
            self._pieces[key] = _by_piece(work, operations(work, kind), is_end=kind == "head")
        return self._pieces[key]

    def _layout_key(self, work: Workload) -> tuple[int, int, int, int, bool]:
        first = self._of = self._of or work
        assert first.spec is work.spec and first.cluster is work.cluster and first.recipe is work.recipe
        assert first.sequence_length == work.sequence_length, "these costs are of another sequence length"
        assert first.recompute == work.recompute and first.traffic is work.traffic
        layout = work.layout
        return layout.ep, layout.tp, layout.microbatch_size, layout.redundant_experts, layout.adds_gradients


def pair_seconds(forward: StageSeconds, backward: StageSeconds) -> Band:
    """Return the seconds of a forward on one stage overlapped with a backward on the other stage of its rank."""
    ends = (_replay(forward, backward, end) for end in ("low", "value", "high"))
    low, value, high = ends
    return Band(value, min(low, value), max(value, high))


def _replay(forward: StageSeconds, backward: StageSeconds, end: str) -> float:
    """Replay two streams, each in its order; a piece starts when its stream is free and what it needs is done. (An
    exchange that sends nothing delays no piece: what waits for it has waited for the exchanges before it.)"""
    arithmetic = exchanges = combined_f = attn_b_done = 0.0
    absent = LayerSeconds()
    for front, back in zip_longest(forward.layers, reversed(backward.layers), fillvalue=absent):
        f, b = ({name: getattr(getattr(side, name), end) for name in PIECES} for side in (front, back))
        exchanges = sent_b = max(exchanges, attn_b_done) + b["dispatch_b"]
        arithmetic = attn_f_done = max(arithmetic, combined_f) + f["attn_f"]
        arithmetic = mlp_b_done = max(arithmetic, sent_b) + b["mlp_b"]
        exchanges = sent_f = max(exchanges, attn_f_done) + f["dispatch_f"]
        exchanges = combined_b = max(exchanges, mlp_b_done) + b["combine_b"]
        arithmetic += b["mlp_w"]
        arithmetic = mlp_f_done = max(arithmetic, sent_f) + f["mlp_f"]
        arithmetic = attn_b_done = max(arithmetic, combined_b) + b["attn_b"]
        arithmetic += b["attn_w"]
        exchanges = combined_f = max(exchanges, mlp_f_done) + f["combine_f"]
    return max(arithmetic, exchanges)


def operations(work: Workload, kind: str) -> Iterator[Op]:
    """Yield what a micro-batch runs in a layer ("dense", "experts"), an MTP module ("mtp") or an end ("embedding",
    "head"). Nothing that is kept is recomputed, and gradients are added if the layout adds any."""
    for op in _listed(work, kind):
        if isinstance(op, Gemm | Elementwise) and op.recomputed and not work.recompute:
            continue
        if isinstance(op, Gemm) and op.pass_ == "wgrad" and not work.layout.adds_gradients:
            op = replace(op, is_added=False)
        yield op


def _listed(work: Workload, kind: str) -> tuple[Op, ...]:
    """Return all operations of a kind of layer, an MTP module, or an end of the model. Layers of one kind are alike."""
    spec, layout, tokens = work.spec, work.layout, work.tokens
    if kind == "embedding":
        return embedding_ops(spec, layout, tokens, "training")
    if kind == "head":
        return head_ops(spec, layout, tokens, "training")
    length, sequences = work.sequence_length, layout.microbatch_size
    if kind == "mtp":
        return mtp_ops(spec, layout, work.recipe, tokens, "training", length, sequences)
    layer = spec.num_hidden_layers if kind == "experts" else 0
    return layer_ops(spec, layer, layout, work.recipe, tokens, "training", length, sequences)


def _by_piece(work: Workload, ops: Iterable[Op], is_end: bool) -> dict[str, Band]:
    """Return the seconds of each of `PIECES`, and those of an MTP module's head as head_f, head_b, head_w."""
    pieces: dict[str, list[Band]] = {}
    for op in ops:
        seconds, piece = (
            operation_time(op, work.cluster, work.multiprocessors, traffic=work.traffic).seconds,
            _piece(op),
        )
        pieces.setdefault(piece.replace("head", "mlp") if is_end else piece, []).append(seconds)
        if isinstance(op, Collective):
            pieces.setdefault("collectives", []).append(seconds)
    return {name: sum_bands(bands) for name, bands in pieces.items()}


def _piece(op: Op) -> str:
    letter = {"forward": "f", "dgrad": "b", "wgrad": "w"}[op.pass_]
    if isinstance(op, Exchange):
        return f"{op.name}_{letter}"
    if op.part == "head":
        return f"head_{letter}"
    is_mlp = op.part in ("mlp", "experts", "shared") and op.name not in AROUND_EXCHANGES
    return f"mlp_{letter}" if is_mlp else f"attn_{letter}"


def _stage_keys(work: Workload) -> list[StageKey]:
    keys = []
    for stage in stages(work.spec, work.layout, work.sequence_length):
        with_experts = sum(map(work.spec.is_moe_layer, stage.layers))
        keys.append((len(stage.layers) - with_experts, with_experts, stage.has_embedding, stage.has_head))
    return keys


def _add(pieces: dict[str, Band], more: dict[str, Band]) -> None:
    for name, band in more.items():
        pieces[name] = pieces[name] + band if name in pieces else band


def _sum(layers: Sequence[LayerSeconds], *names: str) -> Band:
    return sum_bands(getattr(layer, name) for layer in layers for name in names)
