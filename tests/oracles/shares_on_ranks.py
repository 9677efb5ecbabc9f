"""What ranks do in the tests of shared weights: steps of AdamW on their pieces, and what one process does instead."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from dovetail.model.transformer import Transformer
from dovetail.parallel.mesh import form_mesh
from dovetail.parallel.weights import legs, shard
from dovetail.parallel.weights.holders import Block, Weight, blocks_of, weights_of
from dovetail.parallel.weights.legs import Sum
from dovetail.parallel.weights.pieces import Piece
from dovetail.parallel.weights.shard import Shares
from dovetail.spec.layout import Layout
from dovetail.spec.model import ModelSpec
from dovetail.train.step.ema import Ema
from dovetail.train.step.optim import AdamW, AdamWConfig

STEPS, RANKS_PER_NODE = 3, 2
RATE, SCALE = 0.02, 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    layout: Layout
    bucket: int = shard.BUCKET
    twin: str = ""  # what is broken


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Of one rank after all steps."""

    weights: dict[str, Tensor]  # flat, of its blocks
    state: dict[str, dict[str, Piece]]  # masters, moments and averages
    norms: list[float]
    buckets: int
    nic: int  # bytes sent
    node: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """Of one process with all gradients, summed over the ranks of each node in order, and then over the nodes."""

    weights: dict[str, Tensor]
    state: dict[str, dict[str, Tensor]]
    norms: list[float]


def weights_before(spec: ModelSpec) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = Transformer(spec)
    return {name: normal(name, tuple(each.shape)).to(each.dtype) for name, each in model.named_parameters()}


def gradient_of(step: int, rank: int, name: str, block: Block) -> Tensor:
    """Of the rank's block, flat; BF16 on every other weight."""
    gradient = normal(f"{step} {rank} {name}", (block.length,))
    return gradient.bfloat16() if zlib.crc32(name.encode()) % 2 else gradient


def normal(seed: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(seed.encode())))


def on_ranks(spec: ModelSpec, cases: list[Case]) -> list[Result]:
    found = []
    for case in cases:
        with BROKEN.get(case.twin, nullcontext)(), patch.object(shard, "BUCKET", case.bucket):
            found.append(_on_rank(spec, case))
    return found


def _on_rank(spec: ModelSpec, case: Case) -> Result:
    rank, weights = dist.get_rank(), weights_of(spec, case.layout)
    blocks, before = blocks_of(weights, case.layout, rank), weights_before(spec)
    parameters = {
        name: before[name].flatten()[each.start : each.start + each.length].clone() for name, each in blocks.items()
    }
    shares = Shares(parameters, weights, case.layout, form_mesh(case.layout, RANKS_PER_NODE))
    optimizer = AdamW(shares.pieces().items(), AdamWConfig())
    ema = Ema({name: slot.master for name, slot in optimizer.slots.items()}, 0.9)
    norms = []
    for step in range(STEPS):
        gradients = {name: gradient_of(step, rank, name, block) for name, block in blocks.items()}
        # Backward passes end in any order, and on each rank in another.
        for name in random.Random(f"{step} {rank}").sample(list(gradients), len(gradients)):
            shares.give(name, gradients[name])
        sums = shares.finish()
        norms.append(shares.norm(optimizer.squares(sums)))
        ema.finish_reading()
        optimizer.step(sums, RATE, SCALE)
        ema.update()
        shares.gather()
    state = {**optimizer.state(), "average": optimizer.placed(ema.average)}
    ema.close()
    buckets, traffic = len(shares._buckets), shares.traffic
    return Result(weights=parameters, state=state, norms=norms, buckets=buckets, nic=traffic.nic, node=traffic.node)


def given_in_turns(spec: ModelSpec, layout: Layout) -> tuple[int, int, int]:
    """Bytes sent when half of the gradients were given, when all were, and when all sums had come; a rank gives its
    own while those after it have given none, and goes on."""
    rank, weights = dist.get_rank(), weights_of(spec, layout)
    blocks = blocks_of(weights, layout, rank)
    with patch.object(shard, "BUCKET", 10_000):
        parameters = {name: torch.zeros(block.length) for name, block in blocks.items()}
        shares = Shares(parameters, weights, layout, form_mesh(layout, layout.gpus))
    names, half = list(reversed(blocks)), 0
    for turn in range(layout.gpus):
        for place, name in enumerate(names if turn == rank else ()):
            shares.give(name, torch.ones(blocks[name].length))
            if place == len(names) // 2:
                half = shares.traffic.node
        dist.barrier()
    given = shares.traffic.node
    sums = shares.finish()
    assert all((sums[name] == len(block.ranks)).all() for name, block in blocks.items())
    return half, given, shares.traffic.node


def on_one(spec: ModelSpec, layouts: list[Layout]) -> list[Whole]:
    """On rank 0."""
    return [_on_one(spec, layout) for layout in layouts] if dist.get_rank() == 0 else []


def _on_one(spec: ModelSpec, layout: Layout) -> Whole:
    parameters, weights = weights_before(spec), weights_of(spec, layout)
    optimizer = AdamW(parameters.items(), AdamWConfig())
    ema = Ema({name: slot.master for name, slot in optimizer.slots.items()}, 0.9)
    norms = []
    for step in range(STEPS):
        gradients = {name: torch.zeros(each.shape) for name, each in parameters.items()}
        for first in range(0, layout.gpus, RANKS_PER_NODE):
            of_node = {name: torch.zeros(each.shape) for name, each in parameters.items()}
            for rank in range(first, first + RANKS_PER_NODE):
                for name, block in blocks_of(weights, layout, rank).items():
                    of_node[name].view(-1)[block.start : block.start + block.length] += gradient_of(
                        step, rank, name, block
                    )
            for name, gradient in gradients.items():
                gradient += of_node[name]
        norms.append(optimizer.grad_norm(gradients))
        ema.finish_reading()
        optimizer.step(gradients, RATE, SCALE)
        ema.update()
    state = {**optimizer.state(), "average": ema.average}
    ema.close()
    return Whole(weights=parameters, state=state, norms=norms)


# ---- Twins with a fault each ----


@contextmanager
def _experts_over_dp() -> Iterator[None]:
    """Gradients of experts are summed as those of other weights are."""

    def blocks(weights: dict[str, Weight], layout: Layout, rank: int) -> dict[str, Block]:
        everyone = tuple(range(layout.gpus))
        return {name: replace(each, ranks=everyone) for name, each in blocks_of(weights, layout, rank).items()}

    with patch.object(shard, "blocks_of", blocks):
        yield


@contextmanager
def _copies_apart() -> Iterator[None]:
    """The embeddings of the first and the last stage are two weights: each has its own sum, and counts."""

    def blocks(weights: dict[str, Weight], layout: Layout, rank: int) -> dict[str, Block]:
        stage = rank // layout.dp
        return {
            name: replace(each, ranks=tuple(other for other in each.ranks if other // layout.dp == stage))
            for name, each in blocks_of(weights, layout, rank).items()
        }

    with patch.object(shard, "blocks_of", blocks):
        yield


@contextmanager
def _norm_of_one_group() -> Iterator[None]:
    """The norm is that of what the ranks with the same experts have."""
    form = Shares.__init__

    def alone(self: Shares, *arguments: object) -> None:
        form(self, *arguments)
        (self._world,) = self._legs["layers.1.mlp.experts.down_proj"].groups

    with patch.object(Shares, "__init__", alone):
        yield


@contextmanager
def _node_twice() -> Iterator[None]:
    """What a node has summed counts as often as it has ranks."""
    end = Sum._end

    def twice(self: Sum) -> Tensor:
        return 2 * end(self) if self._left else end(self)

    with patch.object(Sum, "_end", twice):
        yield


@contextmanager
def _directly() -> Iterator[None]:
    """Every rank sends each other one its piece, wherever that is."""

    def cut(ranks: Sequence[int], ranks_per_node: int) -> tuple[NDArray[np.int64], ...]:
        return (np.array([ranks]),)

    with patch.object(legs, "cut_legs", cut):
        yield


BROKEN = {
    "node twice": _node_twice,
    "directly": _directly,
    "experts over dp": _experts_over_dp,
    "copies apart": _copies_apart,
    "norm of one group": _norm_of_one_group,
}
