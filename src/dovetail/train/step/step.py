"""One optimizer step: microbatches forward and backward, clip, update, rebalance.

Gradients of several microbatches, and of several ranks, add up in FP32. A loss or gradient that is not finite leaves
weights, moments and biases as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dovetail.model.experts.gate import bias_update, max_violation
from dovetail.model.transformer import Transformer
from dovetail.parallel.wire import Traffic
from dovetail.text.corpus import Batch
from dovetail.train.step.ema import Ema
from dovetail.train.step.losses import Share
from dovetail.train.step.optim import AdamW
from dovetail.train.step.schedule import Values
from dovetail.train.step.team import Aim, Alone, Sums, Team, gates


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    loss: float
    mtp_loss: float  # mean over depths; NaN without MTP
    mtp_losses: list[float]  # of each depth
    balance_loss: float  # with its coefficient
    grad_norm: float  # before clipping
    max_vio: list[float]  # per MoE layer, MTP modules last
    is_finite: bool
    sent: Traffic  # by all ranks
    seconds: Sequence[float]  # of each rank's own work up to the sums; empty in one process


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
    """Train on `batches`, equal microbatches, in one process."""
    return team_step(Alone(model), optimizer, batches, values, objective, ema)


def team_step(
    team: Team,
    optimizer: AdamW,
    batches: Sequence[Batch],
    values: Values,
    objective: Objective,
    ema: Ema | None = None,
) -> StepResult:
    """Train on `batches`, the equal microbatches of this rank; all ranks of the team call it together.

    The optimizer is one of `team.parameters()`.
    """
    depths = team.spec.num_nextn_predict_layers
    share = Share(
        num_targets=team.num_targets(batches, objective.separate_documents),
        weights=[1.0, *[values.mtp_weight / max(depths, 1)] * depths],
    )
    alpha = objective.balance_alpha / (len(batches) * team.num_shares)
    aim = Aim(share=share, alpha=alpha, separate_documents=objective.separate_documents)
    sums = team.add_up(team.backward(batches, aim))
    norm = team.norm(optimizer.squares(sums.gradients))
    loss, *mtp_losses, balance_value = sums.losses.tolist()
    mtp_loss = sum(mtp_losses) / depths if depths else math.nan
    is_finite = math.isfinite(norm) and all(map(math.isfinite, (loss, *mtp_losses, balance_value)))
    if is_finite:
        if ema is not None:
            ema.finish_reading()
        scale = min(1.0, optimizer.config.max_grad_norm / (norm + 1e-6))
        optimizer.step(sums.gradients, values.learning_rate, scale)
        team.gather()
        if ema is not None:
            ema.update()
        _rebalance(team, sums, values.gamma)
    return StepResult(
        loss=loss,
        mtp_loss=mtp_loss,
        mtp_losses=mtp_losses,
        balance_loss=balance_value,
        grad_norm=norm,
        max_vio=[max_violation(each) for _, each in sorted(sums.counts.items())],
        is_finite=is_finite,
        sent=team.sent(),
        seconds=sums.seconds,
    )


def microbatches(batch: Batch, size: int) -> list[Batch]:
    parts = zip(batch.tokens.split(size), batch.document_ids.split(size), strict=True)
    return [Batch(tokens=tokens, document_ids=ids) for tokens, ids in parts]


def _rebalance(team: Team, sums: Sums, gamma: float) -> None:
    for model in team.models if gamma else ():
        for layer, gate in gates(model).items():
            if gate.e_score_correction_bias is not None:
                bias_update(gate.e_score_correction_bias, sums.counts[layer], gamma)
