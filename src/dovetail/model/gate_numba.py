"""CPU kernel of `gate.select`: group limit and top-k by repeated scans; the first of equals wins."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from numba.extending import register_jitable
from torch import Tensor

from dovetail.numerics.cpu_numba import array, kernel
from dovetail.spec.model import Moe


@register_jitable
def select_row(score, ids, groups, kept_groups, best):  # type: ignore[no-untyped-def]
    """Fill ids [K] from biased scores [E], which are overwritten."""
    experts = score.shape[0]
    size = experts // groups
    if groups > 1:
        worth = np.empty(groups, dtype=np.float32)
        keep = np.zeros(groups, dtype=np.bool_)
        for g in range(groups):
            first = second = np.float32(-np.inf)
            for e in range(g * size, (g + 1) * size):
                v = score[e]
                if v > first:
                    first, second = v, first
                elif v > second:
                    second = v
            worth[g] = first + second if best == 2 else first
        for _ in range(kept_groups):
            top = -1
            for g in range(groups):
                if not keep[g] and (top < 0 or worth[g] > worth[top]):
                    top = g
            keep[top] = True
        for e in range(experts):
            if not keep[e // size]:
                score[e] = -np.inf
    for k in range(ids.shape[0]):
        top = -1
        for e in range(experts):
            if score[e] != -np.inf and (top < 0 or score[e] > score[top]):
                top = e
        ids[k] = max(top, 0)
        if top >= 0:
            score[top] = -np.inf


@kernel
def _select(biased, ids, groups, kept_groups, best):  # type: ignore[no-untyped-def]
    for n in prange(biased.shape[0]):
        select_row(biased[n].copy(), ids[n], groups, kept_groups, best)


def select(biased: Tensor, moe: Moe) -> Tensor:
    ids = torch.empty(biased.shape[0], moe.num_experts_per_tok, dtype=torch.int64)
    best = 2 if moe.topk_method == "noaux_tc" else 1
    _select(array(biased.contiguous()), array(ids), moe.n_group, moe.topk_group, best)
    return ids
