"""Small formats against torch's own types where it has them, else against a table of their numbers by definition."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dovetail.numerics.formats.floats import (
    FORMATS,
    FloatFormat,
    decode,
    decode_ue8m0,
    encode,
    encode_ue8m0,
    float_format,
    pack_e5m6,
    round_to,
    unpack_e5m6,
)

Draw = Callable[..., Tensor]
TORCH_TYPES = {
    "e4m3": (torch.float8_e4m3fn, torch.uint8),
    "e5m2": (torch.float8_e5m2, torch.uint8),
    "e5m10": (torch.float16, torch.uint16),
    "bf16": (torch.bfloat16, torch.uint16),
}
NAMES = ["e4m3", "e5m2", "e5m6", "e3m4", "bf16", "e2m1", "e2m3", "e4m7", "e7m8", "e4m3fn", "e3m2fn", "e8m10", "e5m10"]


def from_bits(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def fp32_sweep() -> Tensor:
    """Every sign, exponent and leading 7 mantissa bits, each with tails on, just under and just over the ties."""
    heads = torch.arange(1 << 16, dtype=torch.int64) << 16
    tails = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return from_bits((heads[:, None] | tails).flatten())


def numbers_by_definition(fmt: FloatFormat) -> list[float]:
    """The numbers from zero up whose codes are 0, 1, 2, ..., in exact arithmetic."""
    values = []
    top = 2**fmt.exponent_bits - (1 if fmt.has_infinity else 0)
    for exponent in range(top):
        for mantissa in range(2**fmt.mantissa_bits):
            fraction = mantissa / 2**fmt.mantissa_bits
            values.append(math.ldexp(fraction + (exponent > 0), max(exponent, 1) - fmt.bias))
    return values if fmt.has_infinity else values[:-1]  # all ones is NaN


def nearest_by_definition(x: np.ndarray, fmt: FloatFormat) -> np.ndarray:
    """FP64 search among the format's numbers: nearest, ties to the even code, saturating."""
    table = np.array(numbers_by_definition(fmt))
    above = np.minimum(np.searchsorted(table, np.abs(x)), len(table) - 1)
    below = np.maximum(above - 1, 0)
    left, right = np.abs(x) - table[below], table[above] - np.abs(x)
    code = np.where((left < right) | ((left == right) & (below % 2 == 0)), below, above)
    return np.copysign(table[np.where(np.abs(x) >= table[-1], len(table) - 1, code)], x)


@pytest.mark.parametrize("name", TORCH_TYPES)
def test_every_code_is_that_of_torch(name: str) -> None:
    dtype, integer = TORCH_TYPES[name]
    fmt = float_format(name)
    codes = torch.arange(1 << fmt.bits).to(integer)
    ours, theirs = decode(codes, fmt), codes.view(dtype).float()
    is_nan = theirs.isnan()
    assert torch.equal(ours.isnan(), is_nan)
    assert torch.equal(ours[~is_nan].view(torch.int32), theirs[~is_nan].view(torch.int32))  # -0 is not 0
    is_number = theirs.isfinite()
    assert encode(ours, fmt).dtype == integer
    assert torch.equal(encode(ours, fmt)[is_number], codes[is_number])


@pytest.mark.parametrize("name", TORCH_TYPES)
def test_rounding_is_bitwise_that_of_torch(name: str, draw: Draw) -> None:
    dtype, integer = TORCH_TYPES[name]
    fmt = float_format(name)
    x = torch.cat([fp32_sweep(), draw(100_000), draw(100_000) * 2.0 ** (1 - fmt.bias)])
    theirs = x.clamp(-fmt.max, fmt.max).to(dtype).view(integer)  # what lies beyond depends on torch's version
    ours = encode(x, fmt)
    is_nan = x.isnan()
    assert torch.equal(ours[~is_nan], theirs[~is_nan])
    assert decode(ours[is_nan], fmt).isnan().all()
    if fmt.bits == 8:
        assert torch.equal(ours[is_nan], theirs[is_nan])


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_the_definition(name: str) -> None:
    fmt = float_format(name)
    table = numbers_by_definition(fmt)
    codes = torch.arange(len(table))
    assert decode(codes, fmt).tolist() == table
    assert torch.equal(encode(torch.tensor(table), fmt).long(), codes)
    assert fmt.max == table[-1]
    assert fmt.smallest_subnormal == table[1]
    assert fmt.smallest_normal == table[2**fmt.mantissa_bits]


@pytest.mark.parametrize("name", NAMES)
def test_rounding_is_the_search_for_the_nearest_number(name: str, draw: Draw) -> None:
    fmt = float_format(name)
    table = torch.tensor(numbers_by_definition(fmt), dtype=torch.float64)
    ties = ((table[1:] + table[:-1]) / 2).float()[:4096]
    around = torch.cat([ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)])
    spread = draw(4000) * torch.exp2(4 * draw(4000))
    x = torch.cat([around, -around, spread, spread * fmt.max, spread * fmt.smallest_normal])
    x = torch.cat([x[x.isfinite()], torch.tensor([0.0, -0.0, fmt.max, -fmt.max, 3.4e38, -3.4e38])])
    expected = torch.from_numpy(nearest_by_definition(x.double().numpy(), fmt)).float()
    assert torch.equal(round_to(x, fmt).view(torch.int32), expected.view(torch.int32))


def test_limits_of_the_formats_in_use() -> None:
    limits = {name: (fmt.bits, fmt.bias, fmt.max, fmt.smallest_subnormal) for name, fmt in FORMATS.items()}
    assert limits["e4m3"] == (8, 7, 448.0, 2.0**-9)
    assert limits["e5m2"] == (8, 15, 57344.0, 2.0**-16)
    assert limits["e5m6"] == (12, 15, 65024.0, 2.0**-20)
    assert limits["e3m4"] == (8, 3, 15.5, 2.0**-6)
    assert limits["bf16"] == (16, 127, torch.finfo(torch.bfloat16).max, 2.0**-133)


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (448.0, 448.0),
        (464.0, 448.0),  # half of the step beyond the largest number
        (465.0, 448.0),
        (1e9, 448.0),
        (math.inf, 448.0),
        (432.0, 448.0),  # a tie: 416 is odd
        (400.0, 384.0),  # a tie: 384 is even
        (2.0**-10, 0.0),  # half of the smallest subnormal: zero is even
        (1.5 * 2**-9, 2.0**-8),  # a tie between the first two subnormals
        (15.5 / 16 * 2**-6, 2.0**-6),  # up from the subnormals to the smallest normal number
        (124.3, 128.0),  # the carry reaches the exponent
    ],
)
def test_e4m3_at_its_edges(value: float, rounded: float) -> None:
    x = torch.tensor([value, -value])
    result = round_to(x, FORMATS["e4m3"])
    assert result.tolist() == [rounded, -rounded]
    assert torch.equal(result.signbit(), x.signbit())


@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_nan_and_infinity_saturates(name: str) -> None:
    fmt = float_format(name)
    rounded = round_to(torch.tensor([math.nan, -math.nan, math.inf, -math.inf]), fmt)
    assert rounded[:2].isnan().all()
    assert rounded[2:].tolist() == [fmt.max, -fmt.max]


def test_shapes_views_and_empty_tensors(draw: Draw) -> None:
    fmt = FORMATS["e5m6"]
    for x in (torch.tensor(1.7), torch.zeros(0, 3), draw(5, 7).t()[::2]):
        assert round_to(x, fmt).shape == x.shape
        assert torch.equal(round_to(x, fmt), round_to(x.contiguous(), fmt))


def test_names_are_read_and_misspelt_ones_refused() -> None:
    assert float_format("E4M3") is float_format("e4m3fn") is FORMATS["e4m3"]
    assert float_format("e4m3").max == 448 and not float_format("e4m3").has_infinity
    assert float_format("e6m9").bits == 16
    with pytest.raises(ValueError, match=r"'e4n3'; did you mean e4m3"):
        float_format("e4n3")
    for name in ("e9m2", "e1m6", "e5m0", "e5m23", "e8m3fn"):
        with pytest.raises(ValueError, match=name):
            float_format(name)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"float64 \(shape \[2, 3\]\)"):
        encode(torch.zeros(2, 3, dtype=torch.float64), FORMATS["e4m3"])


def test_every_ue8m0_code_is_that_of_torch() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    ours, theirs = decode_ue8m0(codes), codes.view(torch.float8_e8m0fnu).float()
    assert torch.equal(ours[:255].view(torch.int32), theirs[:255].view(torch.int32))
    assert ours[255].isnan() and theirs[255].isnan()
    assert torch.equal(encode_ue8m0(ours)[1:], codes[1:])


def test_ue8m0_scales_round_up_and_torch_rounds_to_nearest() -> None:
    scale = fp32_sweep()
    scale = scale[(scale >= 2.0**-126) & (scale <= 2.0**127)]
    up = decode_ue8m0(encode_ue8m0(scale))
    assert (up >= scale).all() and (up.double() < 2 * scale.double()).all()
    assert (torch.frexp(up).mantissa == 0.5).all()
    nearest = scale.to(torch.float8_e8m0fnu).float()
    assert (nearest < scale).any()  # the wrong variant: what is divided by it can leave the format


def test_ue8m0_keeps_its_range_and_its_nan() -> None:
    scale = torch.tensor([0.0, 2.0**-149, 2.0**-126, 2.0**127, 3e38, math.inf, math.nan])
    assert encode_ue8m0(scale).tolist() == [1, 1, 1, 254, 254, 255, 255]


def test_e5m6_packs_eight_values_into_twelve_bytes() -> None:
    codes = torch.tensor([0x123, 0x456, 0x789, 0xABC, 0xDEF, 0x012, 0x345, 0x678], dtype=torch.uint16)
    words = [int("12345678", 16), int("9ABCDEF0", 16), int("12345678", 16)]
    expected = b"".join(word.to_bytes(4, "little") for word in words)
    packed = pack_e5m6(codes)
    assert packed.dtype == torch.uint8 and bytes(packed.tolist()) == expected
    assert torch.equal(unpack_e5m6(packed), codes)


@pytest.mark.parametrize("shape", [(8,), (3, 16), (2, 0), (0, 8), (2, 3, 24)], ids=str)
def test_e5m6_unpacks_to_what_was_packed(shape: tuple[int, ...]) -> None:
    codes = torch.arange(math.prod(shape)).mul(1117).remainder(4096).view(shape).to(torch.uint16)
    packed = pack_e5m6(codes)
    assert packed.shape == (*shape[:-1], shape[-1] * 3 // 2)
    assert torch.equal(unpack_e5m6(packed), codes)
    if shape == (3, 16):  # views: other strides, and a start that is no multiple of four bytes
        assert torch.equal(pack_e5m6(codes.t().contiguous().t()), packed)
        shifted = torch.cat([torch.zeros(3, 1, dtype=torch.uint8), packed], dim=1)[:, 1:]
        assert torch.equal(unpack_e5m6(shifted), codes)


def test_every_e5m6_code_survives_packing() -> None:
    codes = torch.arange(4096).to(torch.uint16)
    assert torch.equal(unpack_e5m6(pack_e5m6(codes)), codes)


def test_e5m6_packing_refuses_other_widths() -> None:
    with pytest.raises(ValueError, match=r"\[2, 12\] has 12 columns"):
        pack_e5m6(torch.zeros(2, 12, dtype=torch.uint16))
    with pytest.raises(ValueError, match=r"\[2, 16\]"):
        unpack_e5m6(torch.zeros(2, 16, dtype=torch.uint8))
