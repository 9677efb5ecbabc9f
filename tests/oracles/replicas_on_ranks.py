"""Four ranks that compare what they hold, one of them with a flipped bit."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dovetail.parallel.mesh import form_mesh
from dovetail.parallel.traffic import Traffic
from dovetail.parallel.weights.legs import form_legs
from dovetail.parallel.weights.replicas import ReplicaError, Replicas
from dovetail.spec.layout import Layout


def compared(flipped: str | None, on: int) -> str | None:
    """What `Replicas.compare` raises."""
    mesh = form_mesh(Layout(dp=4, ep=2), 2)
    everyone, first, second = (form_legs(ranks, mesh) for ranks in (range(4), range(2), range(2, 4)))
    assert everyone is not None
    pair = first or second
    assert pair is not None
    tensors: dict[str, Tensor] = {
        "all": torch.arange(100, dtype=torch.float32).bfloat16(),
        "all.bias": torch.zeros(3),
        "pair": torch.full((5, 7), float(dist.get_rank() // 2)),
    }
    if flipped is not None and dist.get_rank() == on:
        tensors[flipped].view(-1).view(torch.uint8)[5] ^= 1
    holders = {"all": everyone, "all.bias": everyone, "pair": pair}
    replicas = Replicas(tensors=tensors, holders=holders, traffic=Traffic())
    try:
        replicas.compare(7)
    except ReplicaError as error:
        return str(error)
    return None
