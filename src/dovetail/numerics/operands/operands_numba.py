"""CPU kernels of `numerics.operands.operands`: tiles of 1x128, 128x1 and 128x128, in one pass over the matrix.

Values come out on the format's grid as BF16 bits, which products take (`scaled_numba`), and as the format's own
codes, which are what is kept for the backward pass. Scales are amax / the format's largest value, amax at least 1e-4,
or that rounded up to a power of two. A tile that holds NaN or infinity gets a NaN for its scale: training goes on to
see a loss that is not finite.

A format with m mantissa bits is rounded to by adding a power of two so large that the sum's last bit is the format's,
2^(23 - m) times the value's own or the smallest normal one's.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from numba import prange
from numba.extending import register_jitable

from dovetail.numerics.cpu.kernels import exact_kernel
from dovetail.numerics.cpu.scalars_numba import bits_of, float_of, load, store
from dovetail.numerics.formats.floats import float_format

TILE = 128
FLOOR = np.float32(1e-4)


class Form(NamedTuple):
    """A floating-point format as kernels take it: factors, for numba would shift in 64 bits."""

    largest: np.float32
    least: np.int32  # bits of the smallest normal number
    gap: np.int32  # mantissa bits that FP32 has more, as an exponent
    last: np.int32  # the last mantissa bit in FP32
    normal: np.int32  # code of the smallest normal number
    sign: np.int32  # its bit in a code


@functools.cache
def form_of(name: str) -> Form | None:
    """None for what kernels do not round to: what is not exact in BF16, or has FP32's range."""
    fmt = float_format(name)
    if fmt.mantissa_bits > 7 or fmt.exponent_bits > 7:
        return None
    least, more = np.float32(fmt.smallest_normal).view(np.int32), 23 - fmt.mantissa_bits
    integers = more << 23, 1 << more, 1 << fmt.mantissa_bits, fmt.nan_code + 1
    return Form(np.float32(fmt.max), least, *map(np.int32, integers))


@register_jitable(forceinline=True)
def scale_of(amax, form, power_of_two):  # type: ignore[no-untyped-def]
    scale = max(amax, FLOOR) / form.largest
    if not amax < np.float32(np.inf):
        return np.float32(np.nan)
    if power_of_two:
        bits = bits_of(np.float32(scale))
        exponent = (bits >> np.int32(23)) + np.int32((bits & np.int32(0x7FFFFF)) != 0)
        return float_of(exponent << np.int32(23))
    return np.float32(scale)


@register_jitable(forceinline=True)
def round_to(value, form):  # type: ignore[no-untyped-def]
    """To the nearest value of the format, ties to even, saturating; as FP32."""
    bits = bits_of(np.float32(value))
    magnitude = min(float_of(bits & np.int32(0x7FFFFFFF)), form.largest)
    exponent = max(np.int32(bits_of(magnitude) & np.int32(0x7F800000)), form.least)
    large = float_of(exponent + form.gap)
    return float_of(bits_of(np.float32(magnitude + large) - large) | (bits & np.int32(-0x80000000)))


@register_jitable(forceinline=True)
def code_of(value, form):  # type: ignore[no-untyped-def]
    """The code of the value that `round_to` gives."""
    bits = bits_of(np.float32(value))
    magnitude = min(float_of(bits & np.int32(0x7FFFFFFF)), form.largest)
    exponent = max(np.int32(bits_of(magnitude) & np.int32(0x7F800000)), form.least)
    large = np.int32(exponent + form.gap)
    count = bits_of(np.float32(magnitude + float_of(large))) - large
    below = (np.int32(exponent - form.least) >> np.int32(23)) * form.normal
    return np.int32((below + count) | ((bits >> np.int32(31)) & form.sign))


@register_jitable(forceinline=True)
def value_of(code, form):  # type: ignore[no-untyped-def]
    """FP32 value of a code that is neither NaN nor infinity."""
    magnitude = np.int32(np.int32(code) & (form.sign - np.int32(1)))
    bits = np.int32(magnitude * form.last + form.least - np.int32(0x800000))
    small = float_of(bits + np.int32(0x800000)) - float_of(form.least)
    value = float_of(bits) if bits >= form.least else np.float32(small)
    sign = np.int32(np.int32(code) & form.sign)
    return float_of(bits_of(value) | (np.int32(-0x80000000) if sign != np.int32(0) else np.int32(0)))


@register_jitable(forceinline=True)
def bf16_bits(value):  # type: ignore[no-untyped-def]
    """Of a value that is exact in BF16."""
    return np.uint16(np.uint32(bits_of(value)) >> np.uint32(16))


@exact_kernel
def rows(x, form, power_of_two, is_given, grid, codes, scales):  # type: ignore[no-untyped-def]
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
def columns(x, bounds, form, power_of_two, grid, scales):  # type: ignore[no-untyped-def]
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
def retile(codes, row_scales, kept_form, bounds, form, power_of_two, grid, scales):  # type: ignore[no-untyped-def]
    """As `columns`, of what `rows` has kept: codes [R, C] and row_scales [R, tiles of C]."""
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
def blocks(w, form, power_of_two, grid, scales):  # type: ignore[no-untyped-def]
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
def decode(codes, row_scales, form, out):  # type: ignore[no-untyped-def]
    """What `rows` has kept: out [R, C], FP32 or BF16 bits, rounded once."""
    width = codes.shape[1]
    for r in prange(codes.shape[0]):
        for block in range(row_scales.shape[1]):
            begin, end = block * TILE, min((block + 1) * TILE, width)
            source, target, scale = codes[r, begin:end], out[r, begin:end], row_scales[r, block]
            for c in range(len(source)):
                store(target, c, value_of(source[c], form) * scale)


@exact_kernel
def keep_e5m6(x, form, power_of_two, is_given, packed, scales):  # type: ignore[no-untyped-def]
    """Tiles 1x128 of x [R, C] as packed codes [R, 12 ceil(C / 8)] (`formats.pack_e5m6`).

    scales [R, tiles], which `is_given` says are there already.
    """
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


@exact_kernel
def decode_e5m6(packed, row_scales, form, out):  # type: ignore[no-untyped-def]
    """What `keep_e5m6` has kept: out [R, C], FP32 or BF16 bits."""
    width = out.shape[1]
    for r in prange(out.shape[0]):
        for group in range((width + 7) // 8):
            words = np.zeros(3, np.int64)
            for byte in range(12):
                words[byte // 4] |= np.int64(packed[r, group * 12 + byte]) << (8 * (byte % 4))
            high, low = words[0] << 32 | words[1], words[1] << 32 | words[2]
            scale = row_scales[r, group * 8 // TILE]
            target = out[r, group * 8 : min(group * 8 + 8, width)]
            for i in range(len(target)):
                code = high >> (52 - 12 * i) if i < 5 else low >> (84 - 12 * i)
                store(target, i, value_of(np.int32(code & 0xFFF), form) * scale)
