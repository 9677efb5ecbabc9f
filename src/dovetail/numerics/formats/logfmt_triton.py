"""GPU kernels of `logfmt`: encode and decode, with packed bits.

A tile's grid (minimum, step) is computed in FP64, two logarithms for 128 values. Values are too by default, which gives
the reference's bits. With `work = torch.float32` they take the GPU's fast exponential unit, as a kernel fused with an
all-to-all must [ISCA §3.2.1]; then of two values that nearly tie the other may be taken, whose error is the same but
for FP32's own.

Eight codes of n bits fill n bytes: two words of four codes are summed and cut into bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail.numerics.formats.quantized import LOG_RANGE, LOGFMT_BITS, TILE, LogFmt, refuse_non_finite
from dovetail.numerics.formats.rounding_triton import magnitude_bits, narrow, widen

ROWS = 8  # tiles of a program
WORK = {torch.float64: tl.float64, torch.float32: tl.float32}
_TILE = tl.constexpr(TILE)
_LOG_RANGE = tl.constexpr(LOG_RANGE)
_INFINITY = tl.constexpr(0x7F800000)  # FP32 bits


@triton.jit
def _tile_grid(values, TOP: tl.constexpr):  # type: ignore[no-untyped-def]
    """(minimum, step) of each row, FP32: `logfmt.tile_grid` of `logfmt.extremes`."""
    magnitude = magnitude_bits(values)
    largest = tl.max(magnitude, axis=1)
    smallest = tl.min(tl.where(magnitude == 0, 0x7FFFFFFF, magnitude), axis=1)
    has_range = (largest > 0) & (largest < _INFINITY)
    high = tl.where(has_range, largest, 0x3F800000).to(tl.float32, bitcast=True).to(tl.float64)
    low = tl.where(has_range, smallest, 0x3F800000).to(tl.float32, bitcast=True).to(tl.float64)
    top = tl.log2(high)
    minimum = tl.maximum(tl.log2(low), top - _LOG_RANGE).to(tl.float32)
    step = tl.maximum((top - minimum.to(tl.float64)) / (TOP - 1), 0.0).to(tl.float32)
    other = tl.where(largest < _INFINITY, 0.0, float("nan"))
    return tl.where(has_range, minimum, other), tl.where(has_range, step, other)


@triton.jit
def _power_of_two(exponent):  # type: ignore[no-untyped-def]
    """FP32, of a whole FP32 number from -126 to 127."""
    return ((exponent.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _codes(values, minimum, step, BITS: tl.constexpr, WORK: tl.constexpr):  # type: ignore[no-untyped-def]
    """`logfmt.to_codes` as int64."""
    TOP: tl.constexpr = 2 ** (BITS - 1) - 1
    magnitude = tl.abs(values).to(WORK)
    # 2^minimum may be below what FP32 divides by: its whole octaves are taken out of the values, in two exact products
    octaves = tl.floor(tl.where(minimum == minimum, minimum, 0.0))
    least = tl.exp2((minimum - octaves).to(WORK))
    most = tl.maximum(octaves, -120.0)
    ratio = magnitude * _power_of_two(-most).to(WORK)[:, None] * _power_of_two(most - octaves).to(WORK)[:, None]
    ratio = ratio / least[:, None]
    width = tl.where(step == 0, 1.0, step).to(WORK)
    half_way = tl.exp2(width / 2)
    middle = width / 2 + tl.log2((half_way + 1 / half_way) / 2)  # log2((1 + 2^width) / 2), keeping its digits
    safe = tl.where(ratio > 0, ratio, 1.0)
    code = tl.floor(tl.log2(safe) / width[:, None] + 2 - (middle / width)[:, None])
    code = tl.where(code == code, code, 1.0)
    code = tl.minimum(tl.maximum(code, 1.0), TOP).to(tl.int64)
    code = tl.where(ratio < 0.5, 0, code)
    return code + ((values.to(tl.int32, bitcast=True) < 0).to(tl.int64) << (BITS - 1))


@triton.jit
def _encode(  # type: ignore[no-untyped-def]
    x,
    data,
    minimum,
    step,
    rows,
    columns,
    row_bytes,
    x_row,
    x_column,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    WORK: tl.constexpr,
):
    """ROWS tiles, one below the other."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    column = tile * _TILE + tl.arange(0, _TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    values = widen(tl.load(x + row[:, None] * x_row + column[None, :] * x_column, mask=inside, other=0.0))
    low, width = _tile_grid(values, 2 ** (BITS - 1) - 1)
    tl.store(minimum + row * tl.num_programs(1) + tile, low, mask=row < rows)
    tl.store(step + row * tl.num_programs(1) + tile, width, mask=row < rows)
    codes = tl.where(inside, _codes(values, low, width, BITS, WORK), 0)
    fours = tl.reshape(codes, (ROWS, _TILE // 8, 2, 4)) << (tl.arange(0, 4) * BITS)[None, None, None, :]
    words = tl.sum(fours, axis=3)
    first, second = tl.split(words)
    byte = tl.arange(0, 16)[None, None, :]
    at = byte * 8
    early = (first[:, :, None] >> at) & 0xFF
    late = tl.where(at < 4 * BITS, second[:, :, None] << tl.maximum(4 * BITS - at, 0), 0)
    late += tl.where(at >= 4 * BITS, second[:, :, None] >> tl.maximum(at - 4 * BITS, 0), 0)
    place = (tile * (_TILE // 8) + tl.arange(0, _TILE // 8))[None, :, None] * BITS + byte
    is_stored = (row < rows)[:, None, None] & (byte < BITS) & (place < row_bytes)
    tl.store(data + row[:, None, None] * row_bytes + place, (early | (late & 0xFF)).to(tl.uint8), mask=is_stored)


@triton.jit
def _decode(  # type: ignore[no-untyped-def]
    data,
    minimum,
    step,
    out,
    rows,
    columns,
    row_bytes,
    LARGEST: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    WORK: tl.constexpr,
):
    """ROWS tiles, one below the other; a code lies within three bytes."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    column = (tile * _TILE + tl.arange(0, _TILE))[None, :]
    inside = (row < rows)[:, None] & (column < columns)
    first = column * BITS // 8
    here = data + row[:, None] * row_bytes
    word = tl.load(here + first, mask=inside, other=0).to(tl.int32)
    for i in tl.static_range(1, 3):
        word |= tl.load(here + first + i, mask=inside & (first + i < row_bytes), other=0).to(tl.int32) << (8 * i)
    code = (word >> (column * BITS % 8)) & ((1 << BITS) - 1)
    count = code & (2 ** (BITS - 1) - 1)
    low = tl.load(minimum + row * tl.num_programs(1) + tile, mask=row < rows, other=0.0).to(WORK)[:, None]
    width = tl.load(step + row * tl.num_programs(1) + tile, mask=row < rows, other=0.0).to(WORK)[:, None]
    magnitude = tl.exp2(low) * tl.exp2(width * (count - 1).to(WORK))
    magnitude = tl.where(magnitude > LARGEST, LARGEST, magnitude)
    magnitude = tl.where(count == 0, 0.0, magnitude)
    value = tl.where(code >> (BITS - 1) == 1, -magnitude, magnitude).to(tl.float32)
    tl.store(out + row[:, None] * columns + column, narrow(value, out.dtype.element_ty), mask=inside)


def encode(
    x: Tensor,
    bits: int,
    check: bool = True,
    name: str = "the tensor to encode",
    work: torch.dtype = torch.float64,
) -> LogFmt:
    """`x` [rows, columns], FP32, BF16 or FP16, as LogFMT with `bits` per value; errors as the reference's."""
    if bits not in LOGFMT_BITS:
        raise ValueError(f"LogFMT has {LOGFMT_BITS[0]} to {LOGFMT_BITS[-1]} bits, not {bits}")
    if x.ndim != 2 or not x.is_floating_point() or x.dtype == torch.float64:
        raise ValueError(f"the kernel takes a matrix of FP32, BF16 or FP16; {name} is {x.dtype} {list(x.shape)}")
    rows, columns = x.shape
    row_bytes, tiles = triton.cdiv(columns * bits, 8), triton.cdiv(columns, TILE)
    data = torch.empty(rows, row_bytes, dtype=torch.uint8, device=x.device)
    minimum, step = (torch.empty(rows, tiles, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel():
        grid = (triton.cdiv(rows, ROWS), tiles)
        _encode[grid](x, data, minimum, step, rows, columns, row_bytes, *x.stride(), bits, ROWS, WORK[work])
    if check and not bool(torch.isfinite(minimum).all()):
        refuse_non_finite(x, name)
    return LogFmt(data=data, minimum=minimum, step=step, bits=bits, columns=columns)


def decode(encoded: LogFmt, dtype: torch.dtype = torch.float32, work: torch.dtype = torch.float64) -> Tensor:
    """The values [rows, columns], FP32 or BF16. ValueError where the shapes of codes and metadata do not fit."""
    rows, tiles, row_bytes = len(encoded.data), triton.cdiv(encoded.columns, TILE), encoded.data.shape[1]
    shapes = [list(part.shape) for part in (encoded.data, encoded.minimum, encoded.step)]
    expected = [[rows, triton.cdiv(encoded.columns * encoded.bits, 8)], [rows, tiles], [rows, tiles]]
    if shapes != expected:
        raise ValueError(f"{rows} rows of {encoded.columns} columns are data, minimum, step {expected}, not {shapes}")
    out = torch.empty(rows, encoded.columns, dtype=dtype, device=encoded.data.device)
    if out.numel():
        _decode[(triton.cdiv(rows, ROWS), tiles)](
            encoded.data, encoded.minimum, encoded.step, out, rows, encoded.columns, row_bytes,
            torch.finfo(dtype).max, encoded.bits, ROWS, WORK[work],
        )  # fmt: skip
    return out
