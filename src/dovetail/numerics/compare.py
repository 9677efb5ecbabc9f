"""Error measures, and the error that a format earns: the one place where tests take their tolerances from.

Rounding to a format with unit roundoff u is wrong by at most u of the value. A sum of n products in any order is
wrong by at most n u of the sum of magnitudes; with errors that behave as if independent it is within
lambda sqrt(n) u of it, except with probability 2 exp(-lambda^2 / 2) per element [Higham and Mary 2019,
"A new approach to probabilistic rounding error analysis", thm 2.4]. With lambda = 6 that is 3e-8.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LAMBDA = 6.0


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to nearest: 2^-24 for FP32, 2^-8 for BF16, 2^-53 for FP64."""
    return torch.finfo(dtype).eps / 2


def tolerance(dtype: torch.dtype, *, roundings: float = 1.0, terms: float = 1.0) -> float:
    """Relative error of a result that was rounded `roundings` times in a row to `dtype` on its way, and summed
    over `terms` terms in FP32 (in FP64 where `dtype` is FP64)."""
    inside = torch.float64 if dtype == torch.float64 else torch.float32
    return roundings * unit_roundoff(dtype) + LAMBDA * math.sqrt(terms) * unit_roundoff(inside)


def elementwise_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / |expected|; differences of one smallest normal number count as none.

    inf where one is NaN or infinite and the other is not the same.
    """
    smallest = torch.finfo(actual.dtype).smallest_normal
    difference, magnitude = _difference(actual, expected)
    return _largest((difference - smallest).clamp(min=0) / magnitude.clamp(min=smallest))


def normwise_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected|: for sums, whose small elements are differences of large terms."""
    difference, magnitude = _difference(actual, expected)
    largest = _largest(magnitude)
    worst = _largest(difference)
    return worst / largest if largest else math.inf if worst else 0.0


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
