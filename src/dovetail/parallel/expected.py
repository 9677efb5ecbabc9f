"""Bytes that each rank of a layout will send in a step, by kind of link, from the layout alone.

    stages      hidden states and their gradients, a message for each that the schedule has: exact
    weights     gradients to where their piece is, and updated weights back (`parallel.weights.legs`): exact
    experts     rows and what goes with them, four exchanges a layer and micro-batch: the mean over gates that choose
                all experts equally often (`network.demands.distinct`), since nobody knows yet what the gate will choose

Not in it are sums of losses and loads, a few hundred bytes a step, and checksums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from dovetail.cost.memory.stages import stages
from dovetail.cost.ops.ops import Exchange
from dovetail.network.demands.closed_forms import exchange_bytes
from dovetail.parallel.experts.formats import PLAIN, Format, Formats
from dovetail.parallel.pipeline.messages import messages
from dovetail.parallel.schedules.pipelines import make_schedule
from dovetail.parallel.weights.holders import Weight, blocks_of, rank_sets, weights_of
from dovetail.parallel.weights.legs import cut_legs
from dovetail.spec.layout import Layout
from dovetail.spec.model import ModelSpec

Sent = NDArray[np.float64]  # [ranks, 2]: bytes to other nodes, and inside the own node
NIC, NODE = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """How messages are sent, beside the layout."""

    sequence_length: int
    dtype: torch.dtype  # of weights and hidden states
    formats: Formats  # of rows
    hops: int
    ranks_per_node: int


@lru_cache(maxsize=64)
def expected_bytes(spec: ModelSpec, layout: Layout, ways: Ways) -> Sent:
    """Not to be changed: callers share it."""
    return _of_stages(spec, layout, ways) + _of_experts(spec, layout, ways) + _of_weights(spec, layout, ways)


def _of_stages(spec: ModelSpec, layout: Layout, ways: Ways) -> Sent:
    sent = np.zeros((layout.gpus, 2))
    size = layout.microbatch_size * ways.sequence_length * spec.hidden_size * ways.dtype.itemsize
    like = np.arange(layout.dp)  # the pipelines
    for message in messages(make_schedule(layout.schedule, layout.pp, layout.microbatches, layout.chunks)):
        source, target = message.source * layout.dp + like, message.target * layout.dp + like
        np.add.at(sent, (source, _link(source, target, ways)), size)
    return sent


def _of_experts(spec: ModelSpec, layout: Layout, ways: Ways) -> Sent:
    sent = np.zeros((layout.gpus, 2))
    if spec.moe is None or layout.ep == 1:
        return sent
    each = layout.microbatches * _of_layer(spec, layout, ways)
    for number, stage in enumerate(stages(spec, layout, ways.sequence_length)):
        layers = [*stage.layers]
        if stage.has_head:
            layers += range(spec.num_hidden_layers, spec.num_hidden_layers + spec.num_nextn_predict_layers)
        for place in range(layout.pp):
            if number in layout.stages_of(place):
                # Under DualPipe a stage is on two ranks, each of which has half of the micro-batches.
                count = sum(map(spec.is_moe_layer, layers)) / layout.stage_copies
                sent[place * layout.dp : (place + 1) * layout.dp] += count * each
    return sent


def _of_layer(spec: ModelSpec, layout: Layout, ways: Ways) -> NDArray[np.float64]:
    """[2], of one rank, layer and micro-batch, forward and backward."""
    moe = spec.moe
    assert moe is not None

    def width(format: Format) -> int:
        return format.encode(torch.zeros(1, spec.hidden_size, dtype=ways.dtype)).shape[1]

    formats, choices, is_twice = ways.formats, moe.num_experts_per_tok, ways.hops == 2
    rows = width(formats.out) + width(formats.back) + width(formats.out_gradient) + width(PLAIN)
    # In two hops choices and weights go along, and the gradients of weights come home.
    exchange = Exchange(
        name="dispatch",
        pass_="forward",
        tokens=layout.microbatch_size * ways.sequence_length,
        bytes_per_copy=rows + (12 * choices if is_twice else 0),
        choices=choices,
        experts=moe.n_routed_experts,
        groups=moe.n_group,
        kept_groups=moe.topk_group,
        ranks=layout.ep,
    )
    found = exchange_bytes(exchange, ways.ranks_per_node, "normal" if is_twice else "low-latency")
    near = min(layout.ep, ways.ranks_per_node)
    counts = 8 * (2 if is_twice else moe.n_routed_experts // layout.ep)  # told to each other rank
    return np.array([found.scale_out + counts * (layout.ep - near), found.scale_up + counts * (near - 1)])


def _of_weights(spec: ModelSpec, layout: Layout, ways: Ways) -> Sent:
    weights = weights_of(spec, layout, ways.sequence_length)
    sent = np.zeros((layout.gpus, 2))
    for ranks in rank_sets(weights, layout):
        if len(ranks) > 1:
            elements, wide = _held_alike(weights, layout, ranks)
            gathered = 4 * wide + ways.dtype.itemsize * (elements - wide) if layout.zero else 4 * elements
            part = 1
            for leg in cut_legs(ranks, ways.ranks_per_node):
                _add_sum(sent, leg, 4 * elements / part, ways)
                _add_ring(sent, leg, gathered / part, ways)
                part *= leg.shape[1]
    _add_ring(sent, np.arange(layout.gpus)[None], 8.0 * layout.gpus, ways)  # of squares, for the norm
    return sent


def _held_alike(weights: Mapping[str, Weight], layout: Layout, ranks: tuple[int, ...]) -> tuple[int, int]:
    """Elements that exactly these ranks hold, filled up to equal pieces, and how many of them are FP32 in any model."""
    blocks = {name: each for name, each in blocks_of(weights, layout, ranks[0]).items() if each.ranks == ranks}
    filled = {name: len(ranks) * -(-each.length // len(ranks)) for name, each in blocks.items()}
    return sum(filled.values()), sum(count for name, count in filled.items() if weights[name].is_wide)


def _add_sum(sent: Sent, groups: NDArray[np.int64], size: float, ways: Ways) -> None:
    """Each rank of a group [groups, ranks] sends every other one its part of `size` bytes."""
    for shift in range(1, groups.shape[1]):
        target = np.roll(groups, -shift, axis=1)
        np.add.at(sent, (groups, _link(groups, target, ways)), size / groups.shape[1])


def _add_ring(sent: Sent, groups: NDArray[np.int64], size: float, ways: Ways) -> None:
    """All parts but one go to the next rank."""
    target, count = np.roll(groups, -1, axis=1), groups.shape[1]
    np.add.at(sent, (groups, _link(groups, target, ways)), size * (count - 1) / count)


def _link(source: NDArray[np.int64], target: NDArray[np.int64], ways: Ways) -> NDArray[np.int64]:
    return np.where(source // ways.ranks_per_node == target // ways.ranks_per_node, NODE, NIC)
