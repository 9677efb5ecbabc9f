"""Small floating-point formats: their numbers, and rounding to them.

Rounding is integer arithmetic on the bits of FP32.

A code of ExMy is a sign bit, x exponent bits e and y mantissa bits m, with bias = 2^(x-1) - 1:

    value = 2^(e - bias) (1 + m / 2^y)      normal, e > 0
    value = 2^(1 - bias) (m / 2^y)          subnormal, e = 0

With infinities (E5M2, E5M6, BF16) the top exponent holds inf at m = 0 and NaN elsewhere, as IEEE 754 has it. E4M3 has
none ("fn"): its top exponent holds numbers, and all bits one is the only NaN, so that it reaches 448 and not 240
[OCP 8-bit floating point; V3 §3.3].

Rounding is to nearest, ties to even, and saturates: what lies beyond the format, infinity included, becomes its
largest number, for torch's own casts differ by version there. NaN stays NaN. Scales are rounded the other way:
UE8M0 holds powers of two only, and a scale goes up to the next, so that nothing divided by it leaves the format.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from dovetail.config import near_matches

FP32_BIAS, FP32_MANTISSA = 127, 23
UE8M0_NAN = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatFormat:
    """ExMy with 2 to 8 exponent bits and 1 to 22 mantissa bits; every number of it is an FP32 number."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    has_infinity: bool

    def __post_init__(self) -> None:
        if not (2 <= self.exponent_bits <= 8 and 1 <= self.mantissa_bits < FP32_MANTISSA):
            raise ValueError(
                f"format {self.name!r} has {self.exponent_bits} exponent and {self.mantissa_bits} mantissa bits;"
                f" possible are 2 to 8 and 1 to {FP32_MANTISSA - 1}"
            )
        if self.exponent_bits == 8 and not self.has_infinity:
            raise ValueError(f"format {self.name!r}: with 8 exponent bits the top one is infinity, as in FP32")

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def max(self) -> float:
        """The largest number: 448 for E4M3, 57344 for E5M2, 65024 for E5M6."""
        if self.has_infinity:
            return (2 - 2.0**-self.mantissa_bits) * 2.0**self.bias
        return (2 - 2.0 ** (1 - self.mantissa_bits)) * 2.0 ** (self.bias + 1)

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def smallest_subnormal(self) -> float:
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def nan_code(self) -> int:
        """All bits below the sign: the NaN that `encode` writes; with infinities there are others."""
        return (1 << self.exponent_bits + self.mantissa_bits) - 1


E4M3 = FloatFormat(name="e4m3", exponent_bits=4, mantissa_bits=3, has_infinity=False)  # all operands [V3 §3.3]
E5M2 = FloatFormat(name="e5m2", exponent_bits=5, mantissa_bits=2, has_infinity=True)
E5M6 = FloatFormat(name="e5m6", exponent_bits=5, mantissa_bits=6, has_infinity=True)  # cached o_proj input [V3 §3.3]
E3M4 = FloatFormat(name="e3m4", exponent_bits=3, mantissa_bits=4, has_infinity=True)
BF16 = FloatFormat(name="bf16", exponent_bits=8, mantissa_bits=7, has_infinity=True)

FORMATS: Mapping[str, FloatFormat] = MappingProxyType({f.name: f for f in (E4M3, E5M2, E5M6, E3M4, BF16)})

_PATTERN = re.compile(r"e([0-9]{1,3})m([0-9]{1,3})(fn)?")


def float_format(name: str) -> FloatFormat:
    """The format called `name`: one of FORMATS, or any "eXmY" (IEEE; with "fn" behind it without infinities).

    Case does not matter, and "e4m3" is "e4m3fn". Raises ValueError with near matches for an unknown name, with the
    possible numbers of bits for "eXmY" out of range.
    """
    lower = name.lower()
    known = FORMATS.get("e4m3" if lower == "e4m3fn" else lower)
    if known is not None:
        return known
    parts = _PATTERN.fullmatch(lower)
    if parts is None:
        raise ValueError(f"unknown format {name!r}; {near_matches(lower, FORMATS)}; any eXmY, such as e5m6, is one")
    return FloatFormat(
        name=lower, exponent_bits=int(parts[1]), mantissa_bits=int(parts[2]), has_infinity=parts[3] is None
    )


def round_to(x: Tensor, fmt: FloatFormat) -> Tensor:
    """FP32 `x` with every element on the grid of `fmt`, FP32."""
    return decode(encode(x, fmt), fmt)


def encode(x: Tensor, fmt: FloatFormat) -> Tensor:
    """Codes of FP32 `x`: uint8 up to 8 bits, uint16 up to 16, else int32. ValueError for another dtype."""
    if x.dtype != torch.float32:
        raise ValueError(f"encode takes FP32, not {x.dtype} (shape {list(x.shape)}); convert it first")
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    is_nan = magnitude > 0x7F800000
    magnitude = magnitude.clamp(max=_bits(fmt.max))
    # Normal numbers: add half of what is cut, less one unless the last kept bit is odd; a carry moves the exponent.
    shift = FP32_MANTISSA - fmt.mantissa_bits
    half = (1 << shift - 1) - 1 + ((magnitude >> shift) & 1)
    normal = (magnitude + half >> shift) - (FP32_BIAS - fmt.bias << fmt.mantissa_bits)
    # Subnormal ones: an FP32 sum whose last bit is worth the smallest subnormal rounds for us.
    anchor = fmt.smallest_subnormal * 2.0**FP32_MANTISSA
    subnormal = (magnitude.view(torch.float32) + anchor).view(torch.int32) - _bits(anchor)
    code = torch.where(magnitude < _bits(fmt.smallest_normal), subnormal, normal)
    code = code.masked_fill(is_nan, fmt.nan_code) | (((bits >> 31) & 1) << fmt.bits - 1)
    return code.to(_code_dtype(fmt.bits))


def decode(codes: Tensor, fmt: FloatFormat) -> Tensor:
    """FP32 numbers of integer `codes`, exact."""
    code = codes.to(torch.int32)
    magnitude = code & fmt.nan_code
    shift = FP32_MANTISSA - fmt.mantissa_bits
    normal = ((magnitude << shift) + (FP32_BIAS - fmt.bias << FP32_MANTISSA)).view(torch.float32)
    subnormal = magnitude.to(torch.float32) * fmt.smallest_subnormal
    value = torch.where(magnitude < 1 << fmt.mantissa_bits, subnormal, normal)
    if fmt.has_infinity:
        infinity = fmt.nan_code >> fmt.mantissa_bits << fmt.mantissa_bits
        value = value.masked_fill(magnitude == infinity, torch.inf).masked_fill(magnitude > infinity, torch.nan)
    else:
        value = value.masked_fill(magnitude == fmt.nan_code, torch.nan)
    return torch.where((code >> fmt.bits - 1) & 1 == 1, -value, value)


def encode_ue8m0(scale: Tensor) -> Tensor:
    """Positive FP32 scales -> uint8 exponents of the next power of two *up*, kept in 1..254 [DeepGEMM].

    2^127 at most, so what is above it goes down to it; inf and NaN are 255, the format's NaN.
    """
    bits = scale.view(torch.int32)
    exponent = (bits >> FP32_MANTISSA) & 0xFF
    rounded = (exponent + ((bits & 0x7FFFFF) != 0)).clamp(1, 254)
    return rounded.masked_fill(exponent == 255, UE8M0_NAN).to(torch.uint8)


def decode_ue8m0(codes: Tensor) -> Tensor:
    """2^(code - 127), FP32; 255 is NaN."""
    code = codes.to(torch.int32)
    powers = (code << FP32_MANTISSA).masked_fill(code == 0, 0x400000)  # 2^-127 is subnormal
    return powers.view(torch.float32).masked_fill(code == UE8M0_NAN, torch.nan)


def pack_e5m6(codes: Tensor) -> Tensor:
    """12-bit codes [..., 8n] -> uint8 [..., 12n].

    Eight codes fill three 32-bit words from the top bit down, the words stored little-endian, as DeepSeek's own
    kernels lay them out [TileKernels per_token_cast_to_e5m6]. ValueError where the last dimension is no multiple of 8.
    """
    groups, rest = divmod(codes.shape[-1], 8)
    if rest:
        raise ValueError(f"E5M6 is packed by eights; shape {list(codes.shape)} has {codes.shape[-1]} columns; pad them")
    a, b, c, d, e, f, g, h = (codes.to(torch.int32) & 0xFFF).unflatten(-1, (groups, 8)).unbind(-1)
    words = (a << 20 | b << 8 | c >> 4, c << 28 | d << 16 | e << 4 | f >> 8, f << 24 | g << 12 | h)
    stored = [word >> shift & 0xFF for word in words for shift in (0, 8, 16, 24)]
    return torch.stack(stored, dim=-1).to(torch.uint8).flatten(-2)


def unpack_e5m6(packed: Tensor) -> Tensor:
    """uint8 [..., 12n] -> 12-bit codes [..., 8n], uint16: undoes `pack_e5m6`. ValueError where 12 does not divide."""
    groups, rest = divmod(packed.shape[-1], 12)
    if rest or packed.dtype != torch.uint8:
        raise ValueError(f"packed E5M6 is uint8 [..., 12n], not {packed.dtype} {list(packed.shape)}")
    stored = packed.to(torch.int32).unflatten(-1, (groups, 3, 4))
    x, y, z = (stored[..., 0] | stored[..., 1] << 8 | stored[..., 2] << 16 | stored[..., 3] << 24).unbind(-1)
    codes = (x >> 20, x >> 8, x << 4 | y >> 28 & 0xF, y >> 16, y >> 4, y << 8 | z >> 24 & 0xFF, z >> 12, z)
    return (torch.stack(codes, dim=-1) & 0xFFF).to(torch.uint16).flatten(-2)


def _bits(value: float) -> int:
    """The FP32 bits of `value`."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def _code_dtype(bits: int) -> torch.dtype:
    return torch.uint8 if bits <= 8 else torch.uint16 if bits <= 16 else torch.int32
