"""RMSNorm, computed in FP32 and rounded once [V3 §4.2; V3repo model.py].

y = x / sqrt(mean(x^2) + eps) * weight.

`rms_norm_reference` is the definition; on a CPU `norm_numba` computes the same in one pass over memory
forward and one backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dovetail.model import norm_numba
from dovetail.numerics import capability


class RmsNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] in the compute dtype; the result has its dtype."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if capability.on_cpu(x) and weight.dtype == torch.float32:
        return _RmsNorm.apply(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float() if x.dtype != torch.float64 else x
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y, scale = norm_numba.forward(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad_x, grad_weight = norm_numba.backward(grad.contiguous(), x, weight, scale)
        return grad_x, grad_weight, None
