"""CPU kernels of `numerics.quantize` for E4M3: tiles of 1x128, 128x1 and 128x128, in one pass over the matrix.

Values come out on the E4M3 grid as BF16 bits, which products take (`scaled_gemm_numba`), and as the format's own codes,
which are what is kept for the backward pass. Scales are amax / 448, amax at least 1e-4, or that rounded up to a power
of two. A tile that holds NaN or infinity gets a NaN for its scale: training goes on to see a loss that is not finite.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from numba.extending import register_jitable

from dovetail.numerics.cpu_numba import bits_of, exact_kernel, float_of, load, store

TILE = 128
LARGEST = np.float32(448.0)
LARGEST_E5M6 = np.float32(65024.0)
FLOOR = np.float32(1e-4)
ROUND_TO_SUBNORMAL = np.float32(2.0**14)  # adding it leaves multiples of 2^-9, E4M3's smallest step
SMALLEST_NORMAL = np.float32(2.0**-6)


@register_jitable(forceinline=True)
def scale_of(amax, power_of_two, largest=LARGEST):  # type: ignore[no-untyped-def]
    scale = max(amax, FLOOR) / largest
    if not amax < np.float32(np.inf):
        return np.float32(np.nan)
    if power_of_two:
        bits = bits_of(np.float32(scale))
        exponent = (bits >> np.int32(23)) + np.int32((bits & np.int32(0x7FFFFF)) != 0)
        return float_of(exponent << np.int32(23))
    return np.float32(scale)


@register_jitable(forceinline=True)
def round_e4m3(value):  # type: ignore[no-untyped-def]
    """To the nearest E4M3 value, ties to even, saturating; as FP32."""
    bits = bits_of(np.float32(value))
    magnitude = min(float_of(bits & np.int32(0x7FFFFFFF)), LARGEST)
    key = bits_of(magnitude)
    normal = (key + np.int32(0x7FFFF) + ((key >> np.int32(20)) & np.int32(1))) & np.int32(-0x100000)
    # In integers: the compiler may cancel a constant that is added and taken away again.
    steps = bits_of(magnitude + ROUND_TO_SUBNORMAL) - bits_of(ROUND_TO_SUBNORMAL)
    small = bits_of(np.float32(steps) * np.float32(1.0 / 512.0))
    rounded = normal if magnitude >= SMALLEST_NORMAL else small
    return float_of(rounded | (bits & np.int32(-0x80000000)))


@register_jitable(forceinline=True)
def code_of(rounded):  # type: ignore[no-untyped-def]
    """The E4M3 code of a value on the grid."""
    magnitude = bits_of(abs(rounded))
    normal = (magnitude >> np.int32(20)) - np.int32(960)
    small = np.int32(abs(rounded) * np.float32(512.0))
    sign = (bits_of(rounded) >> np.int32(24)) & np.int32(0x80)
    return np.uint8((normal if abs(rounded) >= SMALLEST_NORMAL else small) | sign)


@register_jitable(forceinline=True)
def value_of(code):  # type: ignore[no-untyped-def]
    """FP32 value of an E4M3 code that is no NaN."""
    magnitude = np.int32(code) & np.int32(0x7F)
    normal = float_of((magnitude + np.int32(960)) << np.int32(20))
    value = normal if magnitude >= np.int32(8) else np.float32(magnitude) * np.float32(1.0 / 512.0)
    return float_of(bits_of(value) | ((np.int32(code) & np.int32(0x80)) << np.int32(24)))


@exact_kernel
def rows(x, power_of_two, grid, codes, scales):  # type: ignore[no-untyped-def]
    """Tiles 1x128 of x [R, C] BF16 bits: grid [R, C] BF16 bits, codes [R, C] (or none of them), scales [R, tiles]."""
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
            scale = scale_of(float_of(amax), power_of_two)
            scales[r, tile] = scale
            for i in range(len(source)):
                target[i] = np.uint16(np.uint32(bits_of(round_e4m3(values[i] / scale))) >> np.uint32(16))
            if len(codes):
                kept = codes[r, begin:end]
                for i in range(len(source)):
                    kept[i] = code_of(float_of(np.int32(target[i]) << np.int32(16)))


@register_jitable
def _column_tile(wide, start, count, tile, begin, end, power_of_two, grid, scales):  # type: ignore[no-untyped-def]
    """Tile `tile`, rows start : start + count and columns begin : end of the grid, of wide [count, end - begin]."""
    width = end - begin
    keys, scale = np.zeros(TILE, np.int32), scales[tile, begin:end]
    for r in range(count):
        row, some = wide[r, :width], keys[:width]
        for c in range(len(row)):
            some[c] = max(some[c], bits_of(row[c]) & np.int32(0x7FFFFFFF))
    for c in range(width):
        scale[c] = scale_of(float_of(keys[c]), power_of_two)
    for r in range(count):
        row, target = wide[r, :width], grid[start + r, begin:end]
        for c in range(len(row)):
            target[c] = np.uint16(np.uint32(bits_of(round_e4m3(row[c] / scale[c]))) >> np.uint32(16))


@exact_kernel
def columns(x, bounds, power_of_two, grid, scales):  # type: ignore[no-untyped-def]
    """Tiles 128x1 of x [R, C] BF16 bits: tile t holds rows bounds[t, 0] : bounds[t, 1]; scales [tiles, C]."""
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
        _column_tile(wide, start, stop - start, tile, begin, end, power_of_two, grid, scales)


@exact_kernel
def retile(codes, row_scales, bounds, power_of_two, grid, scales):  # type: ignore[no-untyped-def]
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
                row[c] = value_of(source[c]) * scale
        _column_tile(wide, start, stop - start, tile, begin, end, power_of_two, grid, scales)


@exact_kernel
def blocks(w, power_of_two, grid, scales):  # type: ignore[no-untyped-def]
    """Tiles 128x128 of w [G, N, K] BF16 bits: grid of the same shape, scales [G, tiles of N, tiles of K]."""
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
        scale = scale_of(float_of(key), power_of_two)
        scales[g, i, j] = scale
        for r in range(top, bottom):
            source, target = w[g, r, begin:end], grid[g, r, begin:end]
            for c in range(len(source)):
                target[c] = np.uint16(np.uint32(bits_of(round_e4m3(load(source, c) / scale))) >> np.uint32(16))


@exact_kernel
def decode(codes, row_scales, out):  # type: ignore[no-untyped-def]
    """What `rows` has kept, as BF16 bits again, rounded once: out [R, C]."""
    width = codes.shape[1]
    for r in prange(codes.shape[0]):
        for block in range(row_scales.shape[1]):
            begin, end = block * TILE, min((block + 1) * TILE, width)
            source, target, scale = codes[r, begin:end], out[r, begin:end], row_scales[r, block]
            for c in range(len(source)):
                store(target, c, value_of(source[c]) * scale)


@register_jitable(forceinline=True)
def e5m6_of(value):  # type: ignore[no-untyped-def]
    """The E5M6 code of a value, rounded to nearest, ties to even, saturating."""
    bits = bits_of(np.float32(value))
    magnitude = min(float_of(bits & np.int32(0x7FFFFFFF)), LARGEST_E5M6)
    key = bits_of(magnitude)
    normal = ((key + np.int32(0xFFFF) + ((key >> np.int32(17)) & np.int32(1))) >> np.int32(17)) - np.int32(7168)
    small = bits_of(magnitude + np.float32(8.0)) - np.int32(0x41000000)  # 8 + multiples of 2^-20, the smallest step
    code = normal if magnitude >= np.float32(2.0**-14) else small
    return code | ((bits >> np.int32(20)) & np.int32(0x800))


@register_jitable(forceinline=True)
def value_of_e5m6(code):  # type: ignore[no-untyped-def]
    magnitude = code & np.int32(0x7FF)
    normal = float_of((magnitude + np.int32(7168)) << np.int32(17))
    value = normal if magnitude >= np.int32(64) else np.float32(magnitude) * np.float32(2.0**-20)
    return float_of(bits_of(value) | ((code & np.int32(0x800)) << np.int32(20)))


@exact_kernel
def keep_e5m6(x, power_of_two, packed, scales):  # type: ignore[no-untyped-def]
    """Tiles 1x128 of x [R, C] BF16 bits as packed codes [R, 12 ceil(C / 8)] (`formats.pack_e5m6`).

    scales [R, tiles].
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
            scale = scale_of(float_of(key), power_of_two, LARGEST_E5M6)
            scales[r, tile] = scale
            codes[end - begin :] = 0
            for i in range(len(source)):
                some[i] = e5m6_of(load(source, i) / scale)
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
def decode_e5m6(packed, row_scales, out):  # type: ignore[no-untyped-def]
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
                store(target, i, value_of_e5m6(np.int32(code & 0xFFF)) * scale)
