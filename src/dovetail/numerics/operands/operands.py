"""Operands of quantised products: values on a format's grid, and their scales.

They lie as the products take them.

    quantize_rows       x [R, C] -> scale [R, tiles of C]                   1x128
    quantize_columns    x [R, C] -> scale [tiles of R, C]                   128x1; every expert's rows begin a new tile
    quantize_blocks     w [G, N, K] -> scale [G, tiles of N, tiles of K]    128x128

A recipe may ask for larger tiles than these, such as one scale for a tensor; it is repeated for each of them, so that
products know three layouts and no more. Values of up to 8 significant bits are exact in BF16, whatever their format's
name, and are held as that; a GPU that multiplies FP8 gets E4M3 and E5M2 as float8, in the recipes' usual tiles.

What a layer keeps for its backward pass are row tiles in the format's own codes (`keep`, `quantize_and_keep`), E5M6
packed. `formats.quantize.dequantize` brings them back, `retile` makes the weight gradient's operand of them.

Each function has a CPU kernel of its name in `operands_numba`, a GPU kernel in `operands_triton`, and its reference
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.numerics import capability
from dovetail.numerics.formats import quantize_numba
from dovetail.numerics.formats.floats import encode, float_format, pack_e5m6, round_to
from dovetail.numerics.formats.quantize import dequantize, scale_of
from dovetail.numerics.formats.quantized import (
    BLOCK_TILE,
    COLUMN_TILE,
    ROW_TILE,
    TILE,
    TORCH_DTYPES,
    Quantized,
    grid_values,
    spread,
    token_tiles,
)
from dovetail.numerics.formats.rounding_numba import form_of
from dovetail.numerics.operands import operands_numba
from dovetail.spec.precision import Quantization


def quantize_rows(x: Tensor, quantization: Quantization) -> Quantized:
    """x [R, C] BF16 or FP32, tiles along its rows (or one scale, or blocks, repeated for each row)."""
    if _is_on_gpu(x, quantization, "row"):
        from dovetail.numerics.operands import operands_triton  # Triton comes with torch's CUDA builds only

        return operands_triton.quantize_rows(x, quantization)
    if quantization.tile == "block":
        blocks = quantize_blocks(x[None], quantization)
        return replace(blocks, data=blocks.data[0], scale=spread(blocks.scale[0], 0, TILE, len(x)), tile=ROW_TILE)
    if _is_on_cpu(x, quantization):
        return operands_numba.quantize_rows(x, quantization, _given_scale(x, quantization))
    return quantize_rows_reference(x.float(), quantization)


def quantize_and_keep(x: Tensor, quantization: Quantization) -> tuple[Quantized, Quantized]:
    """As `quantize_rows`, and the same in the format's own codes."""
    if _is_on_gpu(x, quantization, "row"):
        rows = quantize_rows(x, quantization)
        return rows, rows
    if _is_on_cpu(x, quantization) and quantization.tile != "block" and float_format(quantization.format).bits <= 8:
        return operands_numba.quantize_and_keep(x, quantization, _given_scale(x, quantization))
    rows = quantize_rows(x, quantization)
    return rows, _in_codes(rows)


def keep(x: Tensor, quantization: Quantization) -> Quantized:
    """x [R, C] BF16 for the backward pass alone."""
    if quantization.format == "e5m6" and quantization.tile == "row" and capability.on_gpu(x):
        from dovetail.numerics.operands import operands_triton

        return operands_triton.keep_e5m6(x, quantization)
    if quantization.format == "e5m6" and quantization.tile != "block" and _is_on_cpu(x, quantization):
        return operands_numba.keep_e5m6(x, quantization, _given_scale(x, quantization))
    return quantize_and_keep(x, quantization)[1]


def operand_of(kept: Quantized) -> Quantized:
    """What `quantize_and_keep` gave beside `kept`, bit for bit, of a format of up to 8 bits."""
    if kept.format in capability.FP8 and capability.on_fp8_gpu(kept.scale):
        return kept
    return replace(kept, data=grid_values(kept).to(torch.bfloat16))


def quantize_columns(x: Tensor, offsets: Sequence[int], quantization: Quantization) -> Quantized:
    """x [R, C] BF16 or FP32, tiles along its columns that begin anew with every group of rows,
    offsets[g] : offsets[g + 1]."""
    if _is_on_gpu(x, quantization, "column"):
        from dovetail.numerics.operands import operands_triton

        return operands_triton.quantize_columns(x, offsets, quantization)
    if _is_on_cpu(x, quantization) and quantization.tile == "column":
        return operands_numba.quantize_columns(x, offsets, quantization)
    if _is_on_cpu(x, quantization) and quantization.tile == "tensor":
        rows, tiles = quantize_rows(x, quantization), len(token_tiles(offsets)[0])
        scale = rows.scale[:tiles, :1].expand(tiles, x.shape[1]).contiguous()
        return replace(rows, scale=scale, tile=COLUMN_TILE)
    return quantize_columns_reference(x.float(), offsets, quantization)


def retile(kept: Quantized, offsets: Sequence[int], quantization: Quantization) -> Quantized:
    """Column tiles, as `quantize_columns` makes them, of what was kept in row tiles, by way of FP32."""
    if _is_on_gpu(kept.scale, quantization, "column"):
        from dovetail.numerics.formats import quantize_triton
        from dovetail.numerics.operands import operands_triton

        if quantize_triton.reads(kept):
            return operands_triton.retile(kept, offsets, quantization)
    is_in_bytes = quantize_numba.reads(kept, torch.float32) and kept.columns is None
    if is_in_bytes and quantization.tile == "column" and _is_on_cpu(kept.scale, quantization):
        return operands_numba.retile(kept, offsets, quantization)
    return quantize_columns(dequantize(kept, torch.float32), offsets, quantization)


def quantize_blocks(weight: Tensor, quantization: Quantization) -> Quantized:
    """weight [G, N, K] BF16 in tiles of 128x128, or with one scale for each of G."""
    if _is_on_gpu(weight, quantization, "block"):
        from dovetail.numerics.operands import operands_triton

        return operands_triton.quantize_blocks(weight, quantization)
    if not _is_on_cpu(weight, quantization):
        return quantize_blocks_reference(weight.float(), quantization)
    if quantization.tile != "tensor":
        return operands_numba.quantize_blocks(weight, quantization)
    groups, rows, columns = weight.shape
    scale = _tensor_scales(weight, quantization)
    each_row = scale.repeat_interleave(rows)[:, None].expand(-1, _tiles(columns)).contiguous()
    values = operands_numba.quantize_rows(weight.view(groups * rows, columns), quantization, each_row).data
    tiles = scale[:, None, None].expand(-1, _tiles(rows), _tiles(columns)).contiguous()
    return Quantized(data=values.view_as(weight), scale=tiles, tile=BLOCK_TILE, format=quantization.format)


def quantize_rows_reference(x: Tensor, quantization: Quantization) -> Quantized:
    amax = _tiled(x.abs(), 1).amax(2)
    if quantization.tile == "tensor" and amax.numel():
        amax = amax.amax().expand_as(amax)
    scale = scales_of(amax, quantization)
    return _on_grid(x / spread(scale, 1, TILE, x.shape[1]), scale, ROW_TILE, quantization)


def quantize_columns_reference(x: Tensor, offsets: Sequence[int], quantization: Quantization) -> Quantized:
    tiles = [slice(start, stop) for start, stop in token_tiles(offsets)[0].tolist()]
    amax = torch.stack([x[tile].abs().amax(0) for tile in tiles]) if tiles else x.new_empty(0, x.shape[1])
    if quantization.tile == "block":
        amax = spread(_tiled(amax, 1).amax(2), 1, TILE, x.shape[1])
    elif quantization.tile == "tensor":
        amax = amax.amax().expand_as(amax) if amax.numel() else amax
    scale = scales_of(amax, quantization)
    scaled = torch.cat([x[tile] / each for tile, each in zip(tiles, scale, strict=True)]) if tiles else x
    return _on_grid(scaled, scale, COLUMN_TILE, quantization)


def quantize_blocks_reference(weight: Tensor, quantization: Quantization) -> Quantized:
    amax = _tiled(_tiled(weight.abs(), 2).amax(3), 1).amax(2)
    if quantization.tile == "tensor" and amax.numel():
        amax = amax.amax((1, 2), keepdim=True).expand_as(amax)
    scale = scales_of(amax, quantization)
    each = spread(spread(scale, 2, TILE, weight.shape[2]), 1, TILE, weight.shape[1])
    return _on_grid(weight / each, scale, BLOCK_TILE, quantization)


def scales_of(amax: Tensor, quantization: Quantization) -> Tensor:
    """amax / largest value of the format; NaN where amax is not finite."""
    amax = torch.where(amax.isfinite(), amax, torch.nan)
    return scale_of(amax, float_format(quantization.format), quantization.power_of_two).contiguous()


def _on_grid(scaled: Tensor, scale: Tensor, tile: tuple[int, int], quantization: Quantization) -> Quantized:
    values = round_to(scaled, float_format(quantization.format)).to(torch.bfloat16)
    return Quantized(data=values, scale=scale, tile=tile, format=quantization.format)


def _in_codes(rows: Quantized) -> Quantized:
    codes = encode(grid_values(rows), float_format(rows.format))
    if rows.format == "e5m6":
        packed = pack_e5m6(F.pad(codes, (0, -codes.shape[1] % 8)))
        return replace(rows, data=packed, columns=codes.shape[1])
    return replace(rows, data=codes.view(TORCH_DTYPES.get(rows.format, codes.dtype)))


def _tiles(size: int) -> int:
    return -(-size // TILE)


def _tiled(x: Tensor, dim: int) -> Tensor:
    """Dimension `dim` as [tiles, TILE], zeros at the end."""
    padding = [0, 0] * (x.ndim - 1 - dim) + [0, -x.shape[dim] % TILE]
    return F.pad(x, padding).unflatten(dim, (-1, TILE))


def _is_on_gpu(x: Tensor, quantization: Quantization, tile: str) -> bool:
    """Whether the operand is made for FP8 products; other formats and tiles come from the references, in BF16."""
    return quantization.format in capability.FP8 and quantization.tile == tile and capability.on_fp8_gpu(x)


def _is_on_cpu(x: Tensor, quantization: Quantization) -> bool:
    return capability.on_cpu(x) and x.is_contiguous() and form_of(quantization.format) is not None


def _given_scale(x: Tensor, quantization: Quantization) -> Tensor | None:
    """[R, tiles] of the one scale, for the kernels of rows; None where each tile has its own."""
    if quantization.tile != "tensor":
        return None
    return _tensor_scales(x[None], quantization).expand(len(x), _tiles(x.shape[1])).contiguous()


def _tensor_scales(x: Tensor, quantization: Quantization) -> Tensor:
    """One for each of x [G, ...]."""
    amax = x.abs().flatten(1).amax(1) if x.numel() else x.new_zeros(len(x))
    return scales_of(amax.float(), quantization)
