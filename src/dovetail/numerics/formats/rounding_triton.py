"""Building blocks of the GPU kernels: tile scales, codes of small formats, BF16, division.

Triton's interpreter, which runs kernels on a CPU, casts FP32 to E4M3 wrongly (it loses the carry: 124.3 becomes 64),
truncates to BF16 and garbles subnormal BF16. Here rounding is integer arithmetic, so that a kernel gives the same bits
interpreted and compiled. Where the GPU rounds in one instruction (`Rounding.casts`) that is taken: the same function.

A format with m mantissa bits and bias b is rounded to by adding a number so large that its last bit is the format's:

    e    = max(exponent of |x|, 1 - b)
    n    = bits(|x| + 2^(e + 23 - m)) - bits(2^(e + 23 - m))      a count of 2^(e - m), from 2^m on where normal
    code = ((e + b - 1) << m) + n                                  a carry reaches the exponent by itself

Imported by callers with a CUDA device or with TRITON_INTERPRET=1 only: dovetail does not depend on Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dovetail.numerics.capability import FP8, FP8_CAPABILITY
from dovetail.numerics.formats.floats import FloatFormat
from dovetail.numerics.formats.floats import encode as encode_reference
from dovetail.numerics.formats.quantized import AMAX_FLOOR

LARGEST_FORMAT = 2.0**16  # formats that reach it are not rounded to
_FLOOR = tl.constexpr(AMAX_FLOOR)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """How a kernel quantises: a format's constants, the rule for scales, and what the device can do."""

    mantissa_bits: int
    bias: int
    sign: int  # the sign's bit in a code
    largest: float
    largest_code: int
    power_of_two: bool
    fused: bool  # fused multiply-adds instead of a division per element
    casts: bool  # rounding in one instruction


def rounding(form: FloatFormat, power_of_two: bool, device: torch.device) -> Rounding:
    """ValueError for a format that kernels do not round to."""
    if form.max >= LARGEST_FORMAT:
        raise ValueError(
            f"{form.name} reaches {form.max:g}: kernels round to formats below 65536, as e4m3 and e5m6 are"
        )
    largest = int(encode_reference(torch.tensor([form.max]), form))
    is_compiled = device.type == "cuda"
    return Rounding(
        mantissa_bits=form.mantissa_bits,
        bias=form.bias,
        sign=form.nan_code + 1,
        largest=form.max,
        largest_code=largest,
        power_of_two=power_of_two,
        fused=is_compiled,
        casts=is_compiled and form.name in FP8 and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY,
    )


@triton.jit
def widen(x):  # type: ignore[no-untyped-def]
    """FP32 of a loaded block, exactly."""
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def narrow(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """FP32 rounded to nearest even to `dtype` (BF16, else a cast); NaN stays NaN."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
        value = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        value = x.to(dtype)
    return value


@triton.jit
def magnitude_bits(x):  # type: ignore[no-untyped-def]
    """|x| as an int32 that orders as |x| does, NaN above infinity: its maximum forgets no NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def tile_scale(amax_bits, ROUNDING: tl.constexpr):  # type: ignore[no-untyped-def]
    """The multiplier that `quantize` stores: max(amax, floor) / largest, on request the next power of two."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    amax = tl.where(amax < _FLOOR, _FLOOR, amax)  # a NaN stays
    scale = tl.div_rn(amax, tl.full(amax.shape, ROUNDING.largest, tl.float32))
    if ROUNDING.power_of_two:
        bits = scale.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
        exponent = tl.minimum(tl.maximum(exponent, 1), 254)  # those UE8M0 has
        rounded = (exponent << 23).to(tl.float32, bitcast=True)
        scale = tl.where(bits < 0x7F800000, rounded, scale)
    return scale


@triton.jit
def divide(x, scale, ROUNDING: tl.constexpr):  # type: ignore[no-untyped-def]
    """x / scale in one rounding, one scale for many x (the shapes broadcast).

    `fused` spares the GPU a division per element: with r = 1 / scale rounded to nearest, two corrections of x r by its
    exact remainder give the quotient rounded to nearest [Markstein 1990]. Wrong only where the remainder underflows,
    |x| < 2^-100, whose quotient by a scale of at least 2^-30 is zero in every format here.
    """
    if ROUNDING.fused:
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        quotient = x * inverse
        if not ROUNDING.power_of_two:
            once = tl.fma(tl.fma(-quotient, scale, x), inverse, quotient)
            twice = tl.fma(tl.fma(-once, scale, x), inverse, once)
            # a tile with infinity: finite / inf = 0, as product with the inverse
            quotient = tl.where(scale < float("inf"), twice, quotient)
    else:
        quotient = tl.div_rn(x, scale)
    return quotient


@triton.jit
def encode(x, ROUNDING: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes of FP32 x rounded to nearest even, saturating, as uint8 (uint16 for wider formats)."""
    if ROUNDING.casts and ROUNDING.mantissa_bits == 3:
        code = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    elif ROUNDING.casts:
        code = x.to(tl.float8e5).to(tl.uint8, bitcast=True)
    else:
        magnitude = magnitude_bits(x)
        bounded = tl.minimum(magnitude, 0x47800000)  # 2^16: above what any of the formats holds
        exponent = tl.maximum(bounded >> 23, 128 - ROUNDING.bias)
        magic = (exponent + (23 - ROUNDING.mantissa_bits)) << 23
        shifted = bounded.to(tl.float32, bitcast=True) + magic.to(tl.float32, bitcast=True)
        count = shifted.to(tl.int32, bitcast=True) - magic
        code = ((exponent + (ROUNDING.bias - 128)) << ROUNDING.mantissa_bits) + count
        code = tl.minimum(code, ROUNDING.largest_code)
        code = tl.where(magnitude > 0x7F800000, ROUNDING.sign - 1, code)
        code |= tl.where(x.to(tl.int32, bitcast=True) < 0, ROUNDING.sign, 0)
        code = code.to(tl.uint8 if ROUNDING.sign <= 128 else tl.uint16)
    return code


@triton.jit
def quantize_tiles(  # type: ignore[no-untyped-def]
    values,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """FP32 values of DOWN x ACROSS tiles -> their codes, of the same shape, and scales [DOWN, ACROSS]."""
    tiles = tl.reshape(values, (DOWN, TILE_ROWS, ACROSS, TILE_COLUMNS))
    amax = tl.max(tl.max(magnitude_bits(tiles), axis=3), axis=1)
    scale = tile_scale(amax, ROUNDING)
    codes = encode(divide(tiles, scale[:, None, :, None], ROUNDING), ROUNDING)
    return tl.reshape(codes, (DOWN * TILE_ROWS, ACROSS * TILE_COLUMNS)), scale
