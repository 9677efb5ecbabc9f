"""Counts what a model's cache takes, beside what other kinds of attention would take in its place.

Each kind keeps the same for every token of every layer of the main model; an MTP module would add one layer more. In
BF16 an element takes 2 bytes, and the kinds are [V2 §2.1, Table 1; ISCA §2.1.2]

    latent attention          latent + rope key
    n key-value heads         n x (key + value): all heads, groups of them, or one
    a sliding window          as the groups, but never more than its last tokens
    FP8 latent                latent in E4M3, one FP32 scale per 128 elements, the rope key in BF16 [FlashMLA]

A head of latent attention counts as a key of `qk_nope_head_dim` and a value of `v_head_dim`: other kinds rotate a part
of the key and need no rope key beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dovetail.spec.model import Gqa, Mla, ModelSpec

BF16 = 2
FP8_TILE = 128  # elements of the latent with one scale [FlashMLA]
SCALE = 4  # bytes of it: FP32
GROUPS = 8  # key-value heads of the models that the paper compares with [ISCA Table 1]
PUBLISHED_LATENT = 512 + 64  # latent and rope key of V2 and V3 [V2 §3.1.2, V3 §4.2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cached:
    """One kind of cache and its bytes."""

    kind: str
    kept: str  # by each layer for a token
    layer_bytes: int  # per token and layer
    token_bytes: int  # per token, in all layers
    tokens: int  # of a sequence that are kept at the context
    total_bytes: int  # of all sequences at the context


def caches(spec: ModelSpec, context: int, sequences: int = 1, window: int = 4096) -> tuple[Cached, ...]:
    """Count the cache of `sequences` sequences of `context` tokens each: the model's own first, then the others.

    Raises ValueError for numbers below 1.
    """
    for name, number in (("context", context), ("sequences", sequences), ("window", window)):
        if number < 1:
            raise ValueError(f"{name} = {number}: it has to be at least 1")

    def cached(kind: str, kept: str, layer_bytes: int, tokens: int = context) -> Cached:
        token_bytes = layer_bytes * spec.num_hidden_layers
        total = token_bytes * tokens * sequences
        return Cached(
            kind=kind, kept=kept, layer_bytes=layer_bytes, token_bytes=token_bytes, tokens=tokens, total_bytes=total
        )

    own, *others = _kinds(spec)
    groups, kept, size = next(each for each in (own, *others) if each[0].startswith("GQA"))
    windowed = cached(f"{groups}, window of {window:,}", kept, size, min(window, context))
    return (cached(f"its own: {own[0]}", *own[1:]), *(cached(*each) for each in others), windowed)


def fp8_latent_bytes(mla: Mla) -> int:
    """Count the bytes per token and layer of a latent in E4M3 with scales and a rope key in BF16: 656 for V3."""
    return mla.kv_lora_rank + SCALE * -(-mla.kv_lora_rank // FP8_TILE) + BF16 * mla.qk_rope_head_dim


def _kinds(spec: ModelSpec) -> Iterator[tuple[str, str, int]]:
    """Yield (kind, what is kept, bytes per token and layer), the model's own first."""
    attention = spec.attention
    heads = attention.num_attention_heads
    if isinstance(attention, Gqa):
        groups, key, value = attention.num_key_value_heads, attention.head_dim, attention.head_dim
        yield _heads("GQA", groups, key, value)
        yield "GQA, FP8", f"{groups} x ({key} + {value}) E4M3, scales per tensor", groups * (key + value)
        yield "latent, BF16", "512 + 64 as DeepSeek-V3", BF16 * PUBLISHED_LATENT
    else:
        latent, rope = attention.kv_lora_rank, attention.qk_rope_head_dim
        key, value = attention.qk_nope_head_dim, attention.v_head_dim
        scales = -(-latent // FP8_TILE)
        yield "latent, BF16", f"{latent} + {rope}", BF16 * attention.cache_dim
        yield "latent, FP8", f"{latent} E4M3, {scales} FP32, {rope} BF16", fp8_latent_bytes(attention)
        yield _heads("GQA", _groups(heads), key, value)
    yield _heads("MQA", 1, key, value)
    yield _heads("all heads", heads, key, value)


def _heads(kind: str, number: int, key: int, value: int) -> tuple[str, str, int]:
    return f"{kind}, BF16", f"{number} x ({key} + {value})", BF16 * number * (key + value)


def _groups(heads: int) -> int:
    """Return `GROUPS`, or for few heads the largest number of groups that shares each among several."""
    return max((each for each in range(1, min(GROUPS, heads - 1) + 1) if heads % each == 0), default=1)
