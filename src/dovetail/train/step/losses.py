"""The losses of one microbatch, and its part in those of the whole batch.

    loss = token loss + lambda / D sum_k MTP loss_k + alpha sum over MoE layers of the balance loss

[V3 eqs 17-25]. Token and MTP losses are means over the targets of the whole batch, so that it does not matter how the
batch is cut into microbatches and ranks; the balance loss is a mean over its sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.model.experts.gate import Routing, balance_loss
from dovetail.model.transformer import Output, Transformer
from dovetail.spec.model import ModelSpec
from dovetail.text.corpus import Batch
from dovetail.train.step.loss import IGNORED, weighted_loss


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
    routings = [*output.routings, *end.routings]
    return Losses(
        token=end.token,
        mtp=end.mtp,
        plain=end.plain,
        balance=balance_losses(routings, len(inputs), model.spec) if routings else end.plain.new_zeros(()),
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


def balance_losses(routings: Sequence[Routing], batch_size: int, spec: ModelSpec) -> Tensor:
    """The sum over MoE layers, at least one, of a microbatch of so many sequences; without coefficient."""
    assert spec.moe is not None
    return torch.stack([balance_loss(routing, batch_size, spec.moe) for routing in routings]).sum()


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
