"""Which ranks hold which weights of a layout, without any process group.

Ranks are numbered as in `parallel.mesh`. A rank has the weights of its pipeline position's stages: of routed experts
the block of its member of the ep group, of everything else the whole.

    experts     held by the ranks with the same member, in all copies, on all positions that have the layer
    the rest    held by all ranks on all positions that have the layer

A layer has one position, and under DualPipe two. The embedding is on the first stage, and on the last one too where
the head is tied to it or MTP modules read it. So a gradient is whole once it is summed over the ranks of its block.

Blocks that the same ranks hold share one group. DeepSeek-V3 on PP16 x EP64 x DP128 [V3 §3.2] under DualPipe: 8 groups
of 256 ranks, each with two stages and so with the embedding as well, and 512 groups of 4 for experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dovetail.cost.memory.stages import stages
from dovetail.model.experts.moe import Experts
from dovetail.model.transformer import Transformer
from dovetail.spec.layout import Layout
from dovetail.spec.model import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A weight of the whole model, and where it is."""

    shape: tuple[int, ...]
    positions: tuple[int, ...]  # of the pipeline, ascending
    is_divided: bool  # over the ep group, by blocks of its first dimension
    is_wide: bool  # FP32 in models of every dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Elements start .. start + length of a weight, counted row by row, and all ranks that hold exactly these."""

    shape: tuple[int, ...]  # of the whole weight
    start: int
    length: int
    ranks: tuple[int, ...]  # ascending


def weights_of(spec: ModelSpec, layout: Layout, context: int = 4096) -> dict[str, Weight]:
    """All trained weights by name, in the order of the whole model. `layout` is legal and has no tensor parallelism.

    `context` is the length of sequences, as `cost.memory.stages.stages` takes it.
    """
    assert layout.tp == 1, layout
    found: dict[str, Weight] = {}
    for number, stage in enumerate(stages(spec, layout, context)):
        here = {position for position in range(layout.pp) if number in layout.stages_of(position)}
        with torch.device("meta"):
            part = Transformer(spec, stage=stage)
        experts = routed_experts(part)
        for name, parameter in part.named_parameters():
            elsewhere = found[name].positions if name in found else ()
            positions = tuple(sorted(here.union(elsewhere)))
            found[name] = Weight(
                shape=tuple(parameter.shape),
                positions=positions,
                is_divided=name in experts,
                is_wide=parameter.dtype == torch.float32,
            )
    return found


def blocks_of(weights: Mapping[str, Weight], layout: Layout, rank: int) -> dict[str, Block]:
    """What `rank` of the world holds, by name, in the order of `weights`."""
    position, member = rank // layout.dp, rank % layout.ep
    found: dict[str, Block] = {}
    for name, weight in weights.items():
        if position in weight.positions:
            parts = layout.ep if weight.is_divided else 1
            length = math.prod(weight.shape) // parts
            found[name] = Block(
                shape=weight.shape,
                start=member * length if weight.is_divided else 0,
                length=length,
                ranks=_ranks(layout, weight.positions, member if weight.is_divided else None),
            )
    return found


def rank_sets(weights: Mapping[str, Weight], layout: Layout) -> tuple[tuple[int, ...], ...]:
    """The sets of ranks that hold a block alike, each once, in an order that is the same on all ranks."""
    kinds = dict.fromkeys((weight.positions, weight.is_divided) for weight in weights.values())
    found = (
        _ranks(layout, positions, member)
        for positions, is_divided in kinds
        for member in (range(layout.ep) if is_divided else (None,))
    )
    return tuple(dict.fromkeys(found))


def routed_experts(model: Transformer) -> dict[str, Tensor]:
    """The weights of routed experts, by name."""
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if isinstance(module, Experts)
        for name, parameter in module.named_parameters()
    }


def _ranks(layout: Layout, positions: tuple[int, ...], member: int | None) -> tuple[int, ...]:
    """All ranks at `positions`, or those with that number in their ep group."""
    grid = np.arange(layout.gpus).reshape(layout.pp, -1, layout.ep)[list(positions)]
    return tuple((grid if member is None else grid[..., member]).flatten().tolist())
