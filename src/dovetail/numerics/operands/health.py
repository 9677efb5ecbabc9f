"""Measures what quantisation did to a tensor: how much was lost, and how."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.numerics.formats.floats import float_format
from dovetail.numerics.formats.quantized import Quantized, grid_values, spread_scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Shares are of the elements that are not zero; a tensor of zeros is in perfect health."""

    flushed: float  # share that became zero
    clipped: float  # share at the format's largest value that would be larger
    smallest_scale: float
    largest_scale: float
    signal_to_noise: float  # decibel, 10 log10(sum x^2 / sum (x - quantised x)^2); inf where nothing was lost


def measure_health(x: Tensor, quantized: Quantized) -> Health:
    """x, and the same in a small format."""
    wide, scale, grid = x.double(), spread_scale(quantized).double(), grid_values(quantized).double()
    restored = grid * scale
    nonzero = wide != 0
    count = max(int(nonzero.sum()), 1)
    largest = float_format(quantized.format).max
    # A quotient is beyond the format by rounding of the scale alone up to half of the last place.
    beyond = (wide / scale).abs() > largest * (1 + torch.finfo(torch.float32).eps)
    signal, noise = wide.square().sum(), (wide - restored).square().sum()
    return Health(
        flushed=float((nonzero & (grid == 0)).sum()) / count,
        clipped=float(beyond.sum()) / count,
        smallest_scale=float(scale.min()) if scale.numel() else 0.0,
        largest_scale=float(scale.max()) if scale.numel() else 0.0,
        signal_to_noise=float(10 * torch.log10(signal / noise)) if noise > 0 else float("inf"),
    )
