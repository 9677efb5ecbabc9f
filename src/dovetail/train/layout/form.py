"""Forms the ranks of a run: their groups, and on each its part of the model with its first weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch

from dovetail.cost.memory.stages import stages
from dovetail.model.experts.moe import Dispatcher
from dovetail.model.precision import apply_recipe
from dovetail.model.transformer import Transformer, initialize
from dovetail.parallel.expected import Ways
from dovetail.parallel.experts.dispatch import OneHop, TwoHop
from dovetail.parallel.experts.formats import formats_of
from dovetail.parallel.mesh import Mesh, form_mesh
from dovetail.parallel.part import take_part
from dovetail.parallel.pipeline.pipeline import Place, build_stages, named_parameters
from dovetail.parallel.schedules.pipelines import make_schedule
from dovetail.parallel.weights.holders import weights_of
from dovetail.parallel.weights.shard import Shares
from dovetail.spec.layout import Layout
from dovetail.spec.model import ModelSpec
from dovetail.spec.precision import Recipe
from dovetail.train.layout.table import LayoutConfig
from dovetail.train.step.on_ranks import Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """The whole model, of which each rank builds its part."""

    spec: ModelSpec
    dtype: torch.dtype
    recompute: bool
    recipe: Recipe
    sequence_length: int  # decides which layers stand on which stage
    seed: int


def form_ranks(blueprint: Blueprint, layout: Layout, wanted: LayoutConfig, device: torch.device) -> Ranks:
    """All ranks call it together. Raises ValueError, the same on all ranks, for what `parallel.mesh.form_mesh` does."""
    mesh = form_mesh(layout, wanted.ranks_per_node, wanted.checksums, timedelta(seconds=wanted.deadline))
    formats = formats_of(blueprint.recipe, wanted.back)
    hop = partial(TwoHop if wanted.hops == 2 else OneHop, mesh, formats)
    models = _build(blueprint, layout, mesh, hop, device)
    weights = weights_of(blueprint.spec, layout, blueprint.sequence_length)
    shares = Shares(named_parameters(models), weights, layout, mesh)
    ways = Ways(
        sequence_length=blueprint.sequence_length,
        dtype=blueprint.dtype,
        formats=formats,
        hops=wanted.hops,
        ranks_per_node=mesh.ranks_per_node,
    )
    return Ranks(models, mesh, shares, layout, ways, wanted.replica_check)


def _build(
    blueprint: Blueprint, layout: Layout, mesh: Mesh, hop: Callable[[], Dispatcher], device: torch.device
) -> dict[Place, Transformer]:
    """This rank's part, which alone takes memory."""
    schedule = make_schedule(layout.schedule, layout.pp, layout.microbatches, layout.chunks)
    cut = stages(blueprint.spec, layout, blueprint.sequence_length)
    with torch.device("meta"):
        models = build_stages(
            blueprint.spec, cut, schedule.held_by(mesh.pp.index), blueprint.dtype, blueprint.recompute
        )
    for model in models.values():
        apply_recipe(model, blueprint.recipe)
        if layout.ep > 1:
            take_part(model, mesh, hop())
    for model in models.values():  # all of them first: stages of one rank may share the embedding
        model.to_empty(device=device)
    for model in models.values():
        initialize(model, blueprint.seed, (mesh.ep.index, mesh.ep.size))
    return models
