"""CPU kernel of `loss`: loss and gradient of one row of logits at a time, in place."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from numba.extending import register_jitable
from torch import Tensor

from dovetail.numerics.cpu.kernels import array, kernel
from dovetail.numerics.cpu.scalars_numba import exp, from_ordered, load, ordered, store


@register_jitable
def _one_row(row, target, scale):  # type: ignore[no-untyped-def]
    key = ordered(np.float32(-np.inf))
    for j in range(len(row)):
        key = max(key, ordered(load(row, j)))
    top = from_ordered(key)
    total = np.float32(0.0)
    for j in range(len(row)):
        total += exp(load(row, j) - top)
    picked = load(row, target)
    factor = scale / total
    for j in range(len(row)):
        store(row, j, exp(load(row, j) - top) * factor)
    store(row, target, exp(picked - top) * factor - scale)
    return np.log(total) + top - picked


@kernel
def _losses_and_gradient(logits, targets, scale, losses):  # type: ignore[no-untyped-def]
    for i in prange(logits.shape[0]):
        if targets[i] < 0:
            losses[i] = np.float32(0.0)
            logits[i] = 0
        else:
            losses[i] = _one_row(logits[i], targets[i], scale)


def losses_and_gradient(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    losses = torch.empty(logits.shape[0], dtype=torch.float32)
    _losses_and_gradient(array(logits), array(targets.contiguous()), np.float32(scale), array(losses))
    return losses
