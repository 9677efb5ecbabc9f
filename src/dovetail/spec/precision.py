"""Precision recipes: the format, tile and scale rule of every operand of every matrix product.

A linear layer has three products in a training step, each a sum over k:

    fprop   output     = input   weight^T     k = inputs
    dgrad   grad input = grad    weight       k = outputs
    wgrad   grad weight = grad^T input        k = tokens

Both operands have a scale for every 128 of k. `row` tiles are 1x128 (one token), `column` tiles 128x1 (one channel,
along the tokens), `block` tiles 128x128; `tensor` is one scale for the whole tensor.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from dovetail.config import Record, near_matches

Site = Literal[
    "attention_down",  # q_a_proj, kv_a_proj_with_mqa; q_proj where queries are not compressed
    "attention_up",  # q_b_proj, kv_b_proj
    "attention_out",  # o_proj
    "mlp_up",  # gate and up of dense and shared experts
    "mlp_down",
    "expert_up",  # gate and up of routed experts
    "expert_down",
    "mtp_join",  # eh_proj
]
FORMATS = ("e4m3", "e5m2", "e5m6", "e3m4")  # suggested to a user who misspells one
Tile = Literal["row", "column", "block", "tensor"]


class Quantization(Record):
    """How one operand is rounded."""

    format: str = "e4m3"  # any eXmY of numerics.formats
    tile: Tile = "row"
    power_of_two: bool = False  # scales rounded up to a power of two (UE8M0)

    @field_validator("format")
    @classmethod
    def _can_be_scaled_and_held(cls, name: str) -> str:
        return _scaled_format(name)


def _scaled_format(name: str) -> str:
    """Return the name in lower case if values of this format can be scaled in tiles and held in BF16.

    Eight exponent bits need no scales, and BF16 has seven mantissa bits.
    """
    match = re.fullmatch(r"e([0-9]{1,3})m([0-9]{1,3})", name.lower())
    if match is None or not (2 <= int(match[1]) <= 7 and 1 <= int(match[2]) <= 7):
        raise ValueError(
            f"an operand cannot be {name!r}, but any eXmY with 2 to 7 exponent bits and 1 to 7 mantissa bits;"
            f" {near_matches(name.lower(), FORMATS)}"
        )
    return match[0]


ROW, COLUMN, BLOCK = Quantization(), Quantization(tile="column"), Quantization(tile="block")


class GemmPrecision(Record):
    """The precision of one linear layer [V3 §3.3.2].

    It says how the operands of its three products are rounded, how its input is kept for the backward pass, and how
    products are summed.
    """

    input: Quantization = ROW
    weight: Quantization = BLOCK
    grad: Quantization = ROW
    wgrad_input: Quantization = COLUMN
    wgrad_grad: Quantization = COLUMN
    saved_input: Quantization | None = None  # None: kept as fprop's operand
    accumulator: Literal["fp32", "hopper"] = "fp32"  # sums in FP32, or as Hopper's Tensor Core does
    promotion: int | None = Field(default=128, gt=0, multiple_of=32)  # terms summed before they go to FP32; None: all

    @model_validator(mode="after")
    def _fp32_is_promoted_by_tile(self) -> GemmPrecision:
        if self.accumulator == "fp32" and self.promotion != 128:
            raise ValueError(
                f"promotion = {self.promotion or 'never'} with accumulator fp32, which sums by tiles of 128: leave it"
                ' out, or use accumulator = "hopper"'
            )
        return self

    @model_validator(mode="after")
    def _tiles_lie_along_k(self) -> GemmPrecision:
        for name in ("input", "grad", "saved_input"):
            operand = getattr(self, name)
            if operand is not None and operand.tile == "column":
                raise ValueError(f"{name} has column tiles, but its k runs along the row: use row, block or tensor")
        for name in ("wgrad_input", "wgrad_grad"):
            if getattr(self, name).tile == "row":
                raise ValueError(f"{name} has row tiles, but its k runs along the tokens: use column, block or tensor")
        if self.weight.tile not in ("block", "tensor"):
            raise ValueError(f"weight has {self.weight.tile} tiles, but is used along both sides: use block or tensor")
        return self


class Recipe(Record):
    """The precision of every linear layer, and of what is kept and sent.

    A site that is not listed runs in the model's own dtype. Embedding, head, router, norms and the attention core
    always do [V3 §3.3.1].
    """

    name: str
    source: str
    sites: dict[Site, GemmPrecision] = {}
    saved_swiglu: Quantization | None = None  # how experts' SwiGLU inputs are kept; None: in the model's dtype
    expert_output: str | None = None  # format in which routed experts' outputs are sent back: eXmY, or logfmt-N
    moments: Literal["bfloat16", "float32"] = "bfloat16"  # both of AdamW [V3 §3.3.3]

    @field_validator("expert_output")
    @classmethod
    def _can_be_sent(cls, name: str | None) -> str | None:
        """`numerics.formats.logfmt` decides how many bits LogFMT may have."""
        return name if name is None or re.fullmatch(r"logfmt-[0-9]+", name) else _scaled_format(name)
