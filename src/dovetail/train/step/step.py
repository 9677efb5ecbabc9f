"""One optimizer step: microbatches forward and backward, clip, update, rebalance.

    loss = token loss + lambda / D sum_k MTP loss_k + alpha sum over MoE layers of the balance loss

[V3 eqs 17-25]. Token and MTP losses are means over the targets of the whole batch, so that it does not matter how the
batch is cut into microbatches and ranks; the balance loss is a mean over its sequences. Gradients of several
microbatches, and of several ranks, add up in FP32. A loss or gradient that is not finite leaves weights, moments and
biases as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dovetail.model.experts.gate import Gate, Routing, balance_loss, bias_update, max_violation
from dovetail.model.transformer import Output, Transformer
from dovetail.text.corpus import Batch
from dovetail.train.step.ema import Ema
from dovetail.train.step.loss import IGNORED, weighted_loss
from dovetail.train.step.optim import AdamW
from dovetail.train.step.schedule import Values


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    loss: float
    mtp_loss: float  # mean over depths; NaN without MTP
    mtp_losses: list[float]  # of each depth
    balance_loss: float  # with its coefficient
    grad_norm: float  # before clipping
    max_vio: list[float]  # per MoE layer, MTP modules last
    is_finite: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Of each mean that a microbatch is part of, the main loss first: its number of targets, and its weight."""

    num_targets: Sequence[int]
    weights: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Of one microbatch: its part of the means, times their weights; differentiable."""

    token: Tensor
    mtp: list[Tensor]  # one per depth
    plain: Tensor  # token and MTP losses without their weights, not differentiable [1 + depths]
    balance: Tensor  # summed over layers, without coefficient: a mean of this microbatch alone
    counts: list[Tensor]  # per MoE layer


@dataclass(frozen=True, slots=True, kw_only=True)
class EndLosses:
    """Of one microbatch where the head is: see `Losses`."""

    token: Tensor
    mtp: list[Tensor]
    plain: Tensor
    routings: list[Routing]  # of the MTP modules


def compute_losses(model: Transformer, batch: Batch, separate_documents: bool, share: Share | None = None) -> Losses:
    """Main and MTP losses of one microbatch, batch.tokens [B, T + 1], moved to where the model is.

    With `separate_documents` nothing crosses a border: attention stops there, and a target in another document
    than the position that predicts it does not count. Without a `share` the microbatch is the whole batch, and all
    weights are 1.
    """
    depths = 1 + len(model.mtp)
    if share is None:
        share = Share(num_targets=count_targets([batch], depths, separate_documents), weights=[1.0] * depths)
    device = model.norm.weight.device
    batch = Batch(tokens=batch.tokens.to(device), document_ids=batch.document_ids.to(device))
    inputs = batch.tokens[:, :-1].contiguous()
    output = model(inputs, document_ids=batch.document_ids[:, :-1] if separate_documents else None)
    end = end_losses(model, output, batch, separate_documents, share)
    moe, routings = model.spec.moe, [*output.routings, *end.routings]
    balance = end.plain.new_zeros(())
    if moe is not None and routings:
        balance = torch.stack([balance_loss(routing, len(inputs), moe) for routing in routings]).sum()
    return Losses(
        token=end.token,
        mtp=end.mtp,
        plain=end.plain,
        balance=balance,
        counts=[routing.counts for routing in routings],
    )


def end_losses(model: Transformer, output: Output, batch: Batch, separate_documents: bool, share: Share) -> EndLosses:
    """Main and MTP losses of what came out of the final norm; `model` may be the last stage of a pipeline."""
    tokens, length = batch.tokens, batch.tokens.shape[1] - 1
    ids = batch.document_ids if separate_documents else None

    def loss(hidden: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        targets = _targets(tokens, ids, depth + 1)
        return weighted_loss(hidden, model.head_weight, targets, share.num_targets[depth], share.weights[depth])

    found, routings = [loss(output.hidden, 0)], list[Routing]()
    for depth in range(len(model.mtp)):
        # Position i has seen tokens up to i + depth + 1 and predicts token i + depth + 2.
        positions = length - depth - 1
        nearer = tokens[:, depth + 1 : depth + 1 + positions].contiguous()
        # A position belongs to the document of its hidden state: so the one that joins the end of a document to
        # the next one's first token comes last in the former, and none of the latter sees it.
        kept = None if ids is None else ids[:, :positions]
        hidden = output.hidden[:, :positions].contiguous()
        output = model.mtp_forward(depth, hidden, nearer, document_ids=kept)
        routings += output.routings
        found.append(loss(output.hidden, depth + 1))
    weighted, plain = zip(*found, strict=True)
    return EndLosses(token=weighted[0], mtp=list(weighted[1:]), plain=torch.stack(plain), routings=routings)


def _targets(tokens: Tensor, ids: Tensor | None, ahead: int) -> Tensor:
    """The token `ahead` positions on, IGNORED where that is in another document; [B, T + 1 - ahead]."""
    targets = tokens[:, ahead:]
    return targets if ids is None else targets.masked_fill(ids[:, ahead:] != ids[:, :-ahead], IGNORED)


def count_targets(batches: Sequence[Batch], depths: int, separate_documents: bool) -> list[int]:
    """The targets that count in `batches` of this rank, of each depth: 0 predicts the next token, 1 the one after."""
    if separate_documents:
        ids = [batch.document_ids for batch in batches]
        return [sum(int((each[:, k:] == each[:, :-k]).sum()) for each in ids) for k in range(1, depths + 1)]
    return [sum(len(batch.tokens) * (batch.tokens.shape[1] - k) for batch in batches) for k in range(1, depths + 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Coefficients that stay the same through a run."""

    balance_alpha: float = 1e-4  # [V3 §4.2]; published config.json files do not carry it
    separate_documents: bool = False


def train_step(
    model: Transformer,
    optimizer: AdamW,
    batches: Sequence[Batch],
    values: Values,
    objective: Objective,
    ema: Ema | None = None,
) -> StepResult:
    """Train on `batches`, the equal microbatches of this rank; every rank of a process group calls it."""
    parameters = dict(model.named_parameters())
    gradients: dict[str, Tensor] = {}
    sums = torch.zeros(2 + len(model.mtp), dtype=torch.float64, device=model.norm.weight.device)
    counts: list[Tensor] = []
    share = _share(model, batches, values.mtp_weight, objective.separate_documents)
    alpha = objective.balance_alpha / (len(batches) * _num_ranks())
    for batch in batches:
        losses = compute_losses(model, batch, objective.separate_documents, share)
        balance = alpha * losses.balance
        torch.stack([losses.token, *losses.mtp, balance]).sum().backward()
        _collect(parameters, gradients, in_fp32=len(batches) > 1 or dist.is_initialized())
        sums += torch.cat([losses.plain, balance.detach()[None]]).double()
        counts = [a + b for a, b in zip(counts, losses.counts, strict=True)] if counts else losses.counts
    if dist.is_initialized():
        for each in (*gradients.values(), *counts, sums):
            dist.all_reduce(each)
    norm = optimizer.grad_norm(gradients)
    loss, *mtp_losses, balance_value = sums.tolist()
    mtp_loss = sum(mtp_losses) / max(len(mtp_losses), 1)
    is_finite = math.isfinite(norm) and all(map(math.isfinite, (loss, mtp_loss, balance_value)))
    if is_finite:
        _update(model, optimizer, gradients, values, norm, counts, ema)
    return StepResult(
        loss=loss,
        mtp_loss=mtp_loss if model.mtp else math.nan,
        mtp_losses=mtp_losses,
        balance_loss=balance_value,
        grad_norm=norm,
        max_vio=[max_violation(each) for each in counts],
        is_finite=is_finite,
    )


def _share(model: Transformer, batches: Sequence[Batch], mtp_weight: float, separate_documents: bool) -> Share:
    """What the microbatches of all ranks have in common."""
    depths = len(model.mtp)
    counts = count_targets(batches, 1 + depths, separate_documents)
    if separate_documents and dist.is_initialized():
        total = torch.tensor(counts, device=model.norm.weight.device)
        dist.all_reduce(total)
        counts = total.tolist()
    elif not separate_documents:  # each rank has as many
        counts = [_num_ranks() * count for count in counts]
    return Share(num_targets=counts, weights=[1.0, *[mtp_weight / max(depths, 1)] * depths])


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def microbatches(batch: Batch, size: int) -> list[Batch]:
    parts = zip(batch.tokens.split(size), batch.document_ids.split(size), strict=True)
    return [Batch(tokens=tokens, document_ids=ids) for tokens, ids in parts]


def _update(
    model: Transformer,
    optimizer: AdamW,
    gradients: dict[str, Tensor],
    values: Values,
    norm: float,
    counts: list[Tensor],
    ema: Ema | None,
) -> None:
    if ema is not None:
        ema.finish_reading()
    scale = min(1.0, optimizer.config.max_grad_norm / (norm + 1e-6))
    optimizer.step(gradients, values.learning_rate, scale)
    if ema is not None:
        ema.update()
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    for gate, load in zip(gates, counts, strict=True):
        if gate.e_score_correction_bias is not None and values.gamma:
            bias_update(gate.e_score_correction_bias, load, values.gamma)


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
