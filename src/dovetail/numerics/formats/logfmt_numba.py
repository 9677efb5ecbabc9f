"""CPU kernels of `logfmt`: extremes of tiles, and rounding to their grids.

They give the reference's results bit for bit.

Logarithms and powers are polynomials that vectorise, so they differ from the reference's in their last FP64 bits. That
changes a result only where it lies that near to a border, between two codes or two values of the output's format: both
ends of the error are computed, and rows where they fall apart are reported, for the reference to round.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from numba.extending import register_jitable

from dovetail.numerics.cpu.kernels import exact_kernel
from dovetail.numerics.cpu.scalars_numba import bits_of, float_of, load, store, wide_bits, wide_float
from dovetail.numerics.formats.quantized import TILE

# Relative for values; for log2, which reaches 150 where |x| is subnormal and has 2^-46 for its last bit then, absolute.
# All errors of kernel and reference together are some such bits.
ERROR = 2.0**-40


@register_jitable(forceinline=True)
def log2(x):  # type: ignore[no-untyped-def]
    """Of a positive normal FP64 number: 2 / ln 2 (s + s^3 / 3 + ...) for x = 2^e m, s = (m - 1) / (m + 1)."""
    bits = wide_bits(x) - 0x3FE6A09E667F3BCD  # m from sqrt(1/2) to sqrt(2)
    exponent = bits >> 52
    m = wide_float((bits & 0xFFFFFFFFFFFFF) + 0x3FE6A09E667F3BCD)
    s = (m - 1.0) / (m + 1.0)
    q = s * s
    p = 1.0 / 19.0
    p = p * q + 1.0 / 17.0
    p = p * q + 1.0 / 15.0
    p = p * q + 1.0 / 13.0
    p = p * q + 1.0 / 11.0
    p = p * q + 1.0 / 9.0
    p = p * q + 1.0 / 7.0
    p = p * q + 1.0 / 5.0
    p = p * q + 1.0 / 3.0
    return np.float64(exponent) + (p * q + 1.0) * s * 2.8853900817779268


@register_jitable(forceinline=True)
def exp2(x):  # type: ignore[no-untyped-def]
    """2^x for |x| < 1000: the Taylor series of e^(f ln 2), |f| at most 1/2."""
    n = np.floor(x + 0.5)
    f = (x - n) * 0.6931471805599453
    p = 1.0 / 6227020800.0
    p = p * f + 1.0 / 479001600.0
    p = p * f + 1.0 / 39916800.0
    p = p * f + 1.0 / 3628800.0
    p = p * f + 1.0 / 362880.0
    p = p * f + 1.0 / 40320.0
    p = p * f + 1.0 / 5040.0
    p = p * f + 1.0 / 720.0
    p = p * f + 1.0 / 120.0
    p = p * f + 1.0 / 24.0
    p = p * f + 1.0 / 6.0
    p = p * f + 0.5
    p = p * f + 1.0
    return (p * f + 1.0) * wide_float((np.int64(n) + 1023) << 52)


@exact_kernel
def extremes(x, largest, smallest):  # type: ignore[no-untyped-def]
    """Of |x| in tiles 1x128 of x [R, C]: [R, tiles] FP32; the smallest that is not zero, or 0."""
    width = x.shape[1]
    for r in prange(x.shape[0]):
        for tile in range(largest.shape[1]):
            source = x[r, tile * TILE : min((tile + 1) * TILE, width)]
            high, low = np.int32(0), np.int32(0x7FFFFFFF)
            for i in range(len(source)):
                key = np.int32(bits_of(load(source, i)) & np.int32(0x7FFFFFFF))
                high = max(high, key)
                low = min(low, key if key != np.int32(0) else np.int32(0x7FFFFFFF))
            largest[r, tile] = float_of(high)
            smallest[r, tile] = float_of(low if high != np.int32(0) else np.int32(0))


@exact_kernel
def round_tiles(x, minimum, least, step, middle, top_code, limit, out, is_doubtful):  # type: ignore[no-untyped-def]
    """x [R, C] on grids [R, tiles] FP64: least = 2^minimum, the step, and log2 of (1 + 2^step) / 2.

    `limit`: the largest number that out [R, C] may hold. is_doubtful [R] says where the reference is to round.
    """
    width = x.shape[1]
    for r in prange(x.shape[0]):
        doubts = np.int64(0)
        others = np.empty(TILE, out.dtype)
        for tile in range(least.shape[1]):
            begin, end = tile * TILE, min((tile + 1) * TILE, width)
            source, target, other = x[r, begin:end], out[r, begin:end], others[: end - begin]
            low, bottom, wide = least[r, tile], minimum[r, tile], step[r, tile]
            per_octave = 1.0 / wide if wide > 0.0 else 1.0
            border, error = 2.0 - middle[r, tile] * per_octave, ERROR * per_octave
            for i in range(len(source)):
                bits = bits_of(load(source, i))
                magnitude = np.float64(float_of(bits & np.int32(0x7FFFFFFF)))
                place = (log2(magnitude if magnitude > 0.0 else 1.0) - bottom) * per_octave + border
                code = min(max(np.floor(place + error), 1.0), top_code)
                before = min(max(np.floor(place - error), 1.0), top_code)
                number = min(low * exp2(wide * (code - 1.0)), limit)
                number = 0.0 if magnitude < 0.5 * low else number
                sign = bits & np.int32(-0x80000000)
                store(target, i, float_of(bits_of(np.float32(number * (1.0 + ERROR))) | sign))
                store(other, i, float_of(bits_of(np.float32(number * (1.0 - ERROR))) | sign))
                doubts += np.int64((code != before) | (target[i] != other[i]))
            if np.isnan(low):
                for i in range(len(source)):
                    store(target, i, np.float32(np.nan))
        is_doubtful[r] = doubts > 0
