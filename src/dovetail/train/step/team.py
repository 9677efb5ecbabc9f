"""Who takes a step together: one process alone, or the ranks of a layout (`train.step.on_ranks`).

backward   this rank's microbatches -> sums of gradients, losses and loads
add_up     -> the sums of all ranks; gradients only of what this rank's optimizer updates
norm       of all gradients together
gather     makes updated weights known to all that have them
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dovetail.model.block import Block
from dovetail.model.experts.gate import Gate
from dovetail.model.experts.moe import MoeMlp
from dovetail.model.transformer import Transformer
from dovetail.parallel.pieces import Piece
from dovetail.parallel.wire import Traffic
from dovetail.spec.model import ModelSpec
from dovetail.text.corpus import Batch
from dovetail.train.step.losses import Share, compute_losses, count_targets


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """What a step makes smaller."""

    share: Share
    alpha: float  # of the balance loss of one microbatch
    separate_documents: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Over the microbatches of a rank, or of all of them."""

    gradients: Mapping[str, Tensor]
    losses: Tensor  # FP64 [2 + depths]: token and MTP losses without their weights, and the balance loss with its own
    counts: Mapping[int, Tensor]  # [E] tokens per expert, by MoE layer; MTP modules come after the layers
    seconds: Sequence[float] = ()  # that each rank has worked in this step, its waits for others left out


class Team(Protocol):
    spec: ModelSpec
    models: Sequence[Transformer]  # what this rank has of the model: all of it, its part, or some stages
    num_shares: int  # parts in which ranks read a batch
    index: int  # of this rank's part

    def parameters(self) -> Mapping[str, Tensor | Piece]:
        """What this rank's optimizer updates."""
        ...

    def begin(self, step: int) -> None:
        """A step begins here, with the reading of its batch."""
        ...

    def num_targets(self, batches: Sequence[Batch], separate_documents: bool) -> list[int]:
        """Targets of the main loss and of each MTP depth in the whole batch."""
        ...

    def backward(self, batches: Sequence[Batch], aim: Aim) -> Sums: ...
    def add_up(self, sums: Sums) -> Sums: ...
    def norm(self, squares: Mapping[str, Tensor]) -> float: ...
    def gather(self) -> None: ...
    def sent(self) -> Traffic:
        """What all ranks have sent since the last call."""
        ...

    def hidden(self, tokens: Tensor) -> Tensor | None:
        """The final hidden states of tokens [B, T], on the rank that has the head; all ranks call it equally often."""
        ...


class Alone:
    """One process that has the whole model."""

    num_shares, index = 1, 0

    def __init__(self, model: Transformer) -> None:
        self.spec, self.models = model.spec, (model,)

    def parameters(self) -> Mapping[str, Tensor | Piece]:
        return dict(self.models[0].named_parameters())

    def begin(self, step: int) -> None:
        """Nobody else is to be compared with."""

    def num_targets(self, batches: Sequence[Batch], separate_documents: bool) -> list[int]:
        return count_targets(batches, 1 + self.spec.num_nextn_predict_layers, separate_documents)

    def backward(self, batches: Sequence[Batch], aim: Aim) -> Sums:
        return backward(self.models[0], batches, aim, in_fp32=len(batches) > 1)

    def add_up(self, sums: Sums) -> Sums:
        return sums

    def norm(self, squares: Mapping[str, Tensor]) -> float:
        return math.sqrt(float(torch.stack(list(squares.values())).sum()))

    def gather(self) -> None:
        """Nobody else has weights."""

    def sent(self) -> Traffic:
        return Traffic()

    def hidden(self, tokens: Tensor) -> Tensor | None:
        hidden: Tensor = self.models[0](tokens).hidden
        return hidden


def backward(model: Transformer, batches: Sequence[Batch], aim: Aim, in_fp32: bool) -> Sums:
    """Forward and backward of a model that is not cut into stages, one microbatch after the other."""
    parameters, gradients = dict(model.named_parameters()), dict[str, Tensor]()
    sums = torch.zeros(2 + len(model.mtp), dtype=torch.float64, device=model.norm.weight.device)
    counts: list[Tensor] = []
    for batch in batches:
        losses = compute_losses(model, batch, aim.separate_documents, aim.share)
        balance = aim.alpha * losses.balance
        torch.stack([losses.token, *losses.mtp, balance]).sum().backward()
        _collect(parameters, gradients, in_fp32)
        sums += torch.cat([losses.plain, balance.detach()[None]]).double()
        counts = [a + b for a, b in zip(counts, losses.counts, strict=True)] if counts else losses.counts
    return Sums(gradients=gradients, losses=sums, counts=dict(zip(gates(model), counts, strict=True)))


def gates(model: Transformer) -> dict[int, Gate]:
    """The gates of the MoE layers here, by layer."""
    return {
        module.layer: module.mlp.gate
        for module in model.modules()
        if isinstance(module, Block) and isinstance(module.mlp, MoeMlp)
    }


def _collect(parameters: dict[str, Tensor], gradients: dict[str, Tensor], in_fp32: bool) -> None:
    """Move .grad into `gradients`, adding in FP32 where more will come; no gradient counts as zero."""
    for name, parameter in parameters.items():
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        if name in gradients:
            gradients[name] += gradient
        else:
            gradients[name] = gradient.float() if in_fp32 else gradient
