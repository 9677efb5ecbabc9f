"""CPU kernel of `gate`: group limit and top-k by repeated scans; the first of equals wins."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from numba.extending import register_jitable
from torch import Tensor

from dovetail.numerics.cpu.kernels import array, kernel
from dovetail.spec.model import Moe

CHUNK = 64  # tokens that share one working space


@register_jitable
def select_row(score, ids, kept_groups, best, worth, kept):  # type: ignore[no-untyped-def]
    """Fill ids [K] from biased scores [E], which are overwritten; worth and kept [groups] are working space."""
    experts, groups = score.shape[0], worth.shape[0]
    size = experts // groups
    if groups > 1:
        for g in range(groups):
            first = second = np.float32(-np.inf)
            for e in range(g * size, (g + 1) * size):
                v = score[e]
                if v > first:
                    first, second = v, first
                elif v > second:
                    second = v
            worth[g] = first + second if best == 2 else first
        kept[:] = False
        for _ in range(kept_groups):
            top = -1
            for g in range(groups):
                if not kept[g] and (top < 0 or worth[g] > worth[top]):
                    top = g
            kept[top] = True
        for g in range(groups):
            if not kept[g]:
                score[g * size : (g + 1) * size] = -np.inf
    for k in range(ids.shape[0]):
        top, highest = 0, np.float32(-np.inf)
        for e in range(experts):
            if score[e] > highest:
                top, highest = e, score[e]
        ids[k] = top
        score[top] = -np.inf


@kernel
def _select(biased, ids, groups, kept_groups, best):  # type: ignore[no-untyped-def]
    tokens, experts = biased.shape
    for chunk in prange((tokens + CHUNK - 1) // CHUNK):
        score, worth, kept = np.empty(experts, np.float32), np.empty(groups, np.float32), np.empty(groups, np.bool_)
        for n in range(chunk * CHUNK, min((chunk + 1) * CHUNK, tokens)):
            score[:] = biased[n]
            select_row(score, ids[n], kept_groups, best, worth, kept)


def select(biased: Tensor, moe: Moe) -> Tensor:
    ids = torch.empty(biased.shape[0], moe.num_experts_per_tok, dtype=torch.int64)
    best = 2 if moe.topk_method == "noaux_tc" else 1
    _select(array(biased.contiguous()), array(ids), moe.n_group, moe.topk_group, best)
    return ids
