"""Measures errors, and gives the error bound that a format deserves.

Tests take their tolerances from here and from nowhere else.

Rounding to a format with unit roundoff u is wrong by at most u of the value. A sum of n products in any order is
wrong by at most n u of the sum of magnitudes; with errors that behave as if independent it is within
lambda sqrt(n) u of it, except with probability 2 exp(-lambda^2 / 2) per element [Higham and Mary 2019,
"A new approach to probabilistic rounding error analysis", thm 2.4]. With lambda = 6 that is 3e-8.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dovetail.spec.model import Mla, ModelSpec

LAMBDA = 6.0


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to nearest: 2^-24 for FP32, 2^-8 for BF16, 2^-53 for FP64."""
    return torch.finfo(dtype).eps / 2


def tolerance(dtype: torch.dtype, *, roundings: float = 1.0, terms: float = 1.0) -> float:
    """Relative error of a result that was rounded `roundings` times in a row to `dtype` on its way, and summed
    over `terms` terms in FP32 (in FP64 where `dtype` is FP64)."""
    inside = torch.float64 if dtype == torch.float64 else torch.float32
    return roundings * unit_roundoff(dtype) + LAMBDA * math.sqrt(terms) * unit_roundoff(inside)


def network_terms(spec: ModelSpec, length: int) -> int:
    """Terms summed on the longest path from an embedding to a logit over a context of `length` tokens."""
    mla, moe = spec.attention, spec.moe
    assert isinstance(mla, Mla)
    norms = 3 * spec.hidden_size + mla.kv_lora_rank
    attention = spec.hidden_size + max(mla.q_lora_rank or 0, mla.kv_lora_rank) + mla.qk_head_dim + length
    output = mla.num_attention_heads * mla.v_head_dim
    width = max(spec.intermediate_size, moe.moe_intermediate_size * max(moe.n_shared_experts, 1) if moe else 0)
    layers = spec.num_hidden_layers + spec.num_nextn_predict_layers
    return layers * (norms + attention + output + spec.hidden_size + width) + spec.hidden_size


def elementwise_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / |expected|; differences of one smallest normal number count as none.

    inf where one is NaN or infinite and the other is not the same.
    """
    smallest = torch.finfo(actual.dtype).smallest_normal
    difference, magnitude = _difference(actual, expected)
    return _largest((difference - smallest).clamp(min=0) / magnitude.clamp(min=smallest))


def normwise_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected|: for sums, whose small elements are differences of large terms."""
    return rowwise_error(actual.flatten()[None], expected.flatten()[None])


def rowwise_error(actual: Tensor, expected: Tensor) -> float:
    """The largest normwise error of a row, so that wrong small rows do not hide behind large ones."""
    difference, magnitude = _difference(actual, expected)
    if not difference.numel():
        return 0.0
    worst, largest = difference.amax(dim=-1), magnitude.amax(dim=-1)
    return _largest(torch.where(worst == 0, 0.0, worst / largest))


def _difference(actual: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """|actual - expected| and |expected|, FP64; where either is not finite, 0 or inf and 0."""
    if actual.shape != expected.shape:
        raise ValueError(f"shapes {list(actual.shape)} and {list(expected.shape)} cannot be compared")
    wide, truth = actual.detach().double(), expected.detach().double()
    is_same = (wide == truth) | (wide.isnan() & truth.isnan())
    is_finite = wide.isfinite() & truth.isfinite()
    difference = torch.where(is_finite, (wide - truth).abs(), math.inf)
    return difference.masked_fill(is_same, 0.0), truth.abs().masked_fill(~is_finite, 0.0)


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0
