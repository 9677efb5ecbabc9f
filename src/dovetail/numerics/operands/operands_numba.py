"""CPU kernels of `operands`: tiles of 1x128, 128x1 and 128x128, in one pass over the matrix.

Values come out on the format's grid as BF16 bits, which products take (`products.scaled_numba`), and as the format's
own codes, which are what is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numba import prange
from numba.extending import register_jitable
from torch import Tensor

from dovetail.numerics.cpu.kernels import array, exact_kernel
from dovetail.numerics.cpu.scalars_numba import bits_of, float_of, load
from dovetail.numerics.formats.quantized import (
    BLOCK_TILE,
    COLUMN_TILE,
    ROW_TILE,
    TILE,
    TORCH_DTYPES,
    Quantized,
    codes_of,
    token_tiles,
)
from dovetail.numerics.formats.rounding_numba import bf16_bits, code_of, form_of, round_to, scale_of, value_of
from dovetail.spec.precision import Quantization

_NO_CODES = np.empty((0, 0), np.uint8)


@exact_kernel
def _rows(x, form, power_of_two, is_given, grid, codes, scales):  # type: ignore[no-untyped-def]
    """Tiles 1x128 of x [R, C]: grid [R, C] BF16 bits, codes [R, C] uint8 (or none of them), scales [R, tiles].

    `is_given`: the scales are there already.
    """
    count, columns = x.shape
    for r in prange(count):
        wide = np.empty(TILE, np.float32)
        for tile in range(scales.shape[1]):
            begin, end = tile * TILE, min((tile + 1) * TILE, columns)
            source, target, values = x[r, begin:end], grid[r, begin:end], wide[: end - begin]
            amax = np.int32(0)
            for i in range(len(source)):
                values[i] = load(source, i)
                amax = max(amax, bits_of(values[i]) & np.int32(0x7FFFFFFF))
            scale = scales[r, tile] if is_given else scale_of(float_of(amax), form, power_of_two)
            scales[r, tile] = scale
            if len(codes):
                kept = codes[r, begin:end]
                for i in range(len(source)):
                    target[i] = bf16_bits(round_to(values[i] / scale, form))
                    kept[i] = code_of(values[i] / scale, form)
            else:
                for i in range(len(source)):
                    target[i] = bf16_bits(round_to(values[i] / scale, form))


@register_jitable
def _column_tile(wide, start, count, tile, begin, end, form, power_of_two, grid, scales):  # type: ignore[no-untyped-def]
    """Tile `tile`, rows start : start + count and columns begin : end of the grid, of wide [count, end - begin]."""
    width = end - begin
    keys, scale = np.zeros(TILE, np.int32), scales[tile, begin:end]
    for r in range(count):
        row, some = wide[r, :width], keys[:width]
        for c in range(len(row)):
            some[c] = max(some[c], bits_of(row[c]) & np.int32(0x7FFFFFFF))
    for c in range(width):
        scale[c] = scale_of(float_of(keys[c]), form, power_of_two)
    for r in range(count):
        row, target = wide[r, :width], grid[start + r, begin:end]
        for c in range(len(row)):
            target[c] = bf16_bits(round_to(row[c] / scale[c], form))


@exact_kernel
def _columns(x, bounds, form, power_of_two, grid, scales):  # type: ignore[no-untyped-def]
    """Tiles 128x1 of x [R, C]: tile t holds rows bounds[t, 0] : bounds[t, 1]; scales [tiles, C]."""
    width = x.shape[1]
    blocks = (width + TILE - 1) // TILE
    for item in prange(len(bounds) * blocks):
        tile, begin = item // blocks, item % blocks * TILE
        start, stop, end = bounds[tile, 0], bounds[tile, 1], min(begin + TILE, width)
        wide = np.empty((TILE, TILE), np.float32)
        for r in range(stop - start):
            source, row = x[start + r, begin:end], wide[r]
            for c in range(len(source)):
                row[c] = load(source, c)
        _column_tile(wide, start, stop - start, tile, begin, end, form, power_of_two, grid, scales)


@exact_kernel
def _retile(codes, row_scales, kept_form, bounds, form, power_of_two, grid, scales):  # type: ignore[no-untyped-def]
    """As `_columns`, of what `_rows` has kept: codes [R, C] and row_scales [R, tiles of C]."""
    width = codes.shape[1]
    blocks = (width + TILE - 1) // TILE
    for item in prange(len(bounds) * blocks):
        tile, block = item // blocks, item % blocks
        start, stop, begin, end = bounds[tile, 0], bounds[tile, 1], block * TILE, min((block + 1) * TILE, width)
        wide = np.empty((TILE, TILE), np.float32)
        for r in range(stop - start):
            source, row, scale = codes[start + r, begin:end], wide[r], row_scales[start + r, block]
            for c in range(len(source)):
                row[c] = value_of(source[c], kept_form) * scale
        _column_tile(wide, start, stop - start, tile, begin, end, form, power_of_two, grid, scales)


@exact_kernel
def _blocks(w, form, power_of_two, grid, scales):  # type: ignore[no-untyped-def]
    """Tiles 128x128 of w [G, N, K]: grid of the same shape, scales [G, tiles of N, tiles of K]."""
    groups, down, across = scales.shape
    for item in prange(groups * down * across):
        g, i, j = item // (down * across), item // across % down, item % across
        top, bottom = i * TILE, min((i + 1) * TILE, w.shape[1])
        begin, end = j * TILE, min((j + 1) * TILE, w.shape[2])
        key = np.int32(0)
        for r in range(top, bottom):
            source = w[g, r, begin:end]
            for c in range(len(source)):
                key = max(key, bits_of(load(source, c)) & np.int32(0x7FFFFFFF))
        scale = scale_of(float_of(key), form, power_of_two)
        scales[g, i, j] = scale
        for r in range(top, bottom):
            source, target = w[g, r, begin:end], grid[g, r, begin:end]
            for c in range(len(source)):
                target[c] = bf16_bits(round_to(load(source, c) / scale, form))


@exact_kernel
def _keep_e5m6(x, form, power_of_two, is_given, packed, scales):  # type: ignore[no-untyped-def]
    """Tiles 1x128 of x [R, C] as packed codes [R, 12 ceil(C / 8)] (`floats.pack_e5m6`), and scales [R, tiles]."""
    columns = x.shape[1]
    for r in prange(x.shape[0]):
        codes = np.zeros(TILE, np.int32)
        for tile in range(scales.shape[1]):
            begin, end = tile * TILE, min((tile + 1) * TILE, columns)
            source, some = x[r, begin:end], codes[: end - begin]
            key = np.int32(0)
            for i in range(len(source)):
                key = max(key, bits_of(load(source, i)) & np.int32(0x7FFFFFFF))
            scale = scales[r, tile] if is_given else scale_of(float_of(key), form, power_of_two)
            scales[r, tile] = scale
            codes[end - begin :] = 0
            for i in range(len(source)):
                some[i] = code_of(load(source, i) / scale, form)
            for group in range((end - begin + 7) // 8):
                c, to = codes[8 * group : 8 * group + 8], packed[r, (begin // 8 + group) * 12 :]
                for word in range(3):
                    if word == 0:
                        value = c[0] << 20 | c[1] << 8 | c[2] >> 4
                    elif word == 1:
                        value = c[2] << 28 | c[3] << 16 | c[4] << 4 | c[5] >> 8
                    else:
                        value = c[5] << 24 | c[6] << 12 | c[7]
                    for byte in range(4):
                        to[4 * word + byte] = np.uint8(value >> (8 * byte) & 0xFF)


def quantize_rows(x: Tensor, quantization: Quantization, scale: Tensor | None = None) -> Quantized:
    """As `operands` has it; `scale` [R, tiles], where it is not the tiles' own."""
    return _in_rows(x, quantization, scale, _NO_CODES)


def quantize_and_keep(
    x: Tensor, quantization: Quantization, scale: Tensor | None = None
) -> tuple[Quantized, Quantized]:
    codes = torch.empty(x.shape, dtype=torch.uint8)
    rows = _in_rows(x, quantization, scale, array(codes))
    return rows, replace(rows, data=codes.view(TORCH_DTYPES.get(quantization.format, torch.uint8)))


def keep_e5m6(x: Tensor, quantization: Quantization, scale: Tensor | None = None) -> Quantized:
    packed, scales = torch.empty(len(x), 12 * _ceil(x.shape[1], 8), dtype=torch.uint8), _scales(x, scale)
    rule = form_of("e5m6"), quantization.power_of_two, scale is not None
    _keep_e5m6(array(x), *rule, array(packed), array(scales))
    return Quantized(data=packed, scale=scales, tile=ROW_TILE, format="e5m6", columns=x.shape[1])


def quantize_columns(x: Tensor, offsets: Sequence[int], quantization: Quantization) -> Quantized:
    bounds, _ = token_tiles(offsets)
    result = _empty(x.shape, (len(bounds), x.shape[1]), COLUMN_TILE, quantization)
    rule = form_of(quantization.format), quantization.power_of_two
    _columns(array(x), array(bounds), *rule, array(result.data), array(result.scale))
    return result


def retile(kept: Quantized, offsets: Sequence[int], quantization: Quantization) -> Quantized:
    bounds, _ = token_tiles(offsets)
    result = _empty(kept.shape, (len(bounds), kept.shape[1]), COLUMN_TILE, quantization)
    source = array(codes_of(kept)), array(kept.scale), form_of(kept.format)
    rule = form_of(quantization.format), quantization.power_of_two
    _retile(*source, array(bounds), *rule, array(result.data), array(result.scale))
    return result


def quantize_blocks(weight: Tensor, quantization: Quantization) -> Quantized:
    groups, rows, columns = weight.shape
    result = _empty(weight.shape, (groups, _ceil(rows, TILE), _ceil(columns, TILE)), BLOCK_TILE, quantization)
    rule = form_of(quantization.format), quantization.power_of_two
    _blocks(array(weight), *rule, array(result.data), array(result.scale))
    return result


def _in_rows(x: Tensor, quantization: Quantization, scale: Tensor | None, codes: np.ndarray) -> Quantized:
    values, scales = torch.empty(x.shape, dtype=torch.bfloat16), _scales(x, scale)
    rule = form_of(quantization.format), quantization.power_of_two, scale is not None
    _rows(array(x), *rule, array(values), codes, array(scales))
    return Quantized(data=values, scale=scales, tile=ROW_TILE, format=quantization.format)


def _scales(x: Tensor, given: Tensor | None) -> Tensor:
    """[R, tiles]: those given, or room for the tiles' own."""
    return torch.empty(len(x), _ceil(x.shape[1], TILE), dtype=torch.float32) if given is None else given


def _empty(
    shape: Sequence[int], scales: tuple[int, ...], tile: tuple[int, int], quantization: Quantization
) -> Quantized:
    values = torch.empty(shape, dtype=torch.bfloat16)
    scale = torch.empty(scales, dtype=torch.float32)
    return Quantized(data=values, scale=scale, tile=tile, format=quantization.format)


def _ceil(size: int, step: int) -> int:
    return -(-size // step)
