"""Which published model class computes what a spec describes.

A reader elsewhere chooses its code by `model_type` and passes over keys that this code has no use for: transformers'
DeepseekV3ForCausalLM takes sigmoid scores whatever `scoring_func` says. So a checkpoint bears the name of a class only
where that class, as transformers has it, computes the same function, MTP modules included. Every other checkpoint has
the `model_type` "dovetail", which only this package reads.
"""

from __future__ import annotations

from dovetail.config import Record
from dovetail.spec.model import Gqa, Mla, ModelSpec, Moe

OWN = "dovetail"
PUBLISHED: dict[str, str] = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
}
# Keys of a spec that both classes have, or that are looked at below; any other is an idea that they lack.
_READ = """
    vocab_size hidden_size num_hidden_layers intermediate_size attention moe num_nextn_predict_layers
    max_position_embeddings rope_theta rope_scaling rms_norm_eps tie_word_embeddings initializer_range bos_token_id
    eos_token_id num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim
    n_routed_experts n_shared_experts num_experts_per_tok moe_intermediate_size first_k_dense_replace n_group topk_group
    scoring_func topk_method norm_topk_prob routed_scaling_factor
    factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim
"""
READ = frozenset(_READ.split())
LATENT_EPS = 1e-6  # of both latent norms, whatever rms_norm_eps says; vLLM has rms_norm_eps there too


def model_type(spec: ModelSpec) -> str:
    """The name of the first class that computes `spec`, or ours. Models with grouped queries are described, not built,
    and have those of what they describe."""
    if isinstance(spec.attention, Gqa):
        return "qwen2" if spec.attention.attention_bias else "llama"
    return next((each for each in PUBLISHED if not differences(spec, each)), OWN)


def why_own(spec: ModelSpec) -> str | None:
    """By which keys the nearest class computes something else; None where `spec` has a published name."""
    if model_type(spec) != OWN:
        return None
    nearest = min(PUBLISHED, key=lambda each: len(differences(spec, each)))
    return f"{PUBLISHED[nearest]} computes something else: {'; '.join(differences(spec, nearest))}"


def differences(spec: ModelSpec, published: str) -> list[str]:
    """The keys by which the class computes something else than `spec`, of latent attention, each with what it has."""
    found = gate_differences(spec.moe, published) if spec.moe else []
    depth, heads = spec.num_nextn_predict_layers, spec.attention.num_attention_heads
    if depth and published == "deepseek_v2":
        found.append(f"num_nextn_predict_layers = {depth}, it has no MTP modules")
    elif depth and spec.moe is None:
        found.append(f"num_nextn_predict_layers = {depth} without experts, its modules have some")
    if published == "deepseek_v2" and spec.hidden_size % heads:
        found.append(f"num_attention_heads = {heads}, it takes divisors of {spec.hidden_size}")
    if spec.rms_norm_eps != LATENT_EPS:
        found.append(f"rms_norm_eps = {spec.rms_norm_eps}, it has {LATENT_EPS} in the latent norms")
    return found + _rope_differences(spec) + _unread(spec)


def gate_differences(moe: Moe, published: str) -> list[str]:
    """Those of the gate."""
    scoring, methods = "sigmoid", ["noaux_tc"]
    if published == "deepseek_v2":
        scoring, methods = "softmax", ["group_limited_greedy", "greedy"]
    found = []
    if moe.scoring_func != scoring:
        found.append(f"scoring_func = {moe.scoring_func!r}, it has {scoring!r}")
    if moe.topk_method not in methods:
        found.append(f"topk_method = {moe.topk_method!r}, it has {' and '.join(map(repr, methods))}")
    if moe.norm_topk_prob and published == "deepseek_v2":
        # The code published with V2's weights does, and then leaves out the scaling factor.
        found.append("norm_topk_prob = True, it does not normalise")
    return found


def _rope_differences(spec: ModelSpec) -> list[str]:
    yarn, found = spec.rope_scaling, []
    if yarn is None or not isinstance(spec.attention, Mla):
        return []
    if 0 in (yarn.mscale, yarn.mscale_all_dim) and (yarn.mscale, yarn.mscale_all_dim) != (1, 0):
        given = f"mscale = {yarn.mscale:g} and mscale_all_dim = {yarn.mscale_all_dim:g}"
        found.append(f"{given}, it takes 1 and 0 where one of them is 0")
    first, last = yarn.blended_pairs(spec.attention.qk_rope_head_dim, spec.rope_theta)
    if first > last:  # no pair is blended, and each code clamps in another way
        found.append(f"beta_fast = {yarn.beta_fast:g} and beta_slow = {yarn.beta_slow:g} leave no pairs between")
    return found


def _unread(spec: ModelSpec) -> list[str]:
    """Keys that neither class has, where their value is not the default, which leaves everything as it was."""
    records: tuple[Record | None, ...] = (spec, spec.attention, spec.moe, spec.rope_scaling)
    fields = [(record, *item) for record in records if record for item in type(record).model_fields.items()]
    values = {key: getattr(record, key) for record, key, field in fields if getattr(record, key) != field.default}
    return [f"{key} = {value!r}, it has no such key" for key, value in values.items() if key not in READ]
