"""Multi-head latent attention and its cache's protocol [V3 eqs 1-11].

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
    """The KV cache as the model sees it: latents and rotary keys of earlier tokens, by layer and position.

    A pass over the model makes room once; then each layer writes the tokens at hand and attends. The two are apart, so
    that a cache may keep its tokens in pages and absorbed attention may read them where they are.
    """

    def reserve(self, num_keys: int) -> None:
        """Positions 0 .. num_keys - 1 will be written and read. Raises `ValueError` where there is no room."""
        ...

    def write(self, layer: int, positions: Tensor, latent: Tensor, rope_key: Tensor) -> None:
        """Keep latent [B, T, kv_lora_rank] and rope_key [B, T, qk_rope_head_dim] of positions [B, T]."""
        ...

    def gather(self, layer: int, num_keys: int) -> tuple[Tensor, Tensor]:
        """latent [B, S, .] and rope_key [B, S, .] of positions 0 .. S-1, S = num_keys: what is expanded."""
        ...

    def attend(self, layer: int, query: Tensor, positions: Tensor, num_keys: int, scale: float) -> Tensor:
        """`absorbed_attention` of query [B, H, T, kv_lora_rank + qk_rope_head_dim] over positions 0 .. num_keys - 1."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What every layer of one forward pass shares: positions, rotation, document starts, cache."""

    positions: Tensor  # [B, T] int64
    cos: Tensor  # [B, T, rope/2] FP32
    sin: Tensor
    first: Tensor | None = None  # [B, T] int32: first visible position where documents are kept apart
    cache: LatentCache | None = None
    num_keys: int = 0  # with a cache: how many of its positions the queries can see at most, their own included
    absorbed: bool = False
    recompute: Recompute | None = None

    def again(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """function(*inputs); where recompute is on, made again for the backward pass instead of kept."""
        return function(*inputs) if self.recompute is None else self.recompute.again(function, *inputs)


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
        # Absorption multiplies queries by the weight of kv_b_proj. Where a recipe quantises latents and weight, that is
        # another function, so the cache is expanded as in a prompt.
        if context.absorbed and self.kv_b_proj.precision is None:
            heads = self._absorbed(self.queries(low), latent, rope_key, context, layer)
            return self.o_proj(heads.flatten(2))
        if context.cache is not None and context.num_keys > x.shape[1]:
            latent, rope_key = context.cache.gather(layer, context.num_keys)
        if latent.shape[1] == x.shape[1]:
            q, k, v = context.again(self._expand, low, latent, rope_key, context.cos, context.sin)
            heads = causal_attention(q, k, v, self.scale, context.first).transpose(1, 2)
        else:
            heads = self._expanded_over_cache(self.queries(low), latent, rope_key, context)
        return self.o_proj(heads.flatten(2))

    def remember(
        self, x: Tensor, context: Context, layer: int, quantized: Input | None = None
    ) -> tuple[Tensor, Tensor]:
        """Latent [B, T, kv_lora_rank] and rotated key [B, T, qk_rope_head_dim] of x: all that attention needs of it.
        They are written to the cache, if there is one."""
        both = self.kv_a_proj_with_mqa(x, quantized).split([self.mla.kv_lora_rank, self.mla.qk_rope_head_dim], dim=-1)
        latent = context.again(self.kv_a_layernorm, both[0].contiguous())
        rope_key = rotate(both[1], context.cos, context.sin)
        if context.cache is not None:
            context.cache.write(layer, context.positions, latent, rope_key)
        return latent, rope_key

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

    def _absorbed(self, q: Tensor, latent: Tensor, rope_key: Tensor, context: Context, layer: int) -> Tensor:
        nope = self.mla.qk_nope_head_dim
        up = self.kv_b_proj.weight.unflatten(0, (self.mla.num_attention_heads, -1))  # [H, nope + v, latent]
        q_nope, q_rope = q.transpose(1, 2).split([nope, self.mla.qk_rope_head_dim], dim=-1)
        q_rope = rotate(q_rope, context.cos[:, None], context.sin[:, None])
        query = torch.cat((q_nope @ up[:, :nope], q_rope), dim=-1)
        if context.cache is not None:
            mixed = context.cache.attend(layer, query, context.positions, context.num_keys, self.scale)
        else:
            mixed = absorbed_attention(query, latent, rope_key, context.positions, self.scale)
        return (mixed @ up[:, nope:].transpose(1, 2)).transpose(1, 2)

    def _expanded_over_cache(self, q: Tensor, latent: Tensor, rope_key: Tensor, context: Context) -> Tensor:
        nope, heads = self.mla.qk_nope_head_dim, self.mla.num_attention_heads
        q_nope, q_rope = q.transpose(1, 2).split([nope, self.mla.qk_rope_head_dim], dim=-1)
        q = torch.cat((q_nope, rotate(q_rope, context.cos[:, None], context.sin[:, None])), dim=-1)
        k, v = self.keys_values(latent).transpose(1, 2).split([nope, self.mla.v_head_dim], dim=-1)
        k = torch.cat((k, rope_key[:, None].expand(-1, heads, -1, -1)), dim=-1)
        return masked_attention(q, k, v, self.scale, visible_keys(context.positions, k.shape[2])).transpose(1, 2)


def absorbed_attention(query: Tensor, latent: Tensor, rope_key: Tensor, positions: Tensor, scale: float) -> Tensor:
    """One head of keys for all query heads: latent and rotary key side by side; its values are the latent itself.

    query [B, H, T, kv_lora_rank + qk_rope_head_dim], latent [B, S, kv_lora_rank], rope_key [B, S, qk_rope_head_dim] of
    positions 0 .. S-1, positions [B, T] of the queries -> [B, H, T, kv_lora_rank].
    """
    keys = torch.cat((latent, rope_key), dim=-1)[:, None]
    values = keys[..., : latent.shape[-1]]  # of the copy: bits of a product may depend on where a cache's slot begins
    return masked_attention(query, keys, values, scale, visible_keys(positions, latent.shape[1]))


def visible_keys(positions: Tensor, num_keys: int) -> Tensor:
    """[B, 1, T, S] bool: a query at positions [B, T] sees the keys up to its own position."""
    keys = torch.arange(num_keys, device=positions.device)
    return (keys <= positions[..., None])[:, None]
