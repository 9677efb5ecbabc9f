"""The description of a model: attention, feed-forward, experts and multi-token prediction.

It is plain data. Field names are the keys of the published Hugging Face `config.json`, so a catalog entry, a
checkpoint's config and a run file are all the same flat table; `spec.hf_config` reads and writes it.
Sources: [V3 §4.2], [V2 §3.1.2], [V3repo configs].
"""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from dovetail.config import Record


class Mla(Record):
    """Multi-head latent attention [V3 eqs 1-11]."""

    num_attention_heads: int = Field(gt=0)
    q_lora_rank: int | None = Field(default=None, gt=0)  # None: queries are not compressed (V2-Lite)
    kv_lora_rank: int = Field(gt=0)
    qk_nope_head_dim: int = Field(gt=0)
    qk_rope_head_dim: int = Field(gt=0)
    v_head_dim: int = Field(gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim = {self.qk_rope_head_dim} is odd; RoPE rotates pairs of dimensions")
        return self

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_dim(self) -> int:
        """The number of elements cached per token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim


class Gqa(Record):
    """Grouped-query attention. It can be counted, but not built."""

    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    attention_bias: bool = False  # a bias on the q, k and v projections (Qwen 2.5)

    @model_validator(mode="after")
    def _check(self) -> Self:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ValueError(f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {groups}")
        return self

    @property
    def cache_dim(self) -> int:
        return 2 * self.num_key_value_heads * self.head_dim


class Moe(Record):
    """Routed and shared experts, and the gate that chooses between them [V3 eqs 12-16]."""

    n_routed_experts: int = Field(gt=0)
    n_shared_experts: int = Field(default=0, ge=0)
    num_experts_per_tok: int = Field(gt=0)
    moe_intermediate_size: int = Field(gt=0)
    first_k_dense_replace: int = Field(default=0, ge=0)
    n_group: int = Field(default=1, gt=0)
    topk_group: int = Field(default=1, gt=0)
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        experts, groups, kept = self.n_routed_experts, self.n_group, self.topk_group
        if experts % groups:
            raise ValueError(f"n_routed_experts = {experts} does not divide into n_group = {groups} equal groups")
        if kept > groups:
            raise ValueError(f"topk_group = {kept} groups cannot be kept of n_group = {groups}")
        reachable = kept * (experts // groups)
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok = {self.num_experts_per_tok} is more than the {reachable} experts in "
                f"topk_group = {kept} of n_group = {groups} groups of {experts // groups}"
            )
        self._check_method()
        return self

    def _check_method(self) -> None:
        if self.topk_method == "greedy" and (self.n_group, self.topk_group) != (1, 1):
            raise ValueError(
                f"topk_method = 'greedy' looks at no groups: set n_group = 1 and topk_group = 1, not "
                f"{self.n_group} and {self.topk_group}, or use group_limited_greedy"
            )
        per_group = self.n_routed_experts // self.n_group
        if self.topk_method == "noaux_tc" and self.n_group > 1 and per_group < 2:
            raise ValueError(
                f"topk_method = 'noaux_tc' scores a group by its 2 best experts, but n_routed_experts = "
                f"{self.n_routed_experts} in n_group = {self.n_group} groups leaves {per_group} in each"
            )

    @property
    def has_bias(self) -> bool:
        """Whether the gate has the selection bias of balancing without an auxiliary loss."""
        return self.topk_method == "noaux_tc"


class Yarn(Record):
    """YaRN context extension of the decoupled RoPE dimensions [V3 §4.3]."""

    factor: float = Field(gt=1)
    original_max_position_embeddings: int = Field(gt=0)
    beta_fast: float = Field(default=32.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by."""
        return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)

    def blended_pairs(self, dim: int, theta: float) -> tuple[int, int]:
        """The first and last of the dim/2 pairs between which frequencies are blended: (10, 23) for V3.

        `beta_fast` and `beta_slow` whole turns fit into the original context there.
        """

        def pair_at(turns: float) -> float:
            fitting = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return dim * math.log(fitting) / (2 * math.log(theta))

        return max(math.floor(pair_at(self.beta_fast)), 0), min(math.ceil(pair_at(self.beta_slow)), dim - 1)


def yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 and mscale else 1.0


def token_ids(value: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the ids that a key holds: one, several, or none."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else value


def check_tokens(name: str, ids: tuple[int, ...], vocab_size: int) -> None:
    """Raise ValueError for an id under the key `name` that is none of the vocabulary."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name} = {token} is not a token: vocab_size = {vocab_size}")


class ModelSpec(Record):
    """One model. `attention` and `moe` hold the keys that only those parts read."""

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)  # width of a dense SwiGLU
    attention: Mla | Gqa
    moe: Moe | None = None
    num_nextn_predict_layers: int = Field(default=0, ge=0)
    max_position_embeddings: int = Field(default=4096, gt=0)
    rope_theta: float = Field(default=10000.0, gt=1)
    rope_scaling: Yarn | None = None
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    tie_word_embeddings: bool = False
    initializer_range: float = 0.006  # [V3 §4.2]; the 0.02 of published config.json files is only a default
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None  # several, if any of them ends a text

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.moe and self.moe.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace = {self.moe.first_k_dense_replace} is more than num_hidden_layers = "
                f"{self.num_hidden_layers}"
            )
        if isinstance(self.attention, Gqa) and (self.moe or self.num_nextn_predict_layers):
            raise ValueError("grouped-query attention is described for counting dense models: no experts, no MTP")
        check_tokens("bos_token_id", () if self.bos_token_id is None else (self.bos_token_id,), self.vocab_size)
        check_tokens("eos_token_id", self.end_tokens, self.vocab_size)
        return self

    @property
    def end_tokens(self) -> tuple[int, ...]:
        return token_ids(self.eos_token_id)

    @property
    def num_moe_layers(self) -> int:
        """The number of layers of the main model that have experts."""
        return self.num_hidden_layers - self.moe.first_k_dense_replace if self.moe else 0

    def is_moe_layer(self, layer: int) -> bool:
        """Return whether layer `layer` has experts; the blocks of MTP modules are numbered after the last layer."""
        return self.moe is not None and layer >= self.moe.first_k_dense_replace
