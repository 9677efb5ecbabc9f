"""The gate, which chooses each token's experts and their weights [V3 eqs 12-16, 17-20].

Scores are sigmoid (V3) or softmax (V2) of FP32 logits (`score`). Selection looks at scores plus a bias; the bias steers
selection only and never enters the weights. Experts stand in `n_group` groups of consecutive numbers; a group
is worth the sum of its two best biased scores (V3) or its best score (V2), the best `topk_group` groups stay,
the others are masked with -inf, and the top k of what is left are chosen. Ties go to the lower number.

Balancing without a loss [V3 §2.1.2]: after each optimizer step `bias_update` moves every bias by gamma
towards the mean load, from counts over the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor, nn

from dovetail.model.experts import gate_numba
from dovetail.numerics import capability
from dovetail.numerics.linear import wide_linear
from dovetail.numerics.weight_gradients import WeightGradients
from dovetail.spec.model import Moe


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Where N tokens go."""

    expert_ids: Tensor  # [N, K] int64
    weights: Tensor  # [N, K] FP32, carries gradient
    scores: Tensor  # [N, E] FP32, carries gradient; for the balance loss
    counts: Tensor  # [E] int64: tokens per expert


class Gate(nn.Module):
    """Router in FP32 whatever the compute dtype."""

    e_score_correction_bias: Tensor | None

    def __init__(self, dim: int, moe: Moe) -> None:
        super().__init__()
        self.moe = moe
        self.weight = nn.Parameter(torch.empty(moe.n_routed_experts, dim, dtype=torch.float32))
        bias = torch.zeros(moe.n_routed_experts, dtype=torch.float32) if moe.has_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        self.later: WeightGradients | None = None

    def forward(self, x: Tensor) -> Routing:
        """x [N, dim]."""
        return route(wide_linear(x, self.weight, self.later), self.e_score_correction_bias, self.moe)


def route(logits: Tensor, bias: Tensor | None, moe: Moe) -> Routing:
    """logits [N, E] FP32, bias [E] FP32 or None."""
    scores = score(logits, moe)
    with torch.no_grad():
        biased = scores if bias is None else scores + bias
        expert_ids = select(biased, moe)
        counts = torch.bincount(expert_ids.flatten(), minlength=moe.n_routed_experts)
    weights = scores.gather(1, expert_ids)
    if moe.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)  # 1e-20 as in the published HF code
    return Routing(expert_ids=expert_ids, weights=weights * moe.routed_scaling_factor, scores=scores, counts=counts)


def score(logits: Tensor, moe: Moe) -> Tensor:
    """How well each expert suits each token, from logits [N, E]. Weights are shares of a sum, so none is negative."""
    match moe.scoring_func:
        case "sigmoid":
            return logits.sigmoid()
        case "softmax":
            return logits.softmax(dim=-1)
        case unknown:
            assert_never(unknown)


def select(biased: Tensor, moe: Moe) -> Tensor:
    """The chosen experts [N, K] int64 by biased scores [N, E], best first."""
    if capability.on_cpu(biased) and biased.dtype == torch.float32:
        return gate_numba.select(biased, moe)
    return select_reference(biased, moe)


def select_reference(biased: Tensor, moe: Moe) -> Tensor:
    if moe.n_group > 1:
        grouped = biased.unflatten(-1, (moe.n_group, -1))
        best = 2 if moe.topk_method == "noaux_tc" else 1
        worth = grouped.sort(dim=-1, descending=True).values[..., :best].sum(dim=-1)
        kept = worth.sort(dim=-1, descending=True, stable=True).indices[..., : moe.topk_group]
        is_out = torch.ones_like(worth, dtype=torch.bool).scatter(-1, kept, False)
        biased = grouped.masked_fill(is_out[..., None], float("-inf")).flatten(-2)
    return biased.sort(dim=-1, descending=True, stable=True).indices[..., : moe.num_experts_per_tok].contiguous()


def balance_loss(routing: Routing, num_sequences: int, moe: Moe) -> Tensor:
    """Sequence-wise balance loss without its factor alpha: mean over sequences of sum_i f_i P_i [V3 eqs 17-20].

    f_i counts the experts really chosen (bias and groups included); the paper writes the unbiased top-k there
    and does not say which one it ran. 1 at perfect balance.
    """
    experts = moe.n_routed_experts
    ids = routing.expert_ids.view(num_sequences, -1)
    counts = torch.zeros(num_sequences, experts, device=ids.device)
    counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=counts.dtype))
    frequency = counts * (experts / ids.shape[1])
    share = routing.scores / routing.scores.sum(dim=-1, keepdim=True)
    return (frequency * share.view(num_sequences, -1, experts).mean(dim=1)).sum(dim=-1).mean()


@torch.no_grad()
def bias_update(bias: Tensor, counts: Tensor, gamma: float) -> None:
    """bias += gamma * sign(mean load - load), in place; counts [E] of the whole batch over all ranks.

    Call once per optimizer step [V3 §2.1.2].
    """
    load = counts.to(bias.dtype)
    bias += gamma * torch.sign(load.mean() - load)


def max_violation(counts: Tensor) -> float:
    """MaxVio: (largest load - mean) / mean; 0 when balanced."""
    load = counts.double()
    return float(load.max() / load.mean().clamp(min=1e-9) - 1)
