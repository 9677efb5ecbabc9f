"""Forward alone, to measure text: hidden states pass one stage after the other, and nothing is kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from dovetail.model.transformer import Transformer
from dovetail.parallel.mesh import Mesh
from dovetail.parallel.pipeline.pipeline import Pipeline, Place
from dovetail.parallel.traffic import opened, room_for, sealed


@torch.no_grad()
def forward(pipeline: Pipeline, tokens: Tensor) -> Tensor | None:
    """tokens [B, T], the same on all ranks of the pipeline -> final hidden states [B, T, dim] on the rank that has the
    last stage of direction 0; None on the others. They call it together."""
    mesh, models = pipeline.mesh, pipeline.models
    holders, x = pipeline.schedule.placement[0], None
    for stage, holder in enumerate(holders):
        if holder == mesh.pp.index:
            model = models[stage, 0]
            if stage and holders[stage - 1] != holder:
                x = _receive(mesh, mesh.pp.ranks[holders[stage - 1]], _room(models, tokens))
            x = model.run_stage(x if stage else tokens, model.context(tokens, None, None, None, False)).hidden
            if stage + 1 < len(holders) and holders[stage + 1] != holder:
                target = mesh.pp.ranks[holders[stage + 1]]
                message = sealed(x) if mesh.is_checked else x.contiguous()
                pipeline.traffic.add(message.nbytes, mesh.pp.is_near[holders[stage + 1]])
                dist.send(message, target, group=mesh.links[mesh.rank, target])
    return x if holders[-1] == mesh.pp.index else None


def _receive(mesh: Mesh, source: int, room: Tensor) -> Tensor:
    message = room_for(room) if mesh.is_checked else room
    dist.recv(message, source, group=mesh.links[source, mesh.rank])
    if not mesh.is_checked:
        return room
    return opened(message, source, mesh.rank, "hidden states of held-out text").view(room.dtype).view_as(room)


def _room(models: Mapping[Place, Transformer], tokens: Tensor) -> Tensor:
    weight = next(iter(next(iter(models.values())).layers.values())).self_attn.o_proj.weight
    return weight.new_empty(*tokens.shape, models[next(iter(models))].spec.hidden_size)
