"""Times what a rank runs in a step of serving, as the pieces that two micro-batches overlap.

In decoding, exchanges need the multiprocessors too, for the kernels that issue and receive messages. DeepEP's own test
prints how long these run when nothing is waited for. A multiprocessor handles one token at a time [DeepEP,
internode_ll.cu], so the kernels are taken to last as long for few tokens as for one token per multiprocessor; at the
band's low end they shrink in proportion. They also quantise what is dispatched and sum what is combined, which is not
counted again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from dovetail.cost.ops.layer import embedding_ops, head_ops, layer_ops, mtp_ops
from dovetail.cost.ops.ops import Attention, Collective, Exchange, Op
from dovetail.network.demands.closed_forms import Mode
from dovetail.planner.operation import operation_time
from dovetail.planner.serving.microbatches import NOTHING, Pieces
from dovetail.spec.band import Band, sum_bands
from dovetail.spec.hardware import Cluster
from dovetail.spec.layout import Layout
from dovetail.spec.model import ModelSpec
from dovetail.spec.precision import Recipe

if TYPE_CHECKING:
    from dovetail.network.delivery.layout_traffic import LayoutTraffic

Phase = Literal["prefill", "decode"]

COMMUNICATION_SHARE = 24 / 132  # share of the multiprocessors that exchanges of prompts take [day 6]
KERNEL_SOURCE = (
    "unverified: DeepEP's test_low_latency with receive hooks, 128 tokens, top-8, sums of send and receive as users "
    "printed them: dispatch 35 to 40 us and combine 37 to 44 (16 ranks, Hopper); 27 + 8 and 32 + 9 (8 B200); 37 + 32 "
    "and 40 + 10 (DeepEP pull request 425)"
)
KERNEL_TOKENS = 128
DISPATCH_KERNELS = Band(40e-6, 35e-6, 69e-6)  # seconds, send and receive
COMBINE_KERNELS = Band(41e-6, 37e-6, 50e-6)
ISSUE_SHARE = 0.78  # of that before messages are sent: 27.25 of 34.96 and 32.48 of 41.93 us, same source
FUSED = ("quantise to dispatch", "sum of expert outputs")  # part of DeepEP's kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The micro-batch of a rank, or of tp ranks that share it.

    `tokens` are computed of `sequences` with `context` keys each, their own included.
    """

    spec: ModelSpec
    cluster: Cluster
    layout: Layout
    recipe: Recipe
    phase: Phase
    tokens: float
    context: float
    sequences: float
    low_latency: bool
    imbalance: float = 1.0
    traffic: LayoutTraffic | None = None  # exchanges of all pools at once; None: closed forms

    @property
    def own_tokens(self) -> float:
        """The tokens that one rank has, outside of attention's heads."""
        return self.tokens / self.layout.tp

    @property
    def exchanges(self) -> bool:
        return self.spec.moe is not None and self.layout.ep > 1

    @property
    def mode(self) -> Mode:
        """The mode of exchanges with experts."""
        return "low-latency" if self.low_latency else "normal"

    @property
    def multiprocessors(self) -> int:
        """The multiprocessors left to computation, without those of the kernels of exchanges."""
        count = self.cluster.gpu.multiprocessors
        if self.low_latency or not self.exchanges:
            return count
        return max(1, count - round(count * COMMUNICATION_SHARE))


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedOp:
    """One operation with its time, for explanations."""

    name: str
    piece: str
    seconds: Band
    formula: str
    source: str


def layer_pieces(work: Work) -> Pieces:
    """Return one layer with experts. A dense layer has only `before` and `core`, with its feed-forward in `core`."""
    return _pieces(work, _ops(work, is_moe=work.spec.moe is not None))


def dense_layer_seconds(work: Work) -> Band:
    """Return the seconds of one layer without experts."""
    return sum_bands(op.seconds for op in timed_dense_layer(work))


def ends_seconds(work: Work, sampled: float) -> Band:
    """Return the seconds of the embedding of all tokens, and of final norm, head and sampling for `sampled` of them."""
    return sum_bands(op.seconds for op in timed_ends(work, sampled))


def mtp_pieces(work: Work) -> Pieces:
    """Return the MTP module with its own embedding and head."""
    return _pieces(work, _mtp_ops(work))


def timed_layer(work: Work) -> tuple[TimedOp, ...]:
    """Return the operations of `layer_pieces`."""
    return _timed(work, _ops(work, is_moe=work.spec.moe is not None))


def layer_ops_of(work: Work) -> tuple[Op, ...]:
    """Return the operations of one layer with experts, without their times."""
    return _ops(work, is_moe=work.spec.moe is not None)


def timed_dense_layer(work: Work) -> tuple[TimedOp, ...]:
    """Return the operations of `dense_layer_seconds`."""
    return _timed(work, _ops(work, is_moe=False))


def timed_mtp(work: Work) -> tuple[TimedOp, ...]:
    """Return the operations of `mtp_pieces`."""
    return _timed(work, _mtp_ops(work))


def timed_ends(work: Work, sampled: float) -> tuple[TimedOp, ...]:
    ops = embedding_ops(work.spec, work.layout, work.tokens, work.phase)
    return _timed(work, (*ops, *head_ops(work.spec, work.layout, sampled, work.phase)))


def kernel_seconds(total: Band, tokens: float, multiprocessors: int) -> Band:
    """Return the seconds of an exchange's kernels for `tokens` of a rank."""
    rounds = max(1.0, tokens / multiprocessors)
    least = total.low * min(rounds, tokens / KERNEL_TOKENS)
    return Band(total.value * rounds, min(least, total.value * rounds), total.high * rounds)


def _mtp_ops(work: Work) -> tuple[Op, ...]:
    return mtp_ops(work.spec, work.layout, work.recipe, work.tokens, work.phase, work.context, work.sequences)


def _ops(work: Work, is_moe: bool) -> tuple[Op, ...]:
    layer = work.spec.num_hidden_layers if is_moe else 0
    spec = work.spec
    if not is_moe and spec.is_moe_layer(0):  # the model has no dense layer
        return ()
    return layer_ops(spec, layer, work.layout, work.recipe, work.tokens, work.phase, work.context, work.sequences)


def _pieces(work: Work, ops: Sequence[Op]) -> Pieces:
    by_piece: dict[str, list[Band]] = {}
    for op in _timed(work, ops):
        by_piece.setdefault(op.piece, []).append(op.seconds)
    sums = {"before": NOTHING, "core": NOTHING} | {name: sum_bands(bands) for name, bands in by_piece.items()}
    pieces = Pieces(**sums)
    return _with_kernels(work, pieces) if work.exchanges and work.low_latency else pieces


def _with_kernels(work: Work, pieces: Pieces) -> Pieces:
    """Return the pieces with the kernels, and with exchanges shortened by what the kernels take."""
    count = work.cluster.gpu.multiprocessors
    dispatch = kernel_seconds(DISPATCH_KERNELS, work.own_tokens, count)
    combine = kernel_seconds(COMBINE_KERNELS, work.own_tokens, count)
    return replace(
        pieces,
        issue_dispatch=ISSUE_SHARE * dispatch,
        take_dispatch=(1 - ISSUE_SHARE) * dispatch,
        issue_combine=ISSUE_SHARE * combine,
        take_combine=(1 - ISSUE_SHARE) * combine,
        dispatch=_rest(pieces.dispatch, dispatch),
        combine=_rest(pieces.combine, combine),
    )


def _rest(exchange: Band, kernels: Band) -> Band:
    """Return the exchange without its kernels, end by end, since slow kernels are part of a slow exchange."""
    parts = (getattr(exchange, end) - getattr(kernels, end) for end in ("value", "low", "high"))
    value, low, high = (max(0.0, part) for part in parts)
    return Band(value, min(value, low), max(value, high))


def _timed(work: Work, ops: Iterable[Op]) -> tuple[TimedOp, ...]:
    """Time each operation, and find the piece that it belongs to by its place between the core and the exchanges."""
    result, place = [], "before"
    skipped = FUSED if work.exchanges and work.low_latency else ()
    for op in ops:
        if isinstance(op, Attention):
            place = "core"
        elif isinstance(op, Exchange):
            place = {"dispatch": "experts", "combine": "after"}[op.name]
        piece = op.name if isinstance(op, Exchange) else place
        if place == "after" and not isinstance(op, Exchange):
            piece = "shared" if op.part == "shared" else "before"  # sums go with the next layer's start
        if not isinstance(op, (Exchange, Collective)) and op.name in skipped:
            continue
        result.append(_time(work, op, piece))
    return tuple(result)


def _time(work: Work, op: Op, piece: str) -> TimedOp:
    timed = operation_time(op, work.cluster, work.multiprocessors, work.mode, work.traffic)
    seconds = timed.seconds
    if piece in ("dispatch", "combine", "experts"):  # all wait for the rank with the largest load
        seconds = work.imbalance * seconds
    return TimedOp(name=op.name, piece=piece, seconds=seconds, formula=timed.formula, source=timed.source)
