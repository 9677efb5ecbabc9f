"""Bytes that one process needs, without any parallelism: training, and generation.

State (weights, master weights, gradients, moments, moving average) is exact: it is counted tensor by tensor
from the checkpoint's own list. Activations are an estimate: the sum of what each layer keeps for its backward
pass,

    attention   layer input, its norm, latent and query latent before and after their norms, q, k, v, and the
                input of W_o
    dense ffn   layer input, its norm, gate and up
    experts     the same, with K rows per token gathered, K gates and ups, K outputs (for the gradient of the
                gate's weights); the shared experts' gate and up; the router's FP32 input and scores
    MTP         both inputs of each module before and after their norms, and their projection
    head        the hidden state before and after each final norm; the logits of one chunk, once, in BF16

in BF16, per token. SwiGLU outputs and attention probabilities are made anew and not kept. The band around it
covers what is not listed: expert rows padded to whole tiles, gradients and work buffers of the layer at hand,
the allocator's holes. The runtime itself (Python, torch and its libraries) is not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dovetail.cost.count import cache_bytes_per_token
from dovetail.spec.model import Mla, ModelSpec
from dovetail.spec.tensors import stored_tensors

BF16, FP32 = 2, 4  # bytes
BAND = (0.9, 1.5)  # of the activations' estimate; what our own model keeps is within 2 % of it (its test)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingMemory:
    """Bytes by use. `activations` is an estimate within `BAND`; the others are exact."""

    weights: int  # BF16; norms and router FP32
    master_weights: int  # FP32 copies of the BF16 weights
    gradients: int
    moments: int  # two of AdamW, BF16 [V3 §3.3.3]
    moving_average: int  # FP32 EMA, 0 when off
    activations: int

    @property
    def state(self) -> int:
        return self.weights + self.master_weights + self.gradients + self.moments + self.moving_average

    @property
    def total(self) -> int:
        return self.state + self.activations

    @property
    def band(self) -> tuple[int, int]:
        """Least and most total bytes to expect."""
        return self.state + int(BAND[0] * self.activations), self.state + int(BAND[1] * self.activations)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationMemory:
    """Bytes of weights and of a full cache; both exact."""

    weights: int
    cache: int

    @property
    def total(self) -> int:
        return self.weights + self.cache


def training_memory(
    spec: ModelSpec,
    tokens: int,
    *,
    moving_average: bool = True,
    recompute: bool = False,
    gradient_bytes: int = FP32,
    loss_chunk: int = 1 << 24,
) -> TrainingMemory:
    """Bytes to train `spec` on microbatches of `tokens` tokens.

    `recompute` is of RMSNorm outputs and MLA up-projections [V3 §3.2.3]; `gradient_bytes` is per parameter
    (FP32 where microbatches accumulate); `loss_chunk` is how many logits exist at once.
    """
    narrow, wide = _trained_parameters(spec)
    activations = tokens * activation_bytes_per_token(spec, recompute)
    activations += BF16 * min(tokens * spec.vocab_size, loss_chunk)
    return TrainingMemory(
        weights=weight_bytes(spec),
        master_weights=FP32 * narrow,
        gradients=gradient_bytes * (narrow + wide),
        moments=2 * BF16 * (narrow + wide),
        moving_average=FP32 * (narrow + wide) if moving_average else 0,
        activations=activations,
    )


def generation_memory(spec: ModelSpec, batch: int, context: int, mtp: bool = False) -> GenerationMemory:
    """Bytes to generate with `batch` sequences of up to `context` tokens; `mtp`: its modules cache too."""
    return GenerationMemory(weights=weight_bytes(spec), cache=batch * context * cache_bytes_per_token(spec, BF16, mtp))


def weight_bytes(spec: ModelSpec) -> int:
    """Bytes of the model as it computes: BF16, with norms, router weights and biases in FP32."""
    return sum(
        math.prod(tensor.shape) * (FP32 if tensor.dtype == "F32" else BF16)
        for tensor in stored_tensors(spec)
        if not tensor.copy_of
    )


def _trained_parameters(spec: ModelSpec) -> tuple[int, int]:
    """Parameters with a gradient that compute in BF16, and in FP32; the gate's bias has no gradient."""
    narrow = wide = 0
    for tensor in stored_tensors(spec):
        if tensor.copy_of or tensor.name.endswith("e_score_correction_bias"):
            continue
        if tensor.dtype == "F32":
            wide += math.prod(tensor.shape)
        else:
            narrow += math.prod(tensor.shape)
    return narrow, wide


def activation_bytes_per_token(spec: ModelSpec, recompute: bool = False) -> int:
    """Bytes that one token keeps from the forward to the backward pass, all layers and MTP modules."""
    depth = spec.num_nextn_predict_layers
    elements = 2 * spec.hidden_size * (1 + depth)  # before and after each final norm
    elements += 5 * spec.hidden_size * depth  # the two inputs of each MTP projection, normed and not, and its output
    wide = 0
    for layer in range(spec.num_hidden_layers + depth):
        elements += _attention_elements(spec, recompute) + _ffn_elements(spec, layer, recompute)
        if spec.moe and spec.is_moe_layer(layer):
            wide += 3 * spec.moe.n_routed_experts + spec.hidden_size  # logits, scores, their gradient; gate's input
    return BF16 * elements + FP32 * wide


def _attention_elements(spec: ModelSpec, recompute: bool) -> int:
    mla, hidden = spec.attention, spec.hidden_size
    if not isinstance(mla, Mla):
        raise ValueError("grouped-query attention is described for counting, not for training")
    heads, query_rank = mla.num_attention_heads, mla.q_lora_rank or 0
    kept = hidden + mla.kv_lora_rank + query_rank + heads * mla.v_head_dim  # inputs of norms and of W_o
    if recompute:
        return kept
    return kept + hidden + mla.kv_lora_rank + query_rank + heads * (2 * mla.qk_head_dim + mla.v_head_dim)


def _ffn_elements(spec: ModelSpec, layer: int, recompute: bool) -> int:
    hidden, moe = spec.hidden_size, spec.moe
    kept = hidden if recompute else 2 * hidden
    if moe is None or not spec.is_moe_layer(layer):
        return kept + 2 * spec.intermediate_size
    per_row = 2 * hidden + 2 * moe.moe_intermediate_size  # gathered input, output, gate and up
    return kept + moe.num_experts_per_tok * per_row + 2 * moe.n_shared_experts * moe.moe_intermediate_size
