"""Building blocks of the CPU kernels that quantise: scales of tiles, values and codes.

Scales are amax / the format's largest value, amax at least 1e-4, or that rounded up to a power of two. A tile that
holds NaN or infinity gets a NaN for its scale: training goes on to see a loss that is not finite.

A format with m mantissa bits is rounded to by adding a power of two so large that the sum's last bit is the format's,
2^(23 - m) times the value's own or the smallest normal one's.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from dovetail.numerics.cpu.scalars_numba import bits_of, float_of
from dovetail.numerics.formats.floats import float_format
from dovetail.numerics.formats.quantized import AMAX_FLOOR

FLOOR = np.float32(AMAX_FLOOR)


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
    """FP32 value of a code; beyond the format's largest number lie infinity, a power of two, and NaN."""
    magnitude = np.int32(np.int32(code) & (form.sign - np.int32(1)))
    bits = np.int32(magnitude * form.last + form.least - np.int32(0x800000))
    small = float_of(bits + np.int32(0x800000)) - float_of(form.least)
    value = float_of(bits) if bits >= form.least else np.float32(small)
    other = np.float32(np.inf) if (bits & np.int32(0x7FFFFF)) == np.int32(0) else np.float32(np.nan)
    value = value if value <= form.largest else other
    sign = np.int32(np.int32(code) & form.sign)
    return float_of(bits_of(value) | (np.int32(-0x80000000) if sign != np.int32(0) else np.int32(0)))


@register_jitable(forceinline=True)
def bf16_bits(value):  # type: ignore[no-untyped-def]
    """Of a value that is exact in BF16."""
    return np.uint16(np.uint32(bits_of(value)) >> np.uint32(16))
