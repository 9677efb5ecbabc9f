"""How long one micro-batch takes on one stage: forward, both halves of the backward pass, and an overlapped pair.

A layer is four pieces of arithmetic and two exchanges in each direction; F of the forward, B of the gradients of
inputs (recomputation included), W of the gradients of weights:

    attn    from the residual to what is dispatched: norms, attention, gate
    mlp     experts and shared experts (dense layers: all of their feed-forward)
    dispatch, combine     backward they change places: the outputs' gradient is dispatched, the inputs' combined

Alone, a forward or backward runs its pieces one after the other and every exchange is waited for. In a pair two
streams run at once, in the order that DeepSeek's profile shows for a layer [profile-data]:

    arithmetic     attn(F)   mlp(B)   mlp(W)   mlp(F)   attn(B)   attn(W)
    exchanges      dispatch(B)   dispatch(F)   combine(B)   combine(F)

Exchanges take their share of the multiprocessors from the arithmetic throughout [V3 §3.2.2]. All times are of equal
loads: what uneven experts add is not modelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest

from dovetail.cost.layer_ops import embedding_ops, head_ops, layer_ops, mtp_ops
from dovetail.cost.ops import Collective, Exchange, Op
from dovetail.cost.roofline import op_time
from dovetail.cost.stages import Stage
from dovetail.network.collectives import collective_time, exchange_time
from dovetail.spec.band import Band, sum_bands
from dovetail.spec.hardware import Cluster
from dovetail.spec.layout import Layout
from dovetail.spec.model import ModelSpec
from dovetail.spec.precision import Recipe

COMMUNICATION_MULTIPROCESSORS = 20  # of an H800's 132 [V3 §3.2.2]
NOTHING = Band.exact(0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What every stage of a training step runs on."""

    spec: ModelSpec
    cluster: Cluster
    layout: Layout
    recipe: Recipe
    sequence_length: int

    @property
    def tokens(self) -> int:
        """Of one micro-batch."""
        return self.layout.microbatch_size * self.sequence_length

    @property
    def multiprocessors(self) -> int:
        """Left to arithmetic: where experts are exchanged, the same share is taken as on an H800."""
        count = self.cluster.gpu.multiprocessors
        return count if self.layout.ep == 1 else max(1, round(count * (1 - COMMUNICATION_MULTIPROCESSORS / 132)))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSeconds:
    """One layer's pieces."""

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


PIECES = tuple(field.name for field in fields(LayerSeconds))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSeconds:
    """One micro-batch on one stage, alone."""

    forward: Band
    input_backward: Band
    weight_backward: Band
    layers: tuple[LayerSeconds, ...]

    @property
    def backward(self) -> Band:
        return self.input_backward + self.weight_backward


class Costs:
    """The seconds of layers, each kind reckoned once: a search asks for the same ones in thousands of layouts. For one
    model, cluster, recipe and sequence length."""

    def __init__(self) -> None:
        self._found: dict[tuple[object, ...], dict[str, Band]] = {}

    def stage(self, work: Workload, stage: Stage) -> StageSeconds:
        """The pieces of `stage`, its ends included, and their sums."""
        layers = [self._layer(work, "experts" if work.spec.is_moe_layer(layer) else "dense") for layer in stage.layers]
        if stage.has_embedding:
            layers[0] = _with(layers[0], self._pieces(work, "embedding"))
        if stage.has_head:
            layers += [self._layer(work, "mtp")] * stage.mtp_modules(work.spec)
            layers[-1] = _with(layers[-1], self._pieces(work, "head"))
        return StageSeconds(
            forward=_sum(layers, "attn_f", "dispatch_f", "mlp_f", "combine_f"),
            input_backward=_sum(layers, "dispatch_b", "mlp_b", "combine_b", "attn_b"),
            weight_backward=_sum(layers, "mlp_w", "attn_w"),
            layers=tuple(layers),
        )

    def _layer(self, work: Workload, kind: str) -> LayerSeconds:
        return LayerSeconds(**self._pieces(work, kind))

    def _pieces(self, work: Workload, kind: str) -> dict[str, Band]:
        layout = work.layout
        key = kind, layout.ep, layout.tp, layout.microbatch_size
        if key not in self._found:
            self._found[key] = _by_piece(work, _ops(work, kind))
        return self._found[key]


def pair_seconds(forward: StageSeconds, backward: StageSeconds) -> Band:
    """A forward on one stage overlapped with a backward on the other that its rank holds."""
    ends = (_replay(forward, backward, end) for end in ("low", "value", "high"))
    low, value, high = ends
    return Band(value, min(low, value), max(value, high))


def exchange_seconds(stage: StageSeconds) -> Band:
    """All exchanges of a forward and a backward on the stage."""
    return _sum(stage.layers, "dispatch_f", "combine_f", "dispatch_b", "combine_b")


def _replay(forward: StageSeconds, backward: StageSeconds, end: str) -> float:
    """Two streams, each in its order; a piece starts when its stream and what it needs are ready."""
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


def _ops(work: Workload, kind: str) -> tuple[Op, ...]:
    """Of a layer with experts or without, an MTP module, or an end of the model. Layers of one kind are alike."""
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


def _by_piece(work: Workload, ops: Sequence[Op]) -> dict[str, Band]:
    pieces: dict[str, list[Band]] = {}
    for op in ops:
        pieces.setdefault(_piece(op), []).append(_seconds(work, op))
    return {name: sum_bands(bands) for name, bands in pieces.items()}


def _piece(op: Op) -> str:
    letter = {"forward": "f", "dgrad": "b", "wgrad": "w"}[op.pass_]
    if isinstance(op, Exchange):
        return f"{op.name}_{letter}"
    return f"mlp_{letter}" if op.part in ("mlp", "experts", "shared", "head") else f"attn_{letter}"


def _seconds(work: Workload, op: Op) -> Band:
    if isinstance(op, Exchange):
        return exchange_time(op, work.cluster).seconds
    if isinstance(op, Collective):
        return collective_time(op, work.cluster).seconds
    return op_time(op, work.cluster.gpu, work.multiprocessors).seconds


def _with(layer: LayerSeconds, more: dict[str, Band]) -> LayerSeconds:
    both = {name: getattr(layer, name) for name in PIECES}
    for name, band in more.items():
        both[name] = both[name] + band
    return LayerSeconds(**both)


def _sum(layers: Sequence[LayerSeconds], *names: str) -> Band:
    return sum_bands(getattr(layer, name) for layer in layers for name in names)
