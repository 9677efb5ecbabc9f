"""Causal softmax attention, expanded and absorbed.

Expanded, each head has keys and values of its own; absorbed, the latent is both.

`attention_reference` is the definition: scores in the compute dtype, softmax in FP32, probabilities cast back,
as the published inference code has it. Query t of a sequence may see keys first[t] .. t: `first` is 0 without
document boundaries, else the start of t's document.

On a CPU `_BlockAttention` does the same in blocks of queries, so that memory grows with the context and not
with its square; it keeps the log-sum-exp of each row and makes the scores anew in the backward pass. Its products are
torch's. On a CPU with AVX-512 BF16 `_HeadAttention`, made of our own products, is faster.
On a GPU scaled_dot_product_attention does it, V padded to the key width, since unequal widths fall back to
the slow path there.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.model.attention import causal_bf16_numba, causal_numba
from dovetail.numerics import capability
from dovetail.numerics.cpu.kernels import array

QUERY_BLOCK = 256  # queries per block on a CPU: scores of 256 x 256 stay in its caches


def document_starts(document_ids: Tensor) -> Tensor:
    """First position [B, T] int32 of the document that each position belongs to; ids [B, T] of contiguous runs."""
    positions = torch.arange(document_ids.shape[1], device=document_ids.device)
    is_start = torch.ones_like(document_ids, dtype=torch.bool)
    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(is_start, positions, 0).cummax(dim=1).values.to(torch.int32)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, first: Tensor | None = None) -> Tensor:
    """q, k [B, H, T, qk_head_dim], v [B, H, T, v_head_dim], first [B, T] or None -> [B, H, T, v_head_dim]."""
    if capability.on_cpu(q, k, v):
        if first is None:
            first = torch.zeros(q.shape[0], q.shape[2], dtype=torch.int32)
        if capability.multiplies_bf16(q, k, v):
            return _HeadAttention.apply(q, k, v, scale, first)
        return _BlockAttention.apply(q, k, v, scale, first)
    if q.is_cuda:
        mask = None if first is None else _mask(first, q.shape[2])
        padded = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
        output = F.scaled_dot_product_attention(q, k, padded, attn_mask=mask, is_causal=first is None, scale=scale)
        return output[..., : v.shape[-1]]
    return attention_reference(q, k, v, scale, first)


def _mask(first: Tensor, length: int) -> Tensor:
    """[B, 1, T, T] bool: may query t see key s."""
    keys = torch.arange(length, device=first.device)
    return ((keys <= keys[:, None]) & (keys >= first[..., None]))[:, None]


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float, first: Tensor | None = None) -> Tensor:
    if first is None:
        first = torch.zeros(q.shape[0], q.shape[2], dtype=torch.int32, device=q.device)
    return masked_attention(q, k, v, scale, _mask(first, q.shape[2]))


def masked_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor) -> Tensor:
    """Attention with any mask: visible [B, 1, T, S] bool; k and v may have one head for all."""
    scores = (q @ k.transpose(-1, -2)) * scale
    wide = scores if scores.dtype == torch.float64 else scores.float()
    probabilities = wide.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return probabilities.to(v.dtype) @ v


class _HeadAttention(torch.autograd.Function):
    """The kernels of `causal_bf16_numba`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, first: Tensor) -> Tensor:
        q, k, v, first = (x.contiguous() for x in (q, k, v, first))
        batch, heads, length, v_dim = v.shape
        output = v.new_empty(batch, length, heads, v_dim)
        log_sum = torch.empty(batch * heads, length)
        shape, splits = (*q.shape, v_dim), -(-numba.get_num_threads() // max(batch * heads, 1))
        flat = (array(x.view(-1)) for x in (q, k, v))
        causal_bf16_numba.forward(
            *flat, np.float32(scale), array(first), array(output.view(-1)), array(log_sum), shape, splits
        )
        ctx.save_for_backward(q, k, v, log_sum, first)
        ctx.scale, ctx.shape = scale, shape
        return output.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, log_sum, first = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (q, k, v)]
        flat = (array(x.contiguous().view(-1)) for x in (grad, q, k, v))
        flat_grads = (array(x.view(-1)) for x in grads)
        causal_bf16_numba.backward(*flat, np.float32(ctx.scale), array(first), array(log_sum), *flat_grads, ctx.shape)
        return grads[0], grads[1], grads[2], None, None


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, first: Tensor) -> Tensor:
        shape = (q.shape[0] * q.shape[1], q.shape[2])
        flat_q, flat_k, flat_v = (x.reshape(*shape, x.shape[-1]) for x in (q, k, v))
        output = torch.empty_like(flat_v)
        log_sum = torch.empty(shape, dtype=torch.float32)
        first = first.contiguous()
        for start, stop in _blocks(shape[1]):
            scores = torch.bmm(flat_q[:, start:stop], flat_k[:, :stop].transpose(1, 2))
            causal_numba.softmax(scores, start, scale, first, log_sum)
            block = torch.bmm(scores, flat_v[:, :stop])
            if stop - start == shape[1]:
                output = block
            else:
                output[:, start:stop] = block
        ctx.save_for_backward(flat_q, flat_k, flat_v, log_sum, first)
        ctx.scale = scale
        return output.view(*q.shape[:3], v.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, log_sum, first = ctx.saved_tensors
        heads = grad.shape[:2]
        grad = grad.reshape(v.shape)
        grad_q, grad_k, grad_v = block_attention_backward(grad, q, k, v, log_sum, first, ctx.scale)
        return (
            grad_q.view(*heads, *q.shape[1:]),
            grad_k.view(*heads, *k.shape[1:]),
            grad_v.view(*heads, *v.shape[1:]),
            None,
            None,
        )


def block_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, log_sum: Tensor, first: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of flat q, k, v [B*H, T, .]; several blocks of queries add into FP32 for k and v."""
    length = q.shape[1]
    if length == 0:
        return q.clone(), k.clone(), v.clone()
    grad_q = torch.empty_like(q)
    grad_k = grad_v = None
    for start, stop in _blocks(length):
        q_block, grad_block = q[:, start:stop], grad[:, start:stop]
        probabilities = torch.bmm(q_block, k[:, :stop].transpose(1, 2))
        grad_scores = torch.bmm(grad_block, v[:, :stop].transpose(1, 2))
        causal_numba.softmax_backward(probabilities, grad_scores, start, scale, first, log_sum)
        block_k = torch.bmm(grad_scores.transpose(1, 2), q_block)
        block_v = torch.bmm(probabilities.transpose(1, 2), grad_block)
        if stop - start == length:
            return torch.bmm(grad_scores, k), block_k, block_v
        grad_q[:, start:stop] = torch.bmm(grad_scores, k[:, :stop])
        if grad_k is None or grad_v is None:
            grad_k, grad_v = torch.zeros(k.shape), torch.zeros(v.shape)
        grad_k[:, :stop] += block_k
        grad_v[:, :stop] += block_v
    assert grad_k is not None and grad_v is not None
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK)]
