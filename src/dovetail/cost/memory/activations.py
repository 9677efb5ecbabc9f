"""The tensors that training keeps from the forward to the backward pass, for a precision recipe.

They are those that this package's own layers save on a CPU; a test counts the same in the autograd graph, to the byte:

    attention   the layer's input; its norm, for the down-projections; both latents before their norms, and after,
                for the up-projections; q, k, v and a log-sum-exp per head; the input of o_proj
    dense ffn   the norm's input and result, the SwiGLU's input
    experts     the same for K rows per token; K outputs, for the gradient of the gate's weights; the gate's input
                in BF16 and its scores in FP32, and the token of each row; for shared experts the same as a dense ffn
    MTP         both inputs of the join before their norms, and after; then a layer and a final norm
    losses      the gradient of each final norm's result, which is computed together with the loss

A product that the recipe quantises keeps its input as codes with an FP32 scale for every 128 of them; the others share
one tensor in BF16. Attention probabilities and SwiGLU outputs are recomputed and not kept.

Left out: rows that pad an expert to a whole tile, and what torch's reference code keeps beyond that on devices that run
it. Where documents are kept apart, all layers share the first visible position, which is counted here in each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dovetail.catalog.precision import load_recipe
from dovetail.spec.model import Mla, ModelSpec, Moe
from dovetail.spec.precision import GemmPrecision, Quantization, Recipe

BYTES = {"bf16": 2, "fp32": 4, "int32": 4, "int64": 8}
TILE = 128  # values that share a scale [V3 §3.3.2]
PLAIN = load_recipe("bf16")

Takers = dict[str, GemmPrecision | None]  # the products that take one tensor, and their precision


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTensor:
    """One tensor of one layer. Elements and bytes are per token."""

    name: str
    format: str  # a key of BYTES, or a recipe's exMy
    elements: int
    bytes: int  # scales included


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A layer of the main model, an MTP module, or what is before the first layer and after the last."""

    name: str  # "ends", "layer 0", ..., "mtp 0", ...
    tensors: tuple[SavedTensor, ...]

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)


def saved_by_part(spec: ModelSpec, recipe: Recipe = PLAIN, recompute: bool = False) -> tuple[Part, ...]:
    """Return what the whole model keeps, without its losses.

    With `recompute` RMSNorm outputs and MLA up-projections are recomputed and not kept [V3 §3.2.3]. Raises ValueError
    if attention is not MLA.
    """
    layers = spec.num_hidden_layers
    ends = (*_inputs(spec), *_norm("final norm", spec.hidden_size))
    parts = [Part(name="ends", tensors=ends)]
    for layer in range(layers):
        parts.append(Part(name=f"layer {layer}", tensors=saved_by_layer(spec, layer, recipe, recompute)))
    for module in range(spec.num_nextn_predict_layers):
        block = saved_by_layer(spec, layers + module, recipe, recompute)
        parts.append(Part(name=f"mtp {module}", tensors=(*ends, *_join(spec, recipe, recompute), *block)))
    return tuple(parts)


def saved_by_layer(
    spec: ModelSpec, layer: int, recipe: Recipe = PLAIN, recompute: bool = False
) -> tuple[SavedTensor, ...]:
    """Return what one block keeps; numbers after the last layer mean the blocks of MTP modules."""
    attention = _attention(spec, _mla(spec), recipe, recompute)
    if spec.moe is not None and spec.is_moe_layer(layer):
        return (*attention, *_experts(spec, spec.moe, recipe, recompute))
    return (*attention, *_dense(spec, recipe, recompute))


def microbatch_bytes(
    spec: ModelSpec, sequences: int, length: int, recipe: Recipe = PLAIN, recompute: bool = False
) -> dict[str, int]:
    """Return the bytes of each part, and of "losses", for sequences of `length` tokens and one more to predict.

    MTP module k has k + 1 tokens fewer of each sequence.
    """
    saved = {}
    for part in saved_by_part(spec, recipe, recompute):
        kind, _, number = part.name.partition(" ")
        missing = 1 + int(number) if kind == "mtp" else 0
        saved[part.name] = sequences * max(length - missing, 0) * part.bytes
    return {**saved, "losses": _losses(spec, sequences, length)}


def _losses(spec: ModelSpec, sequences: int, length: int) -> int:
    """Return the bytes that losses keep.

    Besides the gradients of the final norms' results these are the gradient of the head from each loss and, for each
    gate's balance loss, the sum of a token's scores and how often each expert was chosen in a sequence.
    """
    lengths = [max(length - missing, 0) for missing in range(1 + spec.num_nextn_predict_layers)]
    heads = sum(BYTES["bf16"] * spec.hidden_size * (sequences * each + spec.vocab_size) for each in lengths)
    if spec.moe is None:
        return heads
    gates = [spec.num_moe_layers] + [1] * spec.num_nextn_predict_layers
    sums = sum(count * (each + spec.moe.n_routed_experts) for count, each in zip(gates, lengths, strict=True))
    return heads + BYTES["fp32"] * sequences * sums


def _inputs(spec: ModelSpec) -> list[SavedTensor]:
    """Return the token ids, and the rotation that all layers of one forward pass share."""
    return [_plain("token ids", 1, "int64"), _plain("cos, sin", _mla(spec).qk_rope_head_dim, "fp32")]


def _join(spec: ModelSpec, recipe: Recipe, recompute: bool) -> list[SavedTensor]:
    saved = _norm("embedding norm", spec.hidden_size) + _norm("hidden norm", spec.hidden_size)
    return saved + _taken(2 * spec.hidden_size, {"eh_proj": recipe.sites.get("mtp_join")}, is_remade=recompute)


def _attention(spec: ModelSpec, mla: Mla, recipe: Recipe, recompute: bool) -> list[SavedTensor]:
    hidden, query_rank, heads = spec.hidden_size, mla.q_lora_rank, mla.num_attention_heads
    down, up = recipe.sites.get("attention_down"), recipe.sites.get("attention_up")
    saved = _norm("attention norm", hidden)
    if query_rank is None:
        saved += _taken(hidden, {"kv_a_proj": down, "q_proj": down}, is_remade=recompute)
    else:
        saved += _taken(hidden, {"kv_a_proj and q_a_proj": down}, is_remade=recompute)
        saved += _norm("query latent norm", query_rank)
        saved += _taken(query_rank, {"q_b_proj": up}, is_remade=recompute)
    saved += _norm("latent norm", mla.kv_lora_rank)
    saved += _taken(mla.kv_lora_rank, {"kv_b_proj": up}, is_remade=recompute)
    if recompute:
        saved += [_plain("rotated key", mla.qk_rope_head_dim)]
    else:
        saved += [_plain("q, k, v", heads * (2 * mla.qk_head_dim + mla.v_head_dim))]
    saved += [_plain("log-sum-exp", heads, "fp32"), _plain("first visible position", 1, "int32")]
    return saved + _taken(heads * mla.v_head_dim, {"o_proj": recipe.sites.get("attention_out")})


def _dense(spec: ModelSpec, recipe: Recipe, recompute: bool) -> list[SavedTensor]:
    up = recipe.sites.get("mlp_up")
    return [
        *_norm("ffn norm", spec.hidden_size),
        *_taken(spec.hidden_size, {"mlp": up}, is_remade=recompute),
        _swiglu("mlp swiglu", spec.intermediate_size, up, recipe),
    ]


def _experts(spec: ModelSpec, moe: Moe, recipe: Recipe, recompute: bool) -> list[SavedTensor]:
    hidden, choices, width = spec.hidden_size, moe.num_experts_per_tok, moe.moe_intermediate_size
    up, shared_up = recipe.sites.get("expert_up"), recipe.sites.get("mlp_up")
    saved = _norm("ffn norm", hidden)
    takers: Takers = {"gate": None, "shared experts": shared_up} if moe.n_shared_experts else {"gate": None}
    saved += _taken(hidden, takers, is_remade=recompute)
    saved += [_plain("scores", moe.n_routed_experts, "fp32")]
    if moe.norm_topk_prob:
        saved += [_plain("chosen scores", choices, "fp32"), _plain("sum of chosen scores", 1, "fp32")]
    saved += [_plain("gate weights", choices, "fp32")]
    saved += [_plain(f"{whose} ids", choices, "int64") for whose in ("expert", "row", "token")]
    saved += _taken(hidden, {"experts": up}, rows=choices)
    saved += [_swiglu("experts swiglu", width, up, recipe, rows=choices), _plain("expert outputs", choices * hidden)]
    if moe.n_shared_experts:
        saved += [_swiglu("shared experts swiglu", moe.n_shared_experts * width, shared_up, recipe)]
    return saved


def _mla(spec: ModelSpec) -> Mla:
    if not isinstance(spec.attention, Mla):
        raise ValueError("grouped-query attention is described for counting, not for training")
    return spec.attention


def _norm(name: str, width: int) -> list[SavedTensor]:
    return [_plain(f"{name} input", width), _plain(f"{name} scale", 1, "fp32")]


def _taken(width: int, takers: Takers, rows: int = 1, is_remade: bool = False) -> list[SavedTensor]:
    """Return how one tensor is kept: in codes for each quantised product, and once in BF16 for the others.

    The BF16 tensor is left out if it is recomputed.
    """
    saved = []
    for name, precision in takers.items():
        if precision is not None:
            saved.append(_coded(f"{name} input", width, precision.saved_input or precision.input, rows))
    plain = [name for name, precision in takers.items() if precision is None]
    if plain and not is_remade:
        saved.append(_plain(f"{', '.join(plain)} input", rows * width))
    return saved


def _swiglu(name: str, width: int, up: GemmPrecision | None, recipe: Recipe, rows: int = 1) -> SavedTensor:
    """Return the SwiGLU's input: gate and up, of `width` each."""
    if up is None or recipe.saved_swiglu is None:
        return _plain(f"{name} input", rows * 2 * width)
    return _coded(f"{name} input", 2 * width, recipe.saved_swiglu, rows)


def _plain(name: str, elements: int, format: str = "bf16") -> SavedTensor:
    return SavedTensor(name=name, format=format, elements=elements, bytes=BYTES[format] * elements)


def _coded(name: str, width: int, quantization: Quantization, rows: int) -> SavedTensor:
    per_row = code_bytes(width, quantization.format) + BYTES["fp32"] * -(-width // TILE)
    return SavedTensor(name=name, format=quantization.format, elements=rows * width, bytes=rows * per_row)


def code_bytes(width: int, format: str) -> int:
    """Return the bytes of `width` values without their scales.

    E5M6 is packed, eight values in twelve bytes; another exMy takes the next larger integer type.
    """
    if format == "e5m6":
        return 12 * -(-width // 8)
    bits = 1 + sum(map(int, re.findall("[0-9]+", format)))
    return width * (1 if bits <= 8 else 2 if bits <= 16 else 4)
