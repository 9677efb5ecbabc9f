"""Every tensor of a published checkpoint: its name, shape and dtype, and where our model keeps it.

Export and import both read the list `stored_tensors(spec)`. Published names are those of the DeepSeek-V3 checkpoints
[HFtens]. Our own state differs in two ways only: gate and up projections are one tensor with the gate's rows first,
and the experts of a layer are stacked. MTP module k is published as layer `num_hidden_layers + k`, with copies of the
embedding and the head that it shares with the main model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from dovetail.spec.model import Mla, ModelSpec

SCALE_SUFFIX = "_scale_inv"  # "x.weight" in FP8 has its block scales in "x.weight_scale_inv"
WEIGHT_TILE = (128, 128)  # with one scale [V3 §3.3.2]; weight_block_size in config.json

Kind = Literal["linear", "vocabulary", "mixer", "norm", "router"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One published tensor and its place in our state dict: `state[key]`, or one expert or half of it."""

    name: str
    shape: tuple[int, ...]
    key: str
    kind: Kind = "linear"
    expert: int | None = None
    half: Literal[0, 1] | None = None  # of the rows: 0 the gate's, 1 the up projection's
    copy_of: str | None = None  # the published name of the tensor that this one repeats; both have the same `key`

    @property
    def is_quantized(self) -> bool:
        """Whether an FP8 checkpoint has it in FP8: every linear weight but embedding, head, router and eh_proj."""
        return self.kind == "linear"

    @property
    def has_whole_tiles(self) -> bool:
        """Whether no block of scales would be ragged. transformers refuses such weights, or takes wrong scales."""
        return not any(size % tile for size, tile in zip(self.shape, WEIGHT_TILE, strict=True))

    @property
    def dtype(self) -> str:
        """The safetensors dtype in a checkpoint that is not quantised.

        Norms and router are FP32, as our model keeps them. V3.2 publishes its norms so; V3 itself has norms and router
        weights in BF16. The gate's bias is FP32 in both.
        """
        return "F32" if self.kind in ("norm", "router") else "BF16"


def stored_tensors(spec: ModelSpec) -> Iterator[Stored]:
    """Yield all tensors of a published checkpoint of `spec`, in file order. Raises ValueError for GQA attention."""
    embedding, head = _embedding_and_head(spec)
    yield embedding
    for layer in range(spec.num_hidden_layers):
        yield from _block(spec, layer, f"layers.{layer}.")
    yield Stored(name="model.norm.weight", shape=(spec.hidden_size,), key="norm.weight", kind="norm")
    if not spec.tie_word_embeddings:
        yield head
    for depth in range(spec.num_nextn_predict_layers):
        yield from _mtp_module(spec, depth, embedding, head)


def readable_tensors(spec: ModelSpec) -> Iterator[Stored]:
    """Yield `stored_tensors`, and a tied head, which some writers store as a copy of the embedding."""
    yield from stored_tensors(spec)
    if spec.tie_word_embeddings:
        yield _embedding_and_head(spec)[1]


def published_tensors(spec: ModelSpec, fp8: bool = False) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yield (name, shape, safetensors dtype) of every tensor of a checkpoint of `spec`.

    With `fp8` the quantised weights are F8_E4M3, and each is followed by its block scales; the 671B model then has
    91,991 tensors.
    """
    for tensor in stored_tensors(spec):
        if fp8 and tensor.is_quantized:
            yield tensor.name, tensor.shape, "F8_E4M3"
            yield tensor.name + SCALE_SUFFIX, scale_shape(tensor.shape), "F32"
        else:
            yield tensor.name, tensor.shape, tensor.dtype


def unquantized_modules(spec: ModelSpec) -> list[str]:
    """Return `modules_to_not_convert` of a checkpoint of `spec` in which only weights of whole tiles are FP8.

    A reader that finds the list takes every other linear module for FP8; the experts of a layer are one module. Raises
    ValueError where no weight has whole tiles.
    """
    matrices = [each for each in stored_tensors(spec) if len(each.shape) == 2]
    plain = [each.name for each in matrices if not (each.is_quantized and each.has_whole_tiles)]
    if len(plain) == len(matrices):
        raise ValueError(
            f"no weight of this model has sides that are multiples of {WEIGHT_TILE[0]}, so none can be FP8 for "
            "transformers; export it without --fp8"
        )
    names = (re.sub(r"(\.experts)\..*|\.weight$", r"\1", name) for name in plain)
    return list(dict.fromkeys([*names, "lm_head"]))


def scale_shape(shape: tuple[int, ...], tile: tuple[int, int] = WEIGHT_TILE) -> tuple[int, int]:
    """Return the shape of the scales, one per block, ragged blocks included: 5 x 56 for a 576 x 7168 weight."""
    rows, columns = shape
    return -(-rows // tile[0]), -(-columns // tile[1])


def _embedding_and_head(spec: ModelSpec) -> tuple[Stored, Stored]:
    key, shape = "embed_tokens.weight", (spec.vocab_size, spec.hidden_size)
    embedding = Stored(name="model." + key, shape=shape, key=key, kind="vocabulary")
    if spec.tie_word_embeddings:
        return embedding, replace(embedding, name="lm_head.weight", copy_of=embedding.name)
    return embedding, replace(embedding, name="lm_head.weight", key="lm_head.weight")


def _mtp_module(spec: ModelSpec, depth: int, embedding: Stored, head: Stored) -> Iterator[Stored]:
    layer = spec.num_hidden_layers + depth
    name, key, width = f"model.layers.{layer}.", f"mtp.{depth}.", spec.hidden_size
    yield replace(embedding, name=name + "embed_tokens.weight", copy_of=embedding.name)
    for norm in ("enorm.weight", "hnorm.weight"):
        yield Stored(name=name + norm, shape=(width,), key=key + norm, kind="norm")
    mixer = "eh_proj.weight"
    yield Stored(name=name + mixer, shape=(width, 2 * width), key=key + mixer, kind="mixer")
    yield from _block(spec, layer, key + "block.")
    yield Stored(name=name + "shared_head.norm.weight", shape=(width,), key=key + "norm.weight", kind="norm")
    yield replace(head, name=name + "shared_head.head.weight", copy_of=head.copy_of or head.name)


def _block(spec: ModelSpec, layer: int, key: str) -> Iterator[Stored]:
    name, width = f"model.layers.{layer}.", spec.hidden_size
    for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        yield Stored(name=name + norm, shape=(width,), key=key + norm, kind="norm")
    for part, shape in _attention_shapes(spec):
        kind: Kind = "norm" if len(shape) == 1 else "linear"
        yield Stored(name=f"{name}self_attn.{part}", shape=shape, key=f"{key}self_attn.{part}", kind=kind)
    if spec.is_moe_layer(layer):
        yield from _moe(spec, f"{name}mlp.", f"{key}mlp.")
    else:
        yield from _swiglu(f"{name}mlp.", f"{key}mlp.", width, spec.intermediate_size)


def _attention_shapes(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    mla = spec.attention
    if not isinstance(mla, Mla):
        raise ValueError("tensor names are known for latent attention only; this spec has grouped-query attention")
    heads, width = mla.num_attention_heads, spec.hidden_size
    if mla.q_lora_rank is None:
        yield "q_proj.weight", (heads * mla.qk_head_dim, width)
    else:
        yield "q_a_proj.weight", (mla.q_lora_rank, width)
        yield "q_a_layernorm.weight", (mla.q_lora_rank,)
        yield "q_b_proj.weight", (heads * mla.qk_head_dim, mla.q_lora_rank)
    yield "kv_a_proj_with_mqa.weight", (mla.cache_dim, width)
    yield "kv_a_layernorm.weight", (mla.kv_lora_rank,)
    yield "kv_b_proj.weight", (heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank)
    yield "o_proj.weight", (width, heads * mla.v_head_dim)


def _moe(spec: ModelSpec, name: str, key: str) -> Iterator[Stored]:
    moe, width = spec.moe, spec.hidden_size
    assert moe is not None
    experts = moe.n_routed_experts
    yield Stored(name=name + "gate.weight", shape=(experts, width), key=key + "gate.weight", kind="router")
    if moe.has_bias:
        bias = "gate.e_score_correction_bias"
        yield Stored(name=name + bias, shape=(experts,), key=key + bias, kind="router")
    for expert in range(experts):
        for tensor in _swiglu(f"{name}experts.{expert}.", f"{key}experts.", width, moe.moe_intermediate_size):
            yield replace(tensor, key=tensor.key.removesuffix(".weight"), expert=expert)
    if moe.n_shared_experts:
        inner = moe.n_shared_experts * moe.moe_intermediate_size  # they are one SwiGLU as wide as all of them
        yield from _swiglu(f"{name}shared_experts.", f"{key}shared_experts.", width, inner)


def _swiglu(name: str, key: str, width: int, inner: int) -> Iterator[Stored]:
    fused = key + "gate_up_proj.weight"
    yield Stored(name=name + "gate_proj.weight", shape=(inner, width), key=fused, half=0)
    yield Stored(name=name + "up_proj.weight", shape=(inner, width), key=fused, half=1)
    yield Stored(name=name + "down_proj.weight", shape=(width, inner), key=key + "down_proj.weight")
