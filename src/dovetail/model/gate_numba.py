"""CPU kernel of `gate.select`: group limit and top-k by repeated scans; the first of equals wins."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from dovetail.numerics.cpu_numba import array, kernel
from dovetail.spec.model import Moe


@kernel
def _select(biased, ids, groups, kept_groups, best):  # type: ignore[no-untyped-def]
    tokens, experts = biased.shape
    size = experts // groups
    for n in prange(tokens):
        score = biased[n].copy()
        worth = np.empty(groups, dtype=np.float32)
        for g in range(groups):
            first = second = np.float32(-np.inf)
            for e in range(g * size, (g + 1) * size):
                v = score[e]
                if v > first:
                    first, second = v, first
                elif v > second:
                    second = v
            worth[g] = first + second if best == 2 else first
        if groups > 1:
            keep = np.zeros(groups, dtype=np.bool_)
            for _ in range(kept_groups):
                top = -1
                for g in range(groups):
                    if not keep[g] and (top < 0 or worth[g] > worth[top]):
                        top = g
                keep[top] = True
            for e in range(experts):
                if not keep[e // size]:
                    score[e] = -np.inf
        for k in range(ids.shape[1]):
            top = -1
            for e in range(experts):
                if score[e] != -np.inf and (top < 0 or score[e] > score[top]):
                    top = e
            ids[n, k] = max(top, 0)
            if top >= 0:
                score[top] = -np.inf


def select(biased: Tensor, moe: Moe) -> Tensor:
    ids = torch.empty(biased.shape[0], moe.num_experts_per_tok, dtype=torch.int64)
    best = 2 if moe.topk_method == "noaux_tc" else 1
    _select(array(biased), array(ids), moe.n_group, moe.topk_group, best)
    return ids
