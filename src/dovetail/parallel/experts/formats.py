"""Formats of rows on the wire: how numbers become bytes, and bytes numbers again.

    way                       format
    dispatch                  the recipe's input of routed experts, which take it as it comes      FP8 in V3
    combine                   `back`, by choice: the rows' own, E5M6 or LogFMT-10
    gradients of combine      the recipe's gradient before the experts' last product               FP8 in V3
    gradients of dispatch     the rows' own

So V3 trained, with BF16 for what comes home [V3 §3.3.3: low-precision communication]. FP8 is sent where a recipe scales
these operands in tiles 1x128; gradients only under powers of two, since the product scales them again, and finds the
same numbers then. Everything else travels as it is. Bytes of a row of D numbers, as `cost.ops` counts them:

    the rows' own     2 D in BF16
    FP8               D            and an FP32 scale per tile: 4 ceil(D / 128)     [DeepEP]
    E5M6              12 D / 8     and an FP32 scale per tile                      [TileKernels]
    LogFMT-10         10 D / 8     and the tile's extremes in BF16: as many        [DeepEP]

A row is rounded once for each wire that it comes home by, also where it stays on its rank: numbers do not depend on who
holds an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from dovetail.numerics.formats import logfmt
from dovetail.numerics.formats.floats import float_format
from dovetail.numerics.formats.quantize import dequantize
from dovetail.numerics.formats.quantized import ROW_TILE, TILE, TORCH_DTYPES, Quantized, codes_of
from dovetail.numerics.linear import Input
from dovetail.numerics.operands.operands import keep, operand_of, scales_of
from dovetail.spec.precision import Quantization, Recipe

Back = Literal["bf16", "e5m6", "logfmt-10"]


def encode(rows: Tensor) -> Tensor:
    """rows [N, columns] -> the bytes of each row [N, width] uint8."""
    return rows.contiguous().view(torch.uint8)


def decode(sent: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows [N, columns] that `encode` was given; `sent` may be a part of wider rows."""
    return sent.clone(memory_format=torch.contiguous_format).view(dtype)  # a part of one row may lie at an odd byte


class Format(Protocol):
    def encode(self, rows: Tensor) -> Tensor:
        """rows [N, columns] -> the bytes of each row [N, width] uint8."""
        ...

    def decode(self, sent: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """The rows [N, columns] as they arrive. Bytes that are all zero are a row of zeros."""
        ...


@dataclass(frozen=True, slots=True)
class Plain:
    """As they are."""

    def encode(self, rows: Tensor) -> Tensor:
        return encode(rows)

    def decode(self, sent: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        return decode(sent, dtype)


@dataclass(frozen=True, slots=True)
class Scaled:
    """Codes in tiles 1x128, and behind them the tiles' FP32 scales."""

    quantization: Quantization

    def encode(self, rows: Tensor) -> Tensor:
        kept = keep(rows.contiguous(), self.quantization)
        return torch.cat((codes_of(kept), encode(kept.scale)), dim=1)

    def decode(self, sent: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        return dequantize(self.quantized(sent, columns), dtype)

    def quantized(self, sent: Tensor, columns: int) -> Quantized:
        """The rows as they were quantised; one that is padding as zeros are."""
        codes, scales = sent.tensor_split([-4 * -(-columns // TILE)], dim=1)
        scale, name = decode(scales, torch.float32), self.quantization.format
        scale = torch.where(scale == 0, scales_of(torch.zeros_like(scale), self.quantization), scale)
        is_packed = name == "e5m6"
        data = decode(codes, TORCH_DTYPES.get(name, torch.uint8))
        return Quantized(data=data, scale=scale, tile=ROW_TILE, format=name, columns=columns if is_packed else None)


@dataclass(frozen=True, slots=True)
class Logarithmic:
    """LogFMT's codes, and behind them the largest and the smallest size in each tile, of which both ends make its grid.

    They are numbers of the rows, so that nothing is lost in BF16.
    """

    bits: int

    def encode(self, rows: Tensor) -> Tensor:
        largest, smallest = logfmt.extremes(rows)
        codes = logfmt.to_codes(rows, *logfmt.tile_grid(largest, smallest, self.bits), self.bits)
        return torch.cat((logfmt.pack_bits(codes, self.bits), encode(largest), encode(smallest)), dim=1)

    def decode(self, sent: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        size = dtype.itemsize * -(-columns // TILE)
        packed, largest, smallest = sent.tensor_split((-2 * size, -size), dim=1)
        grid = logfmt.tile_grid(decode(largest, dtype), decode(smallest, dtype), self.bits)
        return logfmt.from_codes(logfmt.unpack_bits(packed, self.bits, columns), *grid, self.bits, dtype)


PLAIN = Plain()
BACK: dict[Back, Format] = {
    "bf16": PLAIN,
    "e5m6": Scaled(Quantization(format="e5m6")),
    "logfmt-10": Logarithmic(10),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Formats:
    """Those of a model's rows. What comes home in a backward pass is `PLAIN`."""

    out: Format = PLAIN
    back: Format = PLAIN
    out_gradient: Format = PLAIN


ALL_PLAIN = Formats()


def formats_of(recipe: Recipe, back: Back) -> Formats:
    up, down = recipe.sites.get("expert_up"), recipe.sites.get("expert_down")
    is_taken = up is not None and up.saved_input is None  # what is kept is what came
    has_powers = down is not None and down.grad.power_of_two
    return Formats(
        out=_sent_as(up.input) if up and is_taken else PLAIN,
        back=BACK[back],
        out_gradient=_sent_as(down.grad) if down and has_powers else PLAIN,
    )


def check_back(back: Back, recipe: Recipe, dtype: torch.dtype) -> None:
    """Raise ValueError where rows cannot come home in this format, or would be rounded for it twice."""
    if back == "bf16":
        return
    if dtype != torch.bfloat16:
        raise ValueError(f"layout.back = {back!r} rounds BF16 rows, and this model is {dtype}: set train.dtype")
    if recipe.expert_output is not None:
        raise ValueError(
            f"layout.back = {back!r} beside the recipe {recipe.name!r}, whose expert_output = "
            f"{recipe.expert_output!r} rounds the same rows: leave one of them out"
        )


def received(sent: Tensor, like: Tensor, format: Format) -> tuple[Tensor, Input | None]:
    """Bytes of rows [R, width] -> rows [R, columns] for experts, and the recipe's input where it is what came.

    The rows then only carry a gradient: NaN, so that nobody takes them for numbers, and no memory.
    """
    columns = like.shape[1]
    if not isinstance(format, Scaled):
        return format.decode(sent, columns, like.dtype), None
    kept = format.quantized(sent, columns)
    return like.new_full((1, 1), torch.nan).expand(len(sent), columns), (operand_of(kept), kept)


def _sent_as(quantization: Quantization) -> Format:
    is_small = float_format(quantization.format).bits <= 8
    return Scaled(quantization) if quantization.tile == "row" and is_small else PLAIN
