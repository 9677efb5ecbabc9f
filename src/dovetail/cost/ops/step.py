"""The operations of an optimizer step on one rank: sums of gradients, AdamW, gathering of weights.

    reduce-scatter   sums gradients in FP32 over the ranks that hold the same weight
    norm             of the rank's share, for clipping
    AdamW            reads gradient, master and moments of each parameter of its share; writes master, moments and the
                     BF16 weight
    all-gather       brings the weights, in BF16, to all ranks that hold them
    zero             clears the accumulators of gradients

That is ZeRO-1. With `zero = 0` in the layout every rank updates all its weights: an all-reduce sums their gradients,
and nothing is gathered.

A gradient that only one micro-batch on one rank has stays as the product wrote it, in BF16, and nothing is cleared.

That gradients are sent in FP32 is not in the paper (unverified). The replicas of an expert are ep ranks apart. Where
DualPipe has a stage twice, the sum is over both copies, and the second is on another rank of the pipeline.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Literal

from dovetail.cost.memory.held import held_by_rank
from dovetail.cost.ops.ops import BF16, FP32, Collective, Elementwise, Op
from dovetail.spec.layout import Layout
from dovetail.spec.measurements import ElementwiseKind
from dovetail.spec.model import ModelSpec


def adam_bytes(gradient_bytes: int, moment_bytes: int = BF16) -> int:
    """Return the bytes that AdamW moves for one parameter.

    It reads the gradient, reads and writes master and moments, and writes the BF16 weight.
    """
    return gradient_bytes + 2 * (FP32 + 2 * moment_bytes) + BF16


def step_ops(
    spec: ModelSpec, layout: Layout, rank: int = 0, context: int = 4096, moment_bytes: int = BF16
) -> tuple[Op, ...]:
    """Return the operations of a step on pipeline rank `rank`; `moment_bytes` are for an element of either moment.

    Raises ValueError if attention is not MLA.
    """
    trained = [each for each in held_by_rank(spec, layout, rank, context) if each.has_gradient]
    by_replicas: dict[int, tuple[int, int]] = defaultdict(lambda: (0, 0))  # elements, and bytes of the weights in use
    for each in trained:
        elements, weights = by_replicas[each.replicas]
        per_element = FP32 if each.is_wide else BF16
        by_replicas[each.replicas] = elements + each.elements, weights + per_element * each.elements
    held = sum(elements for elements, _ in by_replicas.values())
    share: float = held
    if layout.zero:
        share = sum(elements / replicas for replicas, (elements, _) in by_replicas.items()) / layout.stage_copies
    sums: list[Op] = []
    gathers: list[Op] = []
    for replicas, (elements, weights) in sorted(by_replicas.items()):
        stride = layout.dp * layout.tp // replicas
        for ranks, apart, part in ((replicas, stride, 1), (layout.stage_copies, layout.dp * layout.tp, replicas)):
            if ranks > 1 and not layout.zero:
                sums.append(_collective("all_reduce", FP32 * elements, ranks, apart))
            elif ranks > 1:
                sums.append(_collective("reduce_scatter", FP32 * elements / part, ranks, apart))
                gathers.insert(0, _collective("all_gather", weights / part, ranks, apart))
    gradient = FP32 if layout.adds_gradients else BF16
    return (
        *sums,
        _pass("gradient norm", gradient * share, "square sum"),
        _pass("AdamW", adam_bytes(gradient, moment_bytes) * share, "optimizer"),
        *gathers,
        *([_pass("zero gradients", FP32 * held)] if layout.adds_gradients else []),
    )


def _collective(
    name: Literal["reduce_scatter", "all_gather", "all_reduce"], bytes_: float, ranks: int, stride: int
) -> Collective:
    return Collective(name=name, pass_="wgrad", bytes=bytes_, ranks=ranks, stride=stride, part="step")


def _pass(name: str, bytes_: float, kind: ElementwiseKind = "other") -> Elementwise:
    return Elementwise(name=name, pass_="wgrad", bytes=bytes_, part="step", kind=kind)
