"""A matrix in a small format, tile by tile.

Quantisation makes these records and products take them. Here is also what references and kernels both need to know.

    x ~ data * scale        one FP32 scale per tile [V3 §3.3, V3repo kernel.py]

Tiles: 1x128 for activations and their gradients (a token's 128 channels), 128x1 for the operands of the weight gradient
(128 tokens of a channel), 128x128 for weights. The last tile of a row or column may be smaller.

`LogFmt` is the same for LogFMT, whose tiles have two numbers each (`formats.logfmt`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from dovetail.numerics.formats.floats import decode, float_format, unpack_e5m6
from dovetail.spec.tensors import scale_shape

TILE = 128
ROW_TILE, COLUMN_TILE, BLOCK_TILE = (1, TILE), (TILE, 1), (TILE, TILE)
AMAX_FLOOR = 1e-4  # keeps the scale of an all-zero tile away from 0 [DeepGEMM per_block_cast_to_fp8]
TORCH_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}  # the rest is kept as integer codes
LOGFMT_BITS = range(4, 13)
LOG_RANGE = 32.0  # octaves that LogFMT reaches below a tile's largest value: log2(2^32) [ISCA §3.2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A matrix in tiles, or several of one shape, one after another in the first dimension.

    `data` has one of three forms: the format's own (float8 where torch has it, else the codes of `floats.encode`), E5M6
    packed (`floats.pack_e5m6`, for what is kept), and BF16 with values on the format's grid, which products on a CPU
    take. `grid_values` reads all three, `quantize.dequantize` multiplies by the scales.

    Where rows belong to groups, tiles of several rows begin anew with every group (`token_tiles`). The record does not
    say so: such a matrix is for products, which are told the groups' offsets, and `dequantize` is not told.
    """

    data: Tensor  # [..., rows, columns]; E5M6 packed uint8 [rows, 12 ceil(columns / 8)]
    scale: Tensor  # FP32 [..., ceil(rows / tile[0]), ceil(columns / tile[1])], a multiplier
    tile: tuple[int, int]
    format: str = "e4m3"
    columns: int | None = None  # where data is packed, which does not show it

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix, whatever the form of `data`."""
        return (*self.data.shape[:-1], self.data.shape[-1] if self.columns is None else self.columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogFmt:
    """A matrix [rows, columns] in LogFMT, in tiles 1x128: packed codes, and what decodes each tile."""

    data: Tensor  # uint8 [rows, ceil(columns * bits / 8)]
    minimum: Tensor  # FP32 [rows, tiles], log2; 0 in a tile of zeros
    step: Tensor  # FP32 [rows, tiles], log2; 0, or what rounding `minimum` left, in a tile of one magnitude
    bits: int
    columns: int

    @property
    def num_bytes(self) -> int:
        """Codes and metadata: 16 n + 8 per whole tile."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.data, self.minimum, self.step))


def grid_values(quantized: Quantized) -> Tensor:
    """`data` as FP32 numbers on the format's grid, unscaled. ValueError where it is no matrix of floats or of the
    format's codes."""
    data, fmt = quantized.data, float_format(quantized.format)
    if quantized.columns is not None:
        return decode(unpack_e5m6(data)[..., : quantized.columns], fmt)
    is_codes = data.dtype in (torch.uint8, torch.uint16, torch.int32) and fmt.name not in TORCH_DTYPES
    if data.ndim < 2 or not (is_codes or data.is_floating_point()):
        raise ValueError(f"{fmt.name} data is a matrix of floats or codes, not {data.dtype} {list(data.shape)}")
    return decode(data, fmt) if is_codes else data.to(torch.float32)


def spread_scale(quantized: Quantized) -> Tensor:
    """The scale of each element."""
    scale, shape, tile = quantized.scale, quantized.shape, quantized.tile
    return spread(spread(scale, -2, tile[0], shape[-2]), -1, tile[1], shape[-1])


def spread(values: Tensor, dim: int, each: int, size: int) -> Tensor:
    """Every value of dimension `dim` `each` times, and of all that the first `size`."""
    return values.repeat_interleave(each, dim).narrow(dim, 0, size)


def transposed(quantized: Quantized) -> Quantized:
    """The transposed matrix: nothing is rounded, tiles lie on their side. 128x128 stay what they are [V3 §3.3.2]."""
    data, scale = (each.transpose(-1, -2) for each in (quantized.data, quantized.scale))
    return replace(quantized, data=data, scale=scale, tile=(quantized.tile[1], quantized.tile[0]))


def codes_of(quantized: Quantized) -> Tensor:
    """The data as unsigned integers, as kernels read and write them."""
    data = quantized.data
    return data if data.dtype == torch.uint16 else data.view(torch.uint8)


def check_scale(quantized: Quantized) -> None:
    """ValueError where there is not one scale per tile."""
    shape, scale, tile = quantized.shape, quantized.scale, quantized.tile
    expected = (*shape[:-2], *scale_shape((shape[-2], shape[-1]), tile))
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"scale has shape {list(scale.shape)}, not {list(expected)}: data is {list(shape)}, tiles are {list(tile)}"
        )


def token_tiles(offsets: Sequence[int], height: int = TILE) -> tuple[Tensor, list[int]]:
    """Tiles of `height` rows that begin anew with every group of rows, offsets[g] : offsets[g + 1]: first row and end
    of each [tiles, 2], and each group's first tile."""
    bounds: list[tuple[int, int]] = []
    firsts = []
    for start, stop in pairwise(offsets):
        firsts.append(len(bounds))
        bounds += [(row, min(row + height, stop)) for row in range(start, stop, height)]
    return torch.tensor(bounds, dtype=torch.int64).view(-1, 2), firsts


def check_groups(offsets: Sequence[int], rows: int, groups: int) -> None:
    """ValueError where `offsets` do not divide `rows` among the groups, in order."""
    is_ordered = all(start <= stop for start, stop in pairwise(offsets))
    if len(offsets) != groups + 1 or offsets[0] != 0 or offsets[-1] != rows or not is_ordered:
        raise ValueError(f"offsets {list(offsets)} do not divide {rows} rows among {groups} experts")


def check_height(rows: Quantized, groups: int) -> None:
    """ValueError where groups might share a tile."""
    if rows.tile[0] != 1 or not groups:
        raise ValueError(f"rows of {groups} experts, in tiles of height {rows.tile[0]}; expected experts, and height 1")


def capacity_of(rows: Quantized, counts: Tensor, groups: int) -> int:
    """How many rows each group has room for, of which counts[g] are in use. ValueError where that does not fit."""
    check_height(rows, groups)
    if len(rows.data) % groups or counts.shape != (groups,) or counts.dtype != torch.int32:
        raise ValueError(
            f"{len(rows.data)} rows for {groups} experts with counts {counts.dtype} {list(counts.shape)}: rows must be"
            f" as many for each expert, and counts int32 [{groups}]"
        )
    return len(rows.data) // groups


def refuse_non_finite(x: Tensor, name: str) -> None:
    """ValueError where `x` holds inf or NaN: how many of each, and what to do about it."""
    nans, infinities = int(torch.isnan(x).sum()), int(torch.isinf(x).sum())
    if nans or infinities:
        raise ValueError(
            f"{name}, shape {list(x.shape)}, holds {nans} NaN and {infinities} infinite values, which no scale can"
            " carry; find the step that made them (a lower learning rate or gradient clipping often is the remedy), or"
            " take a checkpoint from before it"
        )
