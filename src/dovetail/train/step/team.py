"""Who takes a step together: one process alone, or the ranks of a layout (`train.step.on_ranks`).

backward   this rank's microbatches -> sums of gradients, losses and loads; ranks send gradients off on the way
add_up     -> the sums of all ranks; gradients only of what this rank's optimizer updates
norm       of all gradients together
gather     makes updated weights known to all that have them
told       -> what each rank has sent in the step, and how long it has waited
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from dovetail.model.block import Block
from dovetail.model.experts.gate import Gate
from dovetail.model.experts.moe import MoeMlp
from dovetail.model.transformer import Transformer
from dovetail.parallel.told import Told
from dovetail.parallel.weights.pieces import Piece
from dovetail.spec.model import ModelSpec
from dovetail.text.corpus import Batch
from dovetail.train.step.losses import Share, compute_losses, count_targets

Give = Callable[[str, Tensor], None]  # takes a gradient by name, which does not change any more


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


class Team(Protocol):
    spec: ModelSpec
    models: Sequence[Transformer]  # what this rank has of the model: all of it, its part, or some stages
    num_shares: int  # parts in which ranks read a batch
    index: int  # of this rank's part
    expert_ranks: int  # ranks that share the experts of a layer

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
    def told(self) -> list[Told]:
        """What each rank says, by its number; all ranks call it together."""
        ...

    def hidden(self, tokens: Tensor) -> Tensor | None:
        """The final hidden states of tokens [B, T], on the rank that has the head; all ranks call it equally often."""
        ...


class Alone:
    """One process that has the whole model."""

    num_shares, index, expert_ranks = 1, 0, 1

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

    def told(self) -> list[Told]:
        return []

    def hidden(self, tokens: Tensor) -> Tensor | None:
        hidden: Tensor = self.models[0](tokens).hidden
        return hidden


def backward(model: Transformer, batches: Sequence[Batch], aim: Aim, in_fp32: bool, give: Give | None = None) -> Sums:
    """Forward and backward of a model that is not cut into stages, one microbatch after the other.

    `give` gets each gradient once, in the last backward pass: as soon as it is made.
    """
    parameters, gradients = dict(model.named_parameters()), dict[str, Tensor]()
    sums = torch.zeros(2 + len(model.mtp), dtype=torch.float64, device=model.norm.weight.device)
    counts: list[Tensor] = []
    for left, batch in zip(reversed(range(len(batches))), batches, strict=True):
        losses = compute_losses(model, batch, aim.separate_documents, aim.share)
        balance = aim.alpha * losses.balance
        loss = torch.stack([losses.token, *losses.mtp, balance]).sum()
        _differentiate(loss, parameters, partial(_add, gradients, in_fp32, None if left else give))
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


def _differentiate(loss: Tensor, parameters: Mapping[str, Tensor], take: Callable[[str, Tensor], None]) -> None:
    """Backward; `take` gets each parameter as soon as its .grad is whole, and at the end those that have none."""
    left = dict(parameters)
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: take(name, left.pop(name)))
        for name, parameter in parameters.items()
    ]
    try:
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    for name, parameter in left.items():
        take(name, parameter)


def _add(gradients: dict[str, Tensor], in_fp32: bool, give: Give | None, name: str, parameter: Tensor) -> None:
    """Move .grad into `gradients`, adding in FP32 where more will come; no gradient counts as zero."""
    gradient, parameter.grad = parameter.grad, None
    if gradient is None:
        gradient = torch.zeros_like(parameter)
    if name in gradients:
        gradients[name] += gradient
    else:
        gradients[name] = gradient.float() if in_fp32 else gradient
    if give is not None:
        give(name, gradients[name])
