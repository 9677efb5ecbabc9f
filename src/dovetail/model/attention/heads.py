"""Makes queries, keys and values per head from the up-projections, and rotates them.

They are split, rotated, and laid out as [B, H, T, dim].

q = [q_nope; rope(q_rope)] and k = [k_nope; rope_key], the one rotated key shared by all heads [V3 eqs 1-8].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dovetail.model.attention import heads_numba
from dovetail.model.attention.rope import rotate
from dovetail.numerics import capability

Heads = tuple[Tensor, Tensor, Tensor]


def split_heads(q: Tensor, kv: Tensor, rope_key: Tensor, cos: Tensor, sin: Tensor) -> Heads:
    """q [B, T, H, nope + rope] unrotated, kv [B, T, H, nope + v], rope_key [B, T, rope] rotated, cos and sin
    [B, T, rope/2] -> q, k [B, H, T, nope + rope] and v [B, H, T, v]."""
    if capability.on_cpu(q, kv, rope_key):
        return _SplitHeads.apply(q, kv, rope_key, cos, sin)
    return split_heads_reference(q, kv, rope_key, cos, sin)


def split_heads_reference(q: Tensor, kv: Tensor, rope_key: Tensor, cos: Tensor, sin: Tensor) -> Heads:
    rope = rope_key.shape[-1]
    nope = q.shape[-1] - rope
    q_nope, q_rope = q.split([nope, rope], dim=-1)
    k_nope, v = kv.split([nope, kv.shape[-1] - nope], dim=-1)
    rotated = rotate(q_rope, cos[:, :, None], sin[:, :, None])
    key = rope_key[:, :, None].expand(-1, -1, q.shape[2], -1)
    whole_q, whole_k = torch.cat((q_nope, rotated), -1), torch.cat((k_nope, key), -1)
    return whole_q.transpose(1, 2), whole_k.transpose(1, 2), v.transpose(1, 2)


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, rope_key: Tensor, cos: Tensor, sin: Tensor) -> Heads:
        cos, sin = (x.expand(*q.shape[:2], -1).contiguous() for x in (cos, sin))
        ctx.save_for_backward(cos, sin)
        return heads_numba.split(q.contiguous(), kv.contiguous(), rope_key.contiguous(), cos, sin)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grads = heads_numba.join(grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous(), cos, sin)
        return *grads, None, None
