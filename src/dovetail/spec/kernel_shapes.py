"""Which fast kernels of other projects are compiled for a model's shape.

Inference engines load any checkpoint whose config.json they know, but their fast paths exist for a few shapes only. A
model that is to be served by them should have one of these. `dovetail export` says which kernels fit.
"""

from __future__ import annotations

from dovetail.spec.model import Mla, ModelSpec

MLA_DIMS = (
    128,
    64,
    128,
    512,
)  # qk_nope, qk_rope, v, latent: the only ones FlashMLA is compiled for [FlashMLA]
HIDDEN_SIZES = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)  # those of the expert-parallel kernels [DeepEP]
FP8_TILE = 128  # widths that are summed over must be multiples of this tile [V3 §3.3.2, DeepGEMM]


def accepted_by(spec: ModelSpec) -> dict[str, str | None]:
    """Return for each kernel library or engine None if it takes the shape, else the reason with the numbers."""
    return {
        "FlashMLA attention": _attention_reason(spec),
        "DeepEP expert parallelism": _expert_reason(spec),
        "DeepGEMM block FP8": _fp8_reason(spec),
        "SGLang MTP speculation": _mtp_reason(spec),
    }


def _attention_reason(spec: ModelSpec) -> str | None:
    mla = spec.attention
    if not isinstance(mla, Mla):
        return "grouped-query attention"
    dims = (mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim, mla.kv_lora_rank)
    return None if dims == MLA_DIMS else f"MLA dims (nope, rope, v, latent) = {dims}, it has {MLA_DIMS}"


def _expert_reason(spec: ModelSpec) -> str | None:
    if spec.moe is None:
        return "no experts"
    if spec.hidden_size in HIDDEN_SIZES:
        return None
    return f"hidden_size = {spec.hidden_size}, it has {', '.join(str(size) for size in HIDDEN_SIZES)}"


def _fp8_reason(spec: ModelSpec) -> str | None:
    widths = {"hidden_size": spec.hidden_size, "intermediate_size": spec.intermediate_size}
    if spec.moe:
        widths["moe_intermediate_size"] = spec.moe.moe_intermediate_size
    if isinstance(spec.attention, Mla):
        widths["kv_lora_rank"] = spec.attention.kv_lora_rank
        widths["q_lora_rank"] = spec.attention.q_lora_rank or 0
        widths["num_attention_heads * v_head_dim"] = spec.attention.num_attention_heads * spec.attention.v_head_dim
    else:
        widths["num_attention_heads * head_dim"] = spec.attention.num_attention_heads * spec.attention.head_dim
    ragged = [f"{name} = {width}" for name, width in widths.items() if width % FP8_TILE]
    return f"{', '.join(ragged)}: not multiples of {FP8_TILE}" if ragged else None


def _mtp_reason(spec: ModelSpec) -> str | None:
    depth = spec.num_nextn_predict_layers
    return None if depth == 1 else f"num_nextn_predict_layers = {depth}, it takes 1"
