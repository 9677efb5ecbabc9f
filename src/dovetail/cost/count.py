"""Counts a model's parameters, its FLOP per token and its cache bytes per token, exactly.

A matrix counts rows x columns, a norm its width, the gate its selection bias; nothing is rounded. The FLOP per token
follow the rule that reproduces the paper's Table 2 [ISCA §2.2.2]: two for each parameter that multiplies a token (those
of the head, but not of the embedding, which is a look-up), plus attention's two products over the context. A backward
pass costs twice the forward. Norms, softmax, rotation and the gate's choice are left out, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

from dovetail.spec.model import Gqa, Mla, ModelSpec
from dovetail.spec.tensors import published_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Parameters of the main model by part, summed over its layers. `mtp` are those that the MTP modules add."""

    embedding: int
    attention: int  # projections, biases and the norms inside attention
    dense_ffn: int
    routed_experts: int
    shared_experts: int
    gate: int  # the selection bias included
    norms: int  # two per layer and the final one
    head: int  # 0 when tied to the embedding
    mtp: int
    active_body: int  # parameters of the layers that one token uses
    active_head: int  # parameters of the head's product, tied or not, and of the final norm before it

    @property
    def total(self) -> int:
        """The parameters of the main model without MTP, which is the quoted figure (671B)."""
        return sum(getattr(self, part) for part in PARTS)

    @property
    def total_with_mtp(self) -> int:
        return self.total + self.mtp

    @property
    def active(self) -> int:
        """The active parameters without the embedding: the 36.6B of the weights' README, and Table 2's N."""
        return self.active_body + self.active_head

    @property
    def active_with_embedding(self) -> int:
        """The active parameters with the embedding, which is the quoted 37B."""
        return self.active + self.embedding


PARTS = ("embedding", "attention", "dense_ffn", "routed_experts", "shared_experts", "gate", "norms", "head")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParameters:
    """Parameters of one layer by part; a part that the layer lacks is 0."""

    attention: int
    dense_ffn: int
    routed_experts: int
    shared_experts: int
    gate: int
    norms: int

    @property
    def total(self) -> int:
        return self.attention + self.dense_ffn + self.routed_experts + self.shared_experts + self.gate + self.norms


def parameters(spec: ModelSpec) -> Parameters:
    """Count all parameters of `spec`."""
    layers = [layer_parameters(spec, layer) for layer in range(spec.num_hidden_layers)]
    embedding = spec.vocab_size * spec.hidden_size
    active_routed = sum(layer.routed_experts for layer in layers)
    if spec.moe:
        active_routed = active_routed // spec.moe.n_routed_experts * spec.moe.num_experts_per_tok
    norms = sum(layer.norms for layer in layers)
    part = {
        name: sum(getattr(layer, name) for layer in layers)
        for name in ("attention", "dense_ffn", "routed_experts", "shared_experts", "gate")
    }
    return Parameters(
        embedding=embedding,
        head=0 if spec.tie_word_embeddings else embedding,
        norms=norms + spec.hidden_size,
        mtp=spec.num_nextn_predict_layers * mtp_parameters(spec),
        active_body=sum(part.values()) - part["routed_experts"] + active_routed + norms,
        active_head=embedding + spec.hidden_size,
        **part,
    )


def layer_parameters(spec: ModelSpec, layer: int) -> LayerParameters:
    """Count the parameters of layer `layer`; a number after the last layer means the block of an MTP module."""
    hidden, moe = spec.hidden_size, spec.moe
    is_moe = spec.is_moe_layer(layer)
    return LayerParameters(
        attention=attention_parameters(spec),
        dense_ffn=0 if is_moe else 3 * hidden * spec.intermediate_size,
        routed_experts=moe.n_routed_experts * expert_parameters(spec) if moe and is_moe else 0,
        shared_experts=moe.n_shared_experts * expert_parameters(spec) if moe and is_moe else 0,
        gate=moe.n_routed_experts * (hidden + moe.has_bias) if moe and is_moe else 0,
        norms=2 * hidden,
    )


def attention_parameters(spec: ModelSpec) -> int:
    """Count one layer's attention with its inner norms (MLA's two latent norms) and biases."""
    hidden, attention = spec.hidden_size, spec.attention
    heads = attention.num_attention_heads
    if isinstance(attention, Gqa):
        query, key_value = heads * attention.head_dim, attention.cache_dim
        return 2 * hidden * query + hidden * key_value + attention.attention_bias * (query + key_value)
    return _query_parameters(hidden, attention) + (
        hidden * attention.cache_dim
        + attention.kv_lora_rank  # norm
        + attention.kv_lora_rank * heads * (attention.qk_nope_head_dim + attention.v_head_dim)
        + heads * attention.v_head_dim * hidden
    )


def _query_parameters(hidden: int, attention: Mla) -> int:
    query, rank = attention.num_attention_heads * attention.qk_head_dim, attention.q_lora_rank
    return hidden * query if rank is None else hidden * rank + rank + rank * query


def expert_parameters(spec: ModelSpec) -> int:
    """Count one routed expert: its gate, up and down matrices."""
    assert spec.moe, "only a model with experts has one"
    return 3 * spec.hidden_size * spec.moe.moe_intermediate_size


def mtp_parameters(spec: ModelSpec) -> int:
    """Count what one MTP module adds: block, 2H x H projection, three norms; embedding and head are shared."""
    block = layer_parameters(spec, spec.num_hidden_layers).total
    return block + 2 * spec.hidden_size * spec.hidden_size + 3 * spec.hidden_size


def attention_flop_per_token(spec: ModelSpec, context: int, causal: bool = True) -> float:
    """Count the forward FLOP per token of scores and weighted values over `context` positions, in all layers.

    Attention is expanded. A causal token sees half the context on average: the paper's "causal" counts the lower
    triangle [ISCA Table 4].
    """
    attention = spec.attention
    if isinstance(attention, Mla):
        widths = attention.qk_head_dim + attention.v_head_dim
    else:
        widths = 2 * attention.head_dim
    per_layer = 2 * attention.num_attention_heads * widths * context
    return per_layer * spec.num_hidden_layers * (0.5 if causal else 1.0)


def forward_flop_per_token(spec: ModelSpec, context: int, causal: bool = True, mtp: bool = False) -> float:
    """Count the FLOP of one token's forward pass in a sequence of `context` tokens; `mtp` adds the MTP modules'."""
    flop = 2.0 * parameters(spec).active + attention_flop_per_token(spec, context, causal)
    return flop + (mtp_flop_per_token(spec, context, causal) if mtp else 0.0)


def training_flop_per_token(spec: ModelSpec, context: int, causal: bool = True, mtp: bool = False) -> float:
    """Count the FLOP of forward and backward, three times the forward; without `mtp` Table 2's [ISCA §2.2.2]."""
    return 3.0 * forward_flop_per_token(spec, context, causal, mtp)


def mtp_flop_per_token(spec: ModelSpec, context: int, causal: bool = True) -> float:
    """Count the forward FLOP per token that all MTP modules add: each has a block, a projection and a head product."""
    if spec.num_nextn_predict_layers == 0:
        return 0.0
    layer = layer_parameters(spec, spec.num_hidden_layers)
    idle = 0
    if spec.moe:
        idle = layer.routed_experts - spec.moe.num_experts_per_tok * expert_parameters(spec)
    active = mtp_parameters(spec) - idle + spec.vocab_size * spec.hidden_size
    attention = attention_flop_per_token(spec, context, causal) / spec.num_hidden_layers
    return spec.num_nextn_predict_layers * (2.0 * active + attention)


def cache_bytes_per_token(spec: ModelSpec, bytes_per_element: float = 2, mtp: bool = False) -> int:
    """Count the bytes that one token adds to the cache of all layers, in BF16 by default [ISCA Table 1]."""
    layers = spec.num_hidden_layers + (spec.num_nextn_predict_layers if mtp else 0)
    return int(spec.attention.cache_dim * layers * bytes_per_element)


def checkpoint_tensors(spec: ModelSpec, fp8: bool = False) -> int:
    """Count the tensors of the published checkpoint: 91,991 in DeepSeek-V3's FP8 files [HFtens]. MLA only."""
    return sum(1 for _ in published_tensors(spec, fp8))
