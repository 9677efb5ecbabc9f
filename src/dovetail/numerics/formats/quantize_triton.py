"""GPU kernels of `quantize` and `dequantize`.

They quantise to any tile with power-of-two sides and dequantise tiles of 1x128, bit for bit as the references do.

One program takes a block of whole tiles: maximum of magnitudes per tile, scale, division, code, all from one read of x.
1x128 tiles [V3 §3.3.2] come four in a row, so that scales are written 16 bytes at a time.

Tiles 128x1 are for operands of the weight gradient, whose products run along the tokens; they are written K-major
(the data's strides are (1, rows)), which is the only order that FP8 products on Hopper take.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail.numerics import capability
from dovetail.numerics.formats.floats import FloatFormat, float_format, unpack_e5m6
from dovetail.numerics.formats.quantized import ROW_TILE, TILE, TORCH_DTYPES, Quantized, codes_of, refuse_non_finite
from dovetail.numerics.formats.rounding_triton import LARGEST_FORMAT, narrow, quantize_tiles, rounding, widen

LARGEST_TILE = 128 * 128
_TILE = tl.constexpr(TILE)  # columns of a scale of what was quantised before
ROW_COLUMNS, COLUMNS, ELEMENTS = 512, 64, 4096  # of a program: columns for tiles 1xN, for others; values


@triton.jit
def _quantize(  # type: ignore[no-untyped-def]
    x,
    x_scale,
    data,
    scale,
    bounds,
    rows,
    columns,
    tiles_down,
    tiles_across,
    x_row,
    x_column,
    x_scale_row,
    data_row,
    data_column,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """DOWN x ACROSS tiles. `bounds` [tiles_down, 2], or none: first row and end of each row of tiles; DOWN = 1 then.
    `x_scale`, or none: what x is multiplied by, in tiles 1x128."""
    down, across = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, end = down * (DOWN * TILE_ROWS), rows
    if bounds is not None:
        first, end = tl.load(bounds + 2 * down).to(tl.int64), tl.load(bounds + 2 * down + 1)
    row = (first + tl.arange(0, DOWN * TILE_ROWS))[:, None]
    column = (across * (ACROSS * TILE_COLUMNS) + tl.arange(0, ACROSS * TILE_COLUMNS))[None, :]
    inside = (row < end) & (column < columns)
    values = widen(tl.load(x + row * x_row + column * x_column, mask=inside, other=0.0))
    if x_scale is not None:
        values *= tl.load(x_scale + row * x_scale_row + column // _TILE, mask=inside, other=0.0)
    codes, factor = quantize_tiles(values, TILE_ROWS, TILE_COLUMNS, DOWN, ACROSS, ROUNDING)
    tl.store(data + row * data_row + column * data_column, codes, mask=inside)
    tile_row = (down * DOWN + tl.arange(0, DOWN))[:, None]
    tile_column = (across * ACROSS + tl.arange(0, ACROSS))[None, :]
    has_tile = (tile_row < tiles_down) & (tile_column < tiles_across)
    tl.store(scale + tile_row * tiles_across + tile_column, factor, mask=has_tile)


@triton.jit
def _dequantize(  # type: ignore[no-untyped-def]
    data, scale, out, rows, columns, data_row, scale_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """ROWS x COLUMNS values."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < columns)
    values = widen(tl.load(data + row * data_row + column, mask=inside, other=0.0))
    values *= tl.load(scale + row * scale_row + column // _TILE, mask=inside, other=0.0)
    tl.store(out + row * columns + column, narrow(values, out.dtype.element_ty), mask=inside)


def quantize(
    x: Tensor,
    tile: tuple[int, int],
    format: str = "e4m3",
    power_of_two: bool = False,
    check: bool = True,
    name: str = "the tensor to quantise",
) -> Quantized:
    """x [rows, columns], FP32, BF16 or FP16, any strides -> data of the same shape, FP32 scales per `tile`.

    `check` looks at the scales (and so waits for the GPU): ValueError, which calls x `name`, for NaN or infinity.
    """
    return _checked(_run(x, tile, format, power_of_two, name), x, check, name)


def fits(x: Tensor, tile: tuple[int, int], form: FloatFormat) -> bool:
    """Whether `quantize` does; the reference takes any dtype, tile and format."""
    return x.dtype != torch.float64 and form.max < LARGEST_FORMAT and _has_room(tile)


def quantize_parts(
    x: Tensor,
    bounds: Tensor,
    tile: tuple[int, int],
    format: str = "e4m3",
    power_of_two: bool = False,
    x_scale: Tensor | None = None,
) -> Quantized:
    """Rows of tiles given by `bounds` [tiles, 2] (first row and end of each, at most tile[0] rows); nothing is checked.

    With `x_scale` FP32 [rows, tiles of 128 columns] x, which may be float8 then, is multiplied by it first, in FP32:
    from tiles 1x128 to others without a stop in memory.
    """
    return _run(x, tile, format, power_of_two, "the tensor to quantise", bounds, x_scale)


def reads(quantized: Quantized) -> bool:
    """Whether `dequantize` does: float8, where the GPU has it, or E5M6 packed, in tiles 1x128."""
    if quantized.columns is None:
        parts = quantized.data, quantized.scale
        is_read = quantized.data.dtype in TORCH_DTYPES.values() and capability.on_fp8_gpu(*parts)
        is_read = is_read and all(part.ndim == 2 and part.is_contiguous() for part in parts)
    else:
        is_read = quantized.scale.is_contiguous()
    return is_read and quantized.tile == ROW_TILE


def numbers_of(quantized: Quantized) -> Tensor:
    """What `reads` allows as numbers that a kernel loads, without scales; E5M6 is FP16 with four bits less."""
    if quantized.columns is None:
        return quantized.data
    codes = unpack_e5m6(quantized.data)[:, : quantized.columns].to(torch.int32)
    return (codes << 4).to(torch.int16).view(torch.float16)


def dequantize(quantized: Quantized, dtype: torch.dtype) -> Tensor:
    """[rows, columns] of what `reads` allows, rounded to `dtype`."""
    data, scale = numbers_of(quantized), quantized.scale
    (rows, columns), out = data.shape, torch.empty(data.shape, dtype=dtype, device=data.device)
    if out.numel():
        grid = (triton.cdiv(rows, ELEMENTS // ROW_COLUMNS), triton.cdiv(columns, ROW_COLUMNS))
        strides = data.stride(0), scale.stride(0)
        _dequantize[grid](data, scale, out, rows, columns, *strides, ELEMENTS // ROW_COLUMNS, ROW_COLUMNS)
    return out


def _checked(result: Quantized, x: Tensor, check: bool, name: str) -> Quantized:
    if check and not bool(result.scale.isfinite().all()):
        refuse_non_finite(x, name)
    return result


def _run(
    x: Tensor,
    tile: tuple[int, int],
    format: str,
    power_of_two: bool,
    name: str,
    bounds: Tensor | None = None,
    x_scale: Tensor | None = None,
) -> Quantized:
    if x.ndim != 2 or not x.is_floating_point() or x.dtype == torch.float64:
        raise ValueError(f"the kernel takes a matrix of FP32, BF16 or FP16; {name} is {x.dtype} {list(x.shape)}")
    assert x_scale is None or x_scale.stride(1) == 1 or x_scale.shape[1] <= 1
    result = empty_quantized((x.shape[0], x.shape[1]), tile, format, x.device, None if bounds is None else len(bounds))
    down, across = result.scale.shape
    if x.numel():
        block = tiles_per_program(tile) if bounds is None else (1, tiles_per_program(tile)[1])
        table = None if bounds is None else bounds.to(torch.int32).contiguous().to(x.device, non_blocking=True)
        _quantize[(triton.cdiv(down, block[0]), triton.cdiv(across, block[1]))](
            x, x_scale, codes_of(result), result.scale, table, *x.shape, down, across, *x.stride(),
            0 if x_scale is None else x_scale.stride(0), *result.data.stride(), *tile, *block,
            rounding(float_format(format), power_of_two, x.device), num_warps=4 if tile[0] == 1 else 8,
        )  # fmt: skip
    return result


def empty_quantized(
    shape: tuple[int, int], tile: tuple[int, int], format: str, device: torch.device, rows_of_tiles: int | None = None
) -> Quantized:
    """Room for a matrix in tiles: row by row, but for tiles Nx1 K-major, each column at a multiple of 16 bytes."""
    if not _has_room(tile):
        raise ValueError(f"tile {list(tile)}: kernels take sides that are powers of two, and at most 128x128 values")
    form, (rows, columns) = float_format(format), shape
    dtype = TORCH_DTYPES.get(form.name, torch.uint8 if form.bits <= 8 else torch.uint16)
    if tile[0] > 1 == tile[1]:
        data = torch.empty(columns, triton.cdiv(rows, 16) * 16, dtype=dtype, device=device)[:, :rows].t()
    else:
        data = torch.empty(rows, columns, dtype=dtype, device=device)
    down = triton.cdiv(rows, tile[0]) if rows_of_tiles is None else rows_of_tiles
    scale = torch.empty(down, triton.cdiv(columns, tile[1]), dtype=torch.float32, device=device)
    return Quantized(data=data, scale=scale, tile=tile, format=form.name)


def _has_room(tile: tuple[int, int]) -> bool:
    return all(side > 0 and side & (side - 1) == 0 for side in tile) and tile[0] * tile[1] <= LARGEST_TILE


def tiles_per_program(tile: tuple[int, int], elements: int = ELEMENTS) -> tuple[int, int]:
    """Tiles down and across of a program that takes about `elements`."""
    across = max(1, (ROW_COLUMNS if tile[0] == 1 else COLUMNS) // tile[1])
    return max(1, elements // (tile[0] * tile[1] * across)), across
