"""Who trains a run together, and whether they can."""

from __future__ import annotations

import torch

from dovetail.catalog.precision import load_recipe
from dovetail.model.transformer import initialize
from dovetail.parallel.experts.formats import check_back
from dovetail.parallel.mesh import check_ranks
from dovetail.spec.layout import Layout, check_layout
from dovetail.spec.model import ModelSpec
from dovetail.train.layout.form import Blueprint, form_ranks
from dovetail.train.layout.ranks import local_device, rank_and_world
from dovetail.train.run.budget import samples_of
from dovetail.train.run.run_file import RunConfig, build_model, resolve_dtype
from dovetail.train.step.schedule import TrainingSchedule
from dovetail.train.step.team import Alone, Team


def form_team(
    config: RunConfig, spec: ModelSpec, schedule: TrainingSchedule, num_steps: int, device: torch.device
) -> Team:
    """This process alone, or the ranks of the run's layout; the weights are those before the first step."""
    layouts, train = layouts_of(config, schedule, num_steps), config.train
    if rank_and_world()[1] == 1:
        model = build_model(config, device)
        initialize(model, train.seed)
        return Alone(model)
    blueprint = Blueprint(
        spec=spec,
        dtype=resolve_dtype(train.dtype, device),
        recompute=train.recompute,
        recipe=load_recipe(train.precision),
        sequence_length=train.sequence_length,
        seed=train.seed,
    )
    return form_ranks(blueprint, layouts[0], config.layout, device)


def check_team(config: RunConfig, spec: ModelSpec, schedule: TrainingSchedule, ranks_per_node: int) -> None:
    """Raise ValueError, with the nearest legal value, where the ranks that were started cannot run the layout.

    `ranks_per_node` is what torchrun started on this node.
    """
    num_steps, train = config.train.steps or 1, config.train
    check_back(config.layout.back, load_recipe(train.precision), resolve_dtype(train.dtype, local_device()))
    for layout in layouts_of(config, schedule, num_steps):
        check_layout(layout, spec)
        check_ranks(layout, rank_and_world()[1], config.layout.ranks_per_node or ranks_per_node)


def layouts_of(config: RunConfig, schedule: TrainingSchedule, num_steps: int) -> tuple[Layout, Layout]:
    """The layout at the smallest and at the largest batch of the run."""
    world, train = rank_and_world()[1], config.train
    _, least, most = samples_of(train, schedule, num_steps, config.layout.multiple(world))
    small, large = (config.layout.layout(world, size, train.microbatch_size) for size in (least, most))
    return small, large
