"""Makes a whole model one rank's part of it, and whole tensors of the parts again.

Ranks that share a copy of the experts have a block of them each; everything else is on every rank. Tensors of a part
have the names that they have in the whole.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from dovetail.model.experts.moe import Dispatcher
from dovetail.model.transformer import Transformer
from dovetail.parallel.experts.formats import decode, encode
from dovetail.parallel.mesh import Mesh
from dovetail.parallel.weights.holders import routed_experts


def take_part(model: Transformer, mesh: Mesh, dispatcher: Dispatcher) -> None:
    """Keep this rank's block of each layer's experts, and reach the others through `dispatcher`; in place.

    Raises ValueError where the experts do not divide among the ranks. Make the optimizer afterwards.
    """
    own, experts = routed_experts(model), model.spec.moe.n_routed_experts if model.spec.moe else 0
    if experts % mesh.ep.size:
        raise ValueError(f"{experts} routed experts do not divide among {mesh.ep.size} ranks: see spec.layout")
    for parameter in own.values():
        parameter.data = parameter.data.chunk(mesh.ep.size)[mesh.ep.index].clone()
    model.dispatcher = dispatcher


@torch.no_grad()
def gather_whole(model: Transformer, mesh: Mesh, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the whole model by name, on rank 0; on other ranks none.

    `tensors` are the parts here, of weights, gradients or moments, by the names of the weights; all ranks call it
    together. Those of other tensors than the experts' are rank 0's.
    """
    own, group, found = routed_experts(model), mesh.ep, dict[str, Tensor]()
    for name, tensor in tensors.items():
        if name in own and group.ranks[0] == 0 and group.size > 1:
            found[name] = _gather_blocks(tensor, mesh)
        elif mesh.rank == 0:
            found[name] = tensor
    return found if mesh.rank == 0 else {}


def _gather_blocks(tensor: Tensor, mesh: Mesh) -> Tensor:
    """tensor [experts here, ...] -> [all experts, ...] on the first rank of the group."""
    sent = encode(tensor)
    blocks = [torch.empty_like(sent) for _ in mesh.ep.ranks] if mesh.ep.index == 0 else None
    dist.gather(sent, blocks, dst=mesh.ep.ranks[0], group=mesh.ep.handle)
    return decode(torch.cat(blocks), tensor.dtype) if blocks else tensor
