"""Rotary position embedding with YaRN [V3repo model.py; V3 §4.3].

It rotates interleaved pairs (2i, 2i+1) in FP32.

`tables` turns positions into cosines and sines; `rotate` applies them. Published weights are interleaved;
code that permutes to half-split first gets the same scores, because q and k get the same permutation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.spec.model import ModelSpec, yarn_mscale


def frequencies(spec: ModelSpec, dim: int) -> Tensor:
    """Angle per position of each of the dim/2 pairs, FP32 [dim/2].

    YaRN divides slow frequencies by its factor, keeps fast ones, and blends between the two dimensions at
    which beta_fast and beta_slow whole turns fit in the original context.
    """
    base = 1.0 / (spec.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))
    yarn = spec.rope_scaling
    if yarn is None:
        return base
    low, high = yarn.blended_pairs(dim, spec.rope_theta)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)).clamp(0, 1)
    return base / yarn.factor * ramp + base * (1 - ramp)


def attention_scale(spec: ModelSpec, qk_head_dim: int) -> float:
    """Softmax scale: 1/sqrt(d), times YaRN's temperature squared (0.1352338 for V3)."""
    scale = qk_head_dim**-0.5
    if spec.rope_scaling is not None:
        scale *= yarn_mscale(spec.rope_scaling.factor, spec.rope_scaling.mscale_all_dim) ** 2
    return scale


def tables(spec: ModelSpec, dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [..., dim/2] FP32 of `positions` [...]."""
    angles = positions.float()[..., None] * frequencies(spec, dim).to(positions.device)
    magnitude = 1.0 if spec.rope_scaling is None else spec.rope_scaling.magnitude
    return angles.cos() * magnitude, angles.sin() * magnitude


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of x [..., dim] by cos, sin [..., dim/2]; FP32 inside, rounded once."""
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
