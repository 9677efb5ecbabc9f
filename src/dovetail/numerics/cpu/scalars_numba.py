"""Scalar building blocks of the CPU kernels: BF16 load and store, an exponential, and a row's scaling.

`load` widens FP32 and BF16 (held as uint16) to FP32 exactly; `store` rounds to nearest even, as torch's own cast does.

`exp` is the classic range reduction x = n ln 2 + r with a degree-6 polynomial in r, written without a call so
that LLVM turns the loop around it into vector code; its relative error is below 2e-7 (2 units in the last
place of FP32) for x in [-87, 88], and it clamps outside.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic, overload, register_jitable

EXP_ERROR = 2e-7  # relative error of `exp` below, over [-87, 88]


def _bits_as(source: Any, target: Any) -> Any:
    """A function of compiled code that reads the bits of one type as another of the same size."""

    @intrinsic
    def cast(typing_context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(target))

        return target(source), generate

    return cast


float_of, bits_of = _bits_as(types.int32, types.float32), _bits_as(types.float32, types.int32)
wide_float, wide_bits = _bits_as(types.int64, types.float64), _bits_as(types.float64, types.int64)


def load(row, index):  # type: ignore[no-untyped-def]
    """row[index] as FP32; kernels only."""
    raise AssertionError("compiled code only")


def store(row, index, value):  # type: ignore[no-untyped-def]
    """row[index] = value, rounded to the array's format; kernels only."""
    raise AssertionError("compiled code only")


@overload(load, inline="always")
def _load(row, index):  # type: ignore[no-untyped-def]  # numba compares the signatures word for word
    if row.dtype == types.uint16:
        return lambda row, index: float_of(np.int32(row[index]) << np.int32(16))
    return lambda row, index: row[index]


@register_jitable(forceinline=True)
def round_bf16(value: float) -> int:
    """The 16 bits of `value` rounded to nearest even; NaN stays a NaN."""
    bits = bits_of(np.float32(value))
    rounded = (bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16)
    return np.uint16(rounded) if (bits & np.int32(0x7FFFFFFF)) <= np.int32(0x7F800000) else np.uint16(0x7FC0)


@overload(store, inline="always")
def _store(row, index, value):  # type: ignore[no-untyped-def]
    if row.dtype == types.uint16:

        def store_bf16(row, index, value):  # type: ignore[no-untyped-def]
            row[index] = round_bf16(value)

        return store_bf16

    def store_float(row, index, value):  # type: ignore[no-untyped-def]
        row[index] = value

    return store_float


@register_jitable
def copy(source, to):  # type: ignore[no-untyped-def]
    """to[i] = source[i] of two rows that do not overlap; numba's to[:] = source takes several times as long to compile,
    since it looks whether they do."""
    for i in range(len(to)):
        to[i] = source[i]


@register_jitable(forceinline=True)
def exp(x: float) -> float:
    """e**x in FP32, for kernels."""
    clamped = min(max(np.float32(x), np.float32(-87.3)), np.float32(88.3))
    # Adding 1.5 * 2**23 leaves the nearest integer in the low bits; reading it as bits keeps the compiler from
    # cancelling the addition.
    shifted = np.float32(clamped * np.float32(1.4426950408889634)) + np.float32(12582912.0)
    n = bits_of(shifted) - np.int32(0x4B400000)
    nf = np.float32(n)
    r = np.float32(clamped - nf * np.float32(0.693359375)) + nf * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    value = (p * r) * r + r + np.float32(1.0)
    result = value * float_of((n + np.int32(127)) << np.int32(23))
    return result if x == x else x  # NaN in, NaN out


@register_jitable(forceinline=True)
def ordered(value: float) -> int:
    """An int32 that orders as FP32 does (a NaN above or below all): integer maxima vectorise, float maxima do not."""
    bits = bits_of(np.float32(value))
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@register_jitable(forceinline=True)
def from_ordered(key: int) -> float:
    return float_of(key ^ ((key >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@register_jitable(forceinline=True)
def sigmoid(x: float) -> float:
    return np.float32(1.0) / (np.float32(1.0) + exp(-x))


@register_jitable(fastmath=False)
def scale_row(x, factor, weight, out):  # type: ignore[no-untyped-def]
    """out[i] = x[i] * factor * weight[i], in this order.

    LLVM compiles a loop that stores twice, for arrays that may overlap and for others. With fast arithmetic the two
    may group these factors in different ways, and which of them runs depends on where the arrays are.
    """
    for i in range(len(weight)):
        store(out, i, load(x, i) * factor * weight[i])
