"""CPU kernel of `loss._losses_and_gradient`: loss and gradient of one row of logits at a time, in place."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from dovetail.numerics.cpu_numba import array, exp, from_ordered, kernel, load, ordered, store


@kernel
def _losses_and_gradient(logits, targets, scale, losses):  # type: ignore[no-untyped-def]
    rows, vocab = logits.shape
    for i in prange(rows):
        row, target = logits[i], targets[i]
        if target < 0:
            losses[i] = np.float32(0.0)
            for j in range(vocab):
                row[j] = 0
            continue
        key = ordered(np.float32(-np.inf))
        for j in range(vocab):
            key = max(key, ordered(load(row, j)))
        top = from_ordered(key)
        total = np.float32(0.0)
        for j in range(vocab):
            total += exp(load(row, j) - top)
        picked = load(row, target)
        losses[i] = np.log(total) + top - picked
        if scale != np.float32(0.0):
            factor = scale / total
            for j in range(vocab):
                store(row, j, exp(load(row, j) - top) * factor)
            store(row, target, (exp(picked - top) / total - np.float32(1.0)) * scale)


def losses_and_gradient(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    losses = torch.empty(logits.shape[0], dtype=torch.float32)
    _losses_and_gradient(array(logits), array(targets.contiguous()), np.float32(scale), array(losses))
    return losses
