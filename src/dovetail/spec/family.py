"""A family of small trainable models: DeepSeek-V3's shape at any width.

One dial chooses a model, the width (hidden size); depth, heads, ranks, number of experts and vocabulary follow from
it. The numbers of layers and of experts, which do not change the shapes of kernels, can be set beside it.

    layers         2 floor(log2(width / 32)): 4, 6, 8, 12 at 192, 256, 512, 2048; the first is dense
    dense width    11/4 width
    expert width   1/2 width, from 2048 up 1/4; both down to a multiple of 64, from 2048 up of 128
    experts        32, below width 256 16; 4 groups of which 2; top 4; 1 shared
    vocabulary     8 width, at least 4096

    initial std    0.006 sqrt(7168 / width)

At width 7168, V3's 0.006 makes a linear layer's output half as large as its normed input. The rule keeps that ratio at
every width. At width 192 the published 0.006 itself trains far worse (docs/log.md).

Below width 2048 the MLA dims are small, because full ones would dominate the model: nope/rope/v are 64/32/64, there
is one head per 64 of width, the query rank is 1/2 and the latent 1/4 of the width. From 2048 up they are DeepSeek-V3's
(128, 64, 128, latent 512), which fast kernels elsewhere are compiled for (`dovetail.spec.kernel_shapes`).
"""

from __future__ import annotations

import math
from typing import Self

from pydantic import Field, model_validator

from dovetail.config import Record
from dovetail.spec.kernel_shapes import FP8_TILE, HIDDEN_SIZES
from dovetail.spec.model import Mla, ModelSpec, Moe

PUBLISHED_STD, PUBLISHED_WIDTH = 0.006, 7168  # [V3 §4.2]
FULL_MLA_WIDTH = HIDDEN_SIZES[0]


class Dial(Record):
    """What chooses a member of the family. None means that the value is derived from the width."""

    width: int = Field(ge=128, multiple_of=64)
    layers: int | None = Field(default=None, ge=2)
    experts: int | None = Field(default=None, ge=8, multiple_of=4)
    mtp_depth: int = Field(default=1, ge=0)
    vocab_size: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width >= FULL_MLA_WIDTH and self.width not in HIDDEN_SIZES:
            raise ValueError(f"width = {self.width}: from {FULL_MLA_WIDTH} up it must be one of {HIDDEN_SIZES}")
        return self


def dovetail_spec(dial: Dial) -> ModelSpec:
    """Return the family's model at `dial`, for 4,096 positions; tokens 0 and 1 begin and end a text."""
    width = dial.width
    is_full = width >= FULL_MLA_WIDTH
    tile = FP8_TILE if is_full else 64
    moe = Moe(
        n_routed_experts=dial.experts or (32 if width >= 256 else 16),
        n_shared_experts=1,
        num_experts_per_tok=4,
        moe_intermediate_size=_round_down(width // 4 if is_full else width // 2, tile),
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,  # [V3 §4.2]
    )
    return ModelSpec(
        vocab_size=dial.vocab_size or max(4096, 8 * width),
        hidden_size=width,
        num_hidden_layers=dial.layers or 2 * int(math.log2(width / 32)),
        intermediate_size=_round_down(11 * width // 4, tile),
        attention=_attention(width),
        moe=moe,
        num_nextn_predict_layers=dial.mtp_depth,
        initializer_range=PUBLISHED_STD * math.sqrt(PUBLISHED_WIDTH / width),
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
    )


def _attention(width: int) -> Mla:
    if width >= FULL_MLA_WIDTH:
        return Mla(
            num_attention_heads=width // 128,
            q_lora_rank=_round_down(width // 4, FP8_TILE),
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
        )
    return Mla(
        num_attention_heads=width // 64,
        q_lora_rank=width // 2,
        kv_lora_rank=max(64, width // 4),
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
    )


def _round_down(size: int, multiple: int) -> int:
    return max(multiple, size // multiple * multiple)
