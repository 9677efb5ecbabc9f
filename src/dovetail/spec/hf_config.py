"""Reads a `ModelSpec` from a checkpoint's flat `config.json`, and writes one.

The same keys serve three files: a Hugging Face `config.json`, read leniently by `read_hf`, which ignores keys that do
not concern the shape and takes a null for an absent key; and a catalog entry and the `[model]` table of a run file,
read strictly by `read_flat`. Keys and values are those of the published DeepSeek-V3 and -V2 files [HFcfg].
transformers 5 writes `rope_parameters` in place of `rope_theta` and `rope_scaling`, and renames a few keys: both forms
are read, and the published one is written. `dovetail.spec.hf.rope` reads the rotary keys; `dovetail.spec.published`
decides which `model_type` is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dovetail.config import near_matches, validate
from dovetail.spec import published
from dovetail.spec.hf import rope
from dovetail.spec.model import Gqa, Mla, ModelSpec, Moe

_MLA_KEYS = frozenset(Mla.model_fields)
_GQA_KEYS = frozenset(Gqa.model_fields)
_MOE_KEYS = frozenset(Moe.model_fields)
_BODY_KEYS = frozenset(ModelSpec.model_fields) - {"attention", "moe"}
_SHAPE_KEYS = _MLA_KEYS | _GQA_KEYS | _MOE_KEYS | _BODY_KEYS | {"model_type", "rope_parameters"}

# transformers 5 writes the left name for the published right one.
_RENAMED = {
    "num_mtp_layers": "num_nextn_predict_layers",
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
}

# Keys that are accepted and not read, because they change neither the shape nor the function computed.
_IGNORED = frozenset(
    [
        "architectures",
        "auto_map",
        "aux_loss_alpha",
        "seq_aux",
        "attention_dropout",
        "use_cache",
        "torch_dtype",
        "dtype",
        "ep_size",
        "transformers_version",
        "quantization_config",
        "pretraining_tp",
        "output_router_logits",
        "pad_token_id",
        "head_dim",
        "num_key_value_heads",
        "qk_head_dim",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "is_encoder_decoder",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "problem_type",
        "_name_or_path",
    ]
)

# Keys that would change the function computed; any other value than these is an error, and not silently ignored.
_ONLY_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),  # two names of what is in SwiGLU
    "moe_layer_freq": (1,),
    "mlp_bias": (False,),
    "rope_interleave": (True,),
}

# What a family's own code assumes when a key is absent [V3repo, HFcfg; transformers 5 never writes these].
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True},
    "deepseek_v2": {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
    published.OWN: {},
    "qwen2": {"attention_bias": True},  # a bias on q, k and v is part of the Qwen 2.5 architecture
    "llama": {"attention_bias": False},
}
_ARCHITECTURES: dict[str, str] = {
    **{str(name): each for name, each in published.PUBLISHED.items()},
    published.OWN: "DovetailForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}
_OF_CLASS = {name: family for family, name in _ARCHITECTURES.items()}
_SAME_CODE = {"kimi_k2": "deepseek_v3"}  # where `architectures` names the latter's class too


def read_hf(config: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
    """Return the spec in a `config.json`; error lines begin with `where`.

    Raises ValueError for a missing key, an unsupported value, and keys that contradict each other.
    """
    given = {key: value for key, value in config.items() if value is not None}
    family = _family(given, where)
    if family == published.OWN and (unread := unread_keys(given)):
        raise ValueError(
            f"{where}: {', '.join(unread)} not known here; read it with the version of dovetail that wrote it"
        )
    flat: dict[str, Any] = {"initializer_range": 0.02, **_FAMILY_DEFAULTS[family], **_renamed(given, where)}
    is_mla = family not in ("qwen2", "llama")
    _check_supported(flat, is_mla, where)
    required = ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"]
    if is_mla:
        required += ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
        required += [] if "q_lora_rank" in config else ["q_lora_rank"]  # there, null says something
    if flat.get("n_routed_experts"):
        required += ["num_experts_per_tok", "moe_intermediate_size", "first_k_dense_replace"]
    for key in required:
        if key not in flat:
            raise ValueError(f"{where}: missing key {key!r}, required for model_type {family!r}")
    flat |= rope.read_rope(flat, is_mla, where)
    if not is_mla:
        flat = {key: value for key, value in flat.items() if key not in _MLA_KEYS - _GQA_KEYS}
    spec = _build(flat, where)
    if family in published.PUBLISHED and spec.moe:
        _check_gate(spec.moe, family, where)
    return spec


def read_flat(table: Mapping[str, Any], where: str = "model") -> ModelSpec:
    """Return the spec in a flat TOML table of the same keys; error lines begin with `where`.

    Raises ValueError for an unknown key, with its near matches. A `source` key is allowed and not read.
    """
    family = table.get("model_type")
    if family is not None and family not in _FAMILY_DEFAULTS:
        raise ValueError(f"{where}: model_type = {family!r} is not one of {', '.join(_FAMILY_DEFAULTS)}")
    for key in table:
        if key not in _SHAPE_KEYS - {"rope_parameters"} | {"source"}:
            remedy = near_matches(key, _SHAPE_KEYS)
            raise ValueError(f"{where}: unknown key {key!r}" + (f"; {remedy}" if remedy else ""))
    return _build({**_FAMILY_DEFAULTS.get(str(family), {}), **table}, where)


def unread_keys(config: Mapping[str, Any]) -> list[str]:
    """Return the keys of a `config.json` that nothing here knows. The user is told of them; they are no error."""
    known = _SHAPE_KEYS | _IGNORED | _RENAMED.keys() | _ONLY_VALUES.keys()
    found = (key for key, value in config.items() if key not in known and value is not None)
    return sorted([*found, *rope.unread_keys(config)])


def write_hf(spec: ModelSpec) -> dict[str, Any]:
    """Return the published form of `config.json`, with every key that readers of that family look for."""
    family = published.model_type(spec)
    attention, moe = spec.attention, spec.moe
    config: dict[str, Any] = {"architectures": [_ARCHITECTURES[family]], "model_type": family}
    config |= spec.model_dump(exclude={"attention", "moe", "rope_scaling"})
    config |= attention.model_dump()
    if isinstance(attention, Mla):
        config |= {"num_key_value_heads": attention.num_attention_heads, "attention_bias": False}
        config |= moe.model_dump() if moe else {"first_k_dense_replace": spec.num_hidden_layers}
        config |= {"moe_layer_freq": 1, "ep_size": 1} if moe else {}
    config["rope_scaling"] = None
    if spec.rope_scaling:
        config["rope_scaling"] = {"type": "yarn", **spec.rope_scaling.model_dump()}
    config |= {"hidden_act": "silu", "attention_dropout": 0.0, "use_cache": True, "torch_dtype": "bfloat16"}
    return config


def _family(config: Mapping[str, Any], where: str) -> str:
    """Return the family whose code computes the model: the `model_type`, or what the class in `architectures` is of."""
    named, classes = config.get("model_type"), config.get("architectures")
    known = [_OF_CLASS[each] for each in classes if each in _OF_CLASS] if isinstance(classes, list) else []
    if isinstance(named, str) and named in _FAMILY_DEFAULTS:
        return named
    if known and (named is None or _SAME_CODE.get(str(named)) == known[0]):
        return known[0]
    found = "no model_type; set it to" if named is None else f"model_type {named!r} is not"
    line = f"{where}: {found} one of {', '.join(_FAMILY_DEFAULTS)}"
    if known:
        line += f"; architectures names the class of {known[0]}: if the model is one, set model_type to that"
    raise ValueError(line)


def _renamed(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the keys under their published names."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = _RENAMED.get(key, key)
        if name in flat and flat[name] != value:
            both = ", ".join(f"{each} = {config[each]!r}" for each in config if _RENAMED.get(each, each) == name)
            raise ValueError(f"{where}: {both} contradict each other; remove the wrong one")
        flat[name] = value
    return flat


def _build(flat: Mapping[str, Any], where: str) -> ModelSpec:
    """Sort flat keys into the records. A null counts as absent, so that the record's default applies."""
    given = {key: value for key, value in flat.items() if value is not None}
    attention: Mla | Gqa
    if "kv_lora_rank" in given:
        attention = validate(Mla, {key: given[key] for key in _MLA_KEYS & given.keys()}, where)
    else:
        table = {key: given[key] for key in _GQA_KEYS & given.keys()}
        table.setdefault("num_key_value_heads", table.get("num_attention_heads"))
        width, heads = given.get("hidden_size"), table.get("num_attention_heads")
        if isinstance(width, int) and isinstance(heads, int) and heads > 0:
            table.setdefault("head_dim", width // heads)
        attention = validate(Gqa, table, where)
    moe = None
    if given.get("n_routed_experts"):
        table = {key: given[key] for key in _MOE_KEYS & given.keys()}
        if table.get("topk_method") == "greedy":  # it has no groups, whatever the file says
            table |= {"n_group": 1, "topk_group": 1}
        moe = validate(Moe, table, where)
    body = {key: given[key] for key in _BODY_KEYS & given.keys()}
    return validate(ModelSpec, {**body, "attention": attention, "moe": moe}, where)


def _check_supported(flat: Mapping[str, Any], is_mla: bool, where: str) -> None:
    only = {**_ONLY_VALUES, "attention_bias": (False,)} if is_mla else _ONLY_VALUES
    for key, values in only.items():
        if key in flat and flat[key] not in values:
            raise ValueError(f"{where}: {key} = {flat[key]!r} is not supported, only {values[0]!r} is")


def _check_gate(moe: Moe, family: str, where: str) -> None:
    """A published name over the keys of another gate: what is meant cannot be known."""
    if wrong := published.gate_differences(moe, family):
        raise ValueError(
            f"{where}: model_type {family!r} is {published.PUBLISHED[family]}, which computes something else than "
            f"these keys say: {'; '.join(wrong)}. Correct them, or set model_type to {published.OWN!r} "
            "to have the gate that they describe"
        )
