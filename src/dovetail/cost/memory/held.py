"""The weights that one rank holds, and the number of ranks that hold the same ones.

attention heads (q_b, kv_b, o_proj; q_proj)   split over tp, the same on dp ranks
routed experts                                split over ep, the same on expert_replicas ranks
all others                                    whole, the same on dp x tp ranks
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dovetail.cost.memory.stages import Stage, stages
from dovetail.spec.layout import Layout
from dovetail.spec.model import Mla, ModelSpec, Moe
from dovetail.spec.precision import Site
from dovetail.spec.tensors import WEIGHT_TILE


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """`count` tensors of one shape on one rank, which `replicas` ranks of the stage hold alike."""

    name: str
    shape: tuple[int, ...]
    replicas: int
    count: int = 1
    site: Site | None = None  # of linear layers; other weights are never quantised
    is_wide: bool = False  # in FP32, as norms and router are
    has_gradient: bool = True  # the gate's bias has none
    is_stored_plain: bool = False  # in BF16 even in FP8 checkpoints, as eh_proj is

    @property
    def elements(self) -> int:
        return self.count * math.prod(self.shape)

    @property
    def blocks(self) -> int:
        """The number of 128 x 128 blocks, each with a scale, ragged ones included."""
        return self.count * math.prod(-(-size // tile) for size, tile in zip(self.shape, WEIGHT_TILE, strict=True))


def held_by_layer(spec: ModelSpec, layer: int, layout: Layout) -> tuple[Held, ...]:
    """Return one layer's weights on one rank. Raises ValueError if attention is not MLA."""
    everywhere, hidden = layout.dp * layout.tp, spec.hidden_size
    held = [*_attention(spec, layout), Held(name="norms", shape=(hidden,), count=2, replicas=everywhere, is_wide=True)]
    if spec.moe is None or not spec.is_moe_layer(layer):
        held += _swiglu("mlp", hidden, spec.intermediate_size, 1, everywhere, ("mlp_up", "mlp_down"))
        return tuple(held)
    return (*held, *_experts(spec, spec.moe, layout))


def held_by_ends(spec: ModelSpec, layout: Layout, mine: Sequence[Stage]) -> tuple[Held, ...]:
    """Return embedding, final norm and head, as far as they are on the stages `mine`.

    A rank with the MTP modules or a tied head but without the embedding has a copy of the embedding.
    """
    everywhere, vocabulary = layout.dp * layout.tp, (spec.vocab_size, spec.hidden_size)
    has_head = any(stage.has_head for stage in mine)
    needs_embedding = has_head and (spec.tie_word_embeddings or spec.num_nextn_predict_layers > 0)
    held = []
    if needs_embedding or any(stage.has_embedding for stage in mine):
        held.append(Held(name="embedding", shape=vocabulary, replicas=everywhere))
    if has_head:
        held.append(Held(name="final norm", shape=(spec.hidden_size,), replicas=everywhere, is_wide=True))
        if not spec.tie_word_embeddings:
            held.append(Held(name="head", shape=vocabulary, replicas=everywhere))
    return tuple(held)


def held_by_mtp(spec: ModelSpec, layout: Layout) -> tuple[Held, ...]:
    """Return one MTP module's weights, without the embedding and head that it shares."""
    everywhere, hidden = layout.dp * layout.tp, spec.hidden_size
    return (
        *held_by_layer(spec, spec.num_hidden_layers, layout),
        Held(name="mtp norms", shape=(hidden,), count=3, replicas=everywhere, is_wide=True),
        Held(
            name="eh_proj",
            shape=(hidden, 2 * hidden),
            replicas=everywhere,
            site="mtp_join",
            is_stored_plain=True,
        ),
    )


def held_by_rank(spec: ModelSpec, layout: Layout, rank: int, context: int = 4096) -> tuple[Held, ...]:
    """Return all weights on pipeline rank `rank`: its stages' layers, ends and MTP modules."""
    all_stages = stages(spec, layout, context)
    mine = [all_stages[index] for index in layout.stages_of(rank)]
    layers = [each for stage in mine for layer in stage.layers for each in held_by_layer(spec, layer, layout)]
    modules = sum(stage.mtp_modules(spec) for stage in mine)
    return (*layers, *held_by_ends(spec, layout, mine), *modules * held_by_mtp(spec, layout))


def _attention(spec: ModelSpec, layout: Layout) -> list[Held]:
    mla, hidden, everywhere = spec.attention, spec.hidden_size, layout.dp * layout.tp
    if not isinstance(mla, Mla):
        raise ValueError("grouped-query attention is described for counting; plans are made for latent attention")
    heads = mla.num_attention_heads // layout.tp
    held = [
        Held(name="kv_a", shape=(mla.cache_dim, hidden), replicas=everywhere, site="attention_down"),
        Held(name="latent norm", shape=(mla.kv_lora_rank,), replicas=everywhere, is_wide=True),
        Held(
            name="kv_b",
            shape=(heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank),
            replicas=layout.dp,
            site="attention_up",
        ),
        Held(name="o_proj", shape=(hidden, heads * mla.v_head_dim), replicas=layout.dp, site="attention_out"),
    ]
    if mla.q_lora_rank is None:
        # It runs together with kv_a, on each rank's own tokens, for all heads.
        query = (mla.num_attention_heads * mla.qk_head_dim, hidden)
        return [*held, Held(name="q_proj", shape=query, replicas=everywhere, site="attention_down")]
    query_up = (heads * mla.qk_head_dim, mla.q_lora_rank)
    return [
        *held,
        Held(name="q_a", shape=(mla.q_lora_rank, hidden), replicas=everywhere, site="attention_down"),
        Held(name="query latent norm", shape=(mla.q_lora_rank,), replicas=everywhere, is_wide=True),
        Held(name="q_b", shape=query_up, replicas=layout.dp, site="attention_up"),
    ]


def _experts(spec: ModelSpec, moe: Moe, layout: Layout) -> list[Held]:
    everywhere, hidden, width = layout.dp * layout.tp, spec.hidden_size, moe.moe_intermediate_size
    held = [Held(name="gate", shape=(moe.n_routed_experts, hidden), replicas=everywhere, is_wide=True)]
    if moe.has_bias:
        bias = (moe.n_routed_experts,)
        held.append(Held(name="gate bias", shape=bias, replicas=everywhere, is_wide=True, has_gradient=False))
    here = layout.experts_per_rank(spec)
    held += _swiglu("experts", hidden, width, here, layout.expert_replicas, ("expert_up", "expert_down"))
    if moe.n_shared_experts:
        held += _swiglu("shared", hidden, moe.n_shared_experts * width, 1, everywhere, ("mlp_up", "mlp_down"))
    return held


def _swiglu(name: str, hidden: int, width: int, count: int, replicas: int, sites: tuple[Site, Site]) -> list[Held]:
    up, down = sites
    return [
        Held(name=f"{name} gate and up", shape=(width, hidden), count=2 * count, replicas=replicas, site=up),
        Held(name=f"{name} down", shape=(hidden, width), count=count, replicas=replicas, site=down),
    ]
