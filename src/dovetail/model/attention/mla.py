"""Multi-head latent attention [V3 eqs 1-11].

Keys and values are two projections of one latent per token, `kv_lora_rank` wide, beside one rotary key that
all heads share; the latent (after its norm) and that key (after rotation) are all that a cache keeps.

Two ways to compute the same thing:
  expanded   k_i = [W_uk_i latent; rope_key], v_i = W_uv_i latent: attention with a key and value per head.
             Cheap per token when many queries share the keys: training and prefill.
  absorbed   score = (W_uk_i^T q_nope_i) . latent + q_rope_i . rope_key, output = W_uv_i (sum_j p_j latent_j):
             one head of keys, kv_lora_rank + qk_rope_head_dim wide, read straight from the cache: decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dovetail.model.attention.causal import causal_attention, masked_attention
from dovetail.model.attention.heads import Heads, split_heads
from dovetail.model.attention.rope import attention_scale, rotate
from dovetail.model.norm import RmsNorm
from dovetail.model.recompute import Recompute
from dovetail.numerics.linear import Input, Linear, quantize_for
from dovetail.spec.model import Mla, ModelSpec


class LatentCache(Protocol):
    """Where latents and rotary keys of earlier tokens live; the model knows no more about it."""

    def update(self, layer: int, positions: Tensor, latent: Tensor, rope_key: Tensor) -> tuple[Tensor, Tensor]:
        """Write latent [B, T, kv_lora_rank] and rope_key [B, T, qk_rope_head_dim] at positions [B, T].

        Returns latent [B, S, .] and rope_key [B, S, .] with S = 1 + the largest position.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What every layer of one forward pass shares: positions, rotation, document starts, cache."""

    positions: Tensor  # [B, T] int64
    cos: Tensor  # [B, T, rope/2] FP32
    sin: Tensor
    first: Tensor | None = None  # [B, T] int32: first visible position where documents are kept apart
    cache: LatentCache | None = None
    absorbed: bool = False
    recompute: Recompute | None = None

    def again(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """function(*inputs); where recompute is on, made again for the backward pass instead of kept."""
        return function(*inputs) if self.recompute is None else self.recompute.again(function, *inputs)

    def visible(self, num_keys: int) -> Tensor:
        """[B, 1, T, S] bool: keys up to the query's own position."""
        keys = torch.arange(num_keys, device=self.positions.device)
        return (keys <= self.positions[..., None])[:, None]


class MultiHeadLatentAttention(nn.Module):
    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        super().__init__()
        mla = spec.attention
        assert isinstance(mla, Mla)
        self.mla = mla
        self.scale = attention_scale(spec, mla.qk_head_dim)
        dim, heads = spec.hidden_size, mla.num_attention_heads

        def linear(n_in: int, n_out: int) -> Linear:
            return Linear(n_in, n_out, dtype)

        if mla.q_lora_rank is None:
            self.q_proj = linear(dim, heads * mla.qk_head_dim)
        else:
            self.q_a_proj = linear(dim, mla.q_lora_rank)
            self.q_a_layernorm = RmsNorm(mla.q_lora_rank, spec.rms_norm_eps)
            self.q_b_proj = linear(mla.q_lora_rank, heads * mla.qk_head_dim)
        self.kv_a_proj_with_mqa = linear(dim, mla.kv_lora_rank + mla.qk_rope_head_dim)
        self.kv_a_layernorm = RmsNorm(mla.kv_lora_rank, spec.rms_norm_eps)
        self.kv_b_proj = linear(mla.kv_lora_rank, heads * (mla.qk_nope_head_dim + mla.v_head_dim))
        self.o_proj = linear(heads * mla.v_head_dim, dim)

    def forward(self, x: Tensor, context: Context, layer: int) -> Tensor:
        """x [B, T, dim] -> [B, T, dim]; `context` says where the tokens are and what came before."""
        low, quantized = x, None
        if self.mla.q_lora_rank is not None:
            quantized = quantize_for(x, self.q_a_proj, self.kv_a_proj_with_mqa)
            low = context.again(self.q_a_layernorm, self.q_a_proj(x, quantized))
        latent, rope_key = self.remember(x, context, layer, quantized)
        if context.absorbed:
            heads = self._absorbed(self.queries(low), latent, rope_key, context)
        elif latent.shape[1] == x.shape[1]:
            q, k, v = context.again(self._expand, low, latent, rope_key, context.cos, context.sin)
            heads = causal_attention(q, k, v, self.scale, context.first).transpose(1, 2)
        else:
            heads = self._expanded_over_cache(self.queries(low), latent, rope_key, context)
        return self.o_proj(heads.flatten(2))

    def remember(
        self, x: Tensor, context: Context, layer: int, quantized: Input | None = None
    ) -> tuple[Tensor, Tensor]:
        """Latent [B, S, kv_lora_rank] and rotated key [B, S, qk_rope_head_dim] of x and, with a cache, of what came
        before: all that attention needs of it."""
        both = self.kv_a_proj_with_mqa(x, quantized).split([self.mla.kv_lora_rank, self.mla.qk_rope_head_dim], dim=-1)
        latent = context.again(self.kv_a_layernorm, both[0].contiguous())
        rope_key = rotate(both[1], context.cos, context.sin)
        if context.cache is None:
            return latent, rope_key
        return context.cache.update(layer, context.positions, latent, rope_key)

    def _expand(self, low: Tensor, latent: Tensor, rope_key: Tensor, cos: Tensor, sin: Tensor) -> Heads:
        """The up-projections: queries, keys and values per head [B, H, T, .]."""
        return split_heads(self.queries(low), self.keys_values(latent), rope_key, cos, sin)

    def queries(self, low: Tensor) -> Tensor:
        """Unrotated queries [B, T, H, qk_head_dim] of the compressed ones (of x, where there is no compression)."""
        up = self.q_proj if self.mla.q_lora_rank is None else self.q_b_proj
        return up(low).unflatten(-1, (self.mla.num_attention_heads, self.mla.qk_head_dim))

    def keys_values(self, latent: Tensor) -> Tensor:
        """[B, S, H, qk_nope_head_dim + v_head_dim]."""
        return self.kv_b_proj(latent).unflatten(-1, (self.mla.num_attention_heads, -1))

    def _absorbed(self, q: Tensor, latent: Tensor, rope_key: Tensor, context: Context) -> Tensor:
        nope = self.mla.qk_nope_head_dim
        up = self.kv_b_proj.weight.unflatten(0, (self.mla.num_attention_heads, -1))  # [H, nope + v, latent]
        q_nope, q_rope = q.transpose(1, 2).split([nope, self.mla.qk_rope_head_dim], dim=-1)
        q_rope = rotate(q_rope, context.cos[:, None], context.sin[:, None])
        keys = torch.cat((latent, rope_key), dim=-1)[:, None]
        whole = torch.cat((q_nope @ up[:, :nope], q_rope), dim=-1)
        mixed = masked_attention(whole, keys, latent[:, None], self.scale, context.visible(latent.shape[1]))
        return (mixed @ up[:, nope:].transpose(1, 2)).transpose(1, 2)

    def _expanded_over_cache(self, q: Tensor, latent: Tensor, rope_key: Tensor, context: Context) -> Tensor:
        nope, heads = self.mla.qk_nope_head_dim, self.mla.num_attention_heads
        q_nope, q_rope = q.transpose(1, 2).split([nope, self.mla.qk_rope_head_dim], dim=-1)
        q = torch.cat((q_nope, rotate(q_rope, context.cos[:, None], context.sin[:, None])), dim=-1)
        k, v = self.keys_values(latent).transpose(1, 2).split([nope, self.mla.v_head_dim], dim=-1)
        k = torch.cat((k, rope_key[:, None].expand(-1, heads, -1, -1)), dim=-1)
        return masked_attention(q, k, v, self.scale, context.visible(k.shape[2])).transpose(1, 2)
