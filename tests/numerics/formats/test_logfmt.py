"""LogFMT: the closed form against a search for the nearest value, the bits on the wire, the error it should have."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dovetail.numerics.formats import logfmt
from dovetail.numerics.formats.logfmt import (
    decode,
    encode,
    extremes,
    extremes_reference,
    from_codes,
    pack_bits,
    round_reference,
    round_to_logfmt,
    tile_grid,
    to_codes,
    unpack_bits,
)
from dovetail.numerics.formats.quantize import dequantize, quantize
from dovetail.numerics.formats.quantized import LOGFMT_BITS, LogFmt

Draw = Callable[..., Tensor]


def one_tile(values: list[float] | Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32)[None]


def levels(minimum: float, step: float, bits: int) -> np.ndarray:
    """Zero and the values of codes 1, 2, ... in FP64."""
    codes = np.arange(2 ** (bits - 1) - 1)
    return np.concatenate([[0.0], np.exp2(np.float64(minimum)) * np.exp2(np.float64(step) * codes)])


def nearest_codes(x: Tensor, minimum: Tensor, step: Tensor, bits: int) -> Tensor:
    """By search: for every value the code whose number is nearest, the sign in the top bit."""
    codes = []
    for tile, (low, width) in enumerate(zip(minimum.tolist(), step.tolist(), strict=True)):
        numbers = levels(low, width, bits)
        values = x[tile].double().numpy()
        borders = (numbers[1:] + numbers[:-1]) / 2
        found = np.searchsorted(borders, np.abs(values), side="right")
        if width == 0:
            found = np.minimum(found, 1)  # all codes but zero are the same number
        codes.append(found + (np.signbit(values) << bits - 1))
    return torch.from_numpy(np.stack(codes)).to(torch.int16)


def hard_tiles(draw: Draw) -> Tensor:
    """[tiles, 128] FP32 that are difficult in one way each."""
    normal = draw(1, 128)
    tiles = [
        normal,
        normal.bfloat16().float(),
        torch.exp2(40 * draw(1, 128)),  # far more than 32 octaves: clipped
        torch.exp2(-16 * torch.rand(1, 128, generator=torch.Generator().manual_seed(1))),
        normal * 2.0**-140,  # subnormal
        normal * 2.0**120,
        1 + normal.abs() * 2**-20,  # a very narrow range
        torch.where(normal > 0, 1.0, 1 + 2**-23),  # the narrowest
        torch.where(normal > 0, 3.0, -3.0),  # one magnitude
        torch.where(normal > 0, 0.0, -0.0),
        torch.where(normal > 1, normal, 0.0),
        torch.full((1, 128), torch.finfo(torch.float32).max),
        torch.exp2(-32 + draw(1, 128)).index_fill(1, torch.tensor([0]), 1.0),  # around the limit of the range
        torch.exp2(-33 + draw(1, 128) / 64).index_fill(1, torch.tensor([0]), 1.0),  # around half of the least value
    ]
    return torch.cat(tiles)


@pytest.mark.parametrize("bits", LOGFMT_BITS)
def test_closed_form_is_the_nearest_value(bits: int, draw: Draw) -> None:
    x = hard_tiles(draw)
    minimum, step = tile_grid(*extremes(x), bits)
    expected = nearest_codes(x, minimum[:, 0], step[:, 0], bits)
    assert torch.equal(to_codes(x, minimum, step, bits), expected)


@pytest.mark.parametrize("bits", LOGFMT_BITS)
def test_closed_form_is_the_nearest_value_around_every_border(bits: int, draw: Draw) -> None:
    """The FP32 numbers next to the middle of each two neighbours, and at the middle as far as FP32 has it."""
    steps = 2 ** (bits - 1) - 2
    for low, width in ((-8.0, 8 / steps), (-1.37, 0.0211), (-3.0, 1e-4), (-31.3, 32 / steps)):
        numbers = torch.from_numpy(levels(np.float32(low), np.float32(width), bits))
        middles = ((numbers[1:] + numbers[:-1]) / 2).float()
        around = [middles, torch.nextafter(middles, middles * 2), torch.nextafter(middles, middles * 0)]
        x = torch.cat([*around, -middles])[None]
        tiles = -(-x.shape[1] // 128)
        minimum, step = torch.full((1, tiles), low), torch.full((1, tiles), width)
        expected = nearest_codes(x, minimum[:, 0], step[:, 0], bits)
        assert torch.equal(to_codes(x, minimum, step, bits), expected)


def test_formula_without_the_border_at_half_flushes_what_was_clipped() -> None:
    """The wrong variant: for a value under code 1 the formula looks for a code 0 one step down, not at zero."""
    x = one_tile([1.0, 2.0**-32 * 0.6])
    minimum, step = tile_grid(*extremes(x), 8)
    low, width = minimum.item(), step.item()
    formula = math.floor((math.log2(x[0, 1]) - low) / width + 2 - math.log2((1 + 2**width) / 2) / width)
    assert max(formula, 0) == 0
    assert to_codes(x, minimum, step, 8)[0, 1] == 1
    assert decode(encode(x, 8))[0, 1] == 2.0**-32  # nearer than zero


def test_rounding_of_logarithms_is_further_off(draw: Draw) -> None:
    """The wrong variant: nearest in log space, whose borders lie at sqrt(r) and not at (1 + r) / 2."""
    x = draw(64, 128)
    minimum, step = tile_grid(*extremes(x), 6)
    codes = torch.round((x.abs().log2() - minimum) / step).to(torch.int16) + 1
    codes |= torch.signbit(x).to(torch.int16) << 5
    wrong, right = from_codes(codes, minimum, step, 6), from_codes(to_codes(x, minimum, step, 6), minimum, step, 6)
    assert ((right - x).abs() <= (wrong - x).abs() + 1e-6 * x.abs()).all()
    assert (right - x).norm() < 0.995 * (wrong - x).norm()


def test_worked_example() -> None:
    """n = 8 between 2^-8 and 1: 126 steps of 8/126 octave."""
    x = one_tile([2.0**-8, 0.01, 0.1, -0.3, 0.5, 0.75, 1.0, 0.0])
    encoded = encode(x, 8)
    assert encoded.minimum.item() == -8
    assert encoded.step.item() == pytest.approx(0.0634921, abs=1e-7)
    assert 2 ** encoded.step.item() == pytest.approx(1.044992, abs=1e-6)
    assert encoded.data[0].tolist() == [1, 22, 75, 100 + 128, 111, 120, 127, 0]
    restored = decode(encoded)[0]
    assert restored[[0, 7]].tolist() == [2.0**-8, 0.0]
    assert restored[[4, 5, 6]].tolist() == pytest.approx([0.494529, 0.734867, 1.0], abs=1e-6)


def test_range_is_limited_to_32_octaves() -> None:
    x = one_tile([1.0, 2.0**-31.9, 2.0**-33.1, 2.0**-40, -(2.0**-100)])
    encoded = encode(x, 10)
    assert encoded.minimum.item() == -32
    assert decode(encoded)[0, 2:].tolist() == [0.0, 0.0, 0.0]
    assert decode(encoded)[0, 1].item() == pytest.approx(2.0**-31.9, rel=0.05)
    assert encode(x[:, :2], 10).minimum.item() == pytest.approx(-31.9, abs=1e-5)  # within the range: no limit


@pytest.mark.parametrize("bits", LOGFMT_BITS)
def test_ends_of_a_tile_are_kept_and_neighbours_within_half_a_step(bits: int, draw: Draw) -> None:
    x = draw(16, 256)
    encoded = encode(x, bits)
    restored = decode(encoded)
    ratio = torch.exp2(encoded.step.double())[..., None]
    tiles, back = x.double().unflatten(1, (2, 128)), restored.double().unflatten(1, (2, 128))
    # (r - 1) / (r + 1) of the value in the middle of two codes; metadata are FP32: 2^-24 of at most 16 octaves each
    bound = (ratio - 1) / (ratio + 1) + 3 * 16 * 2**-24
    assert ((back - tiles).abs() <= bound * tiles.abs()).all()
    largest, smallest = extremes(x)
    for end, kept in zip((largest, smallest), extremes(restored), strict=True):
        assert ((kept - end).abs() <= 2 * 16 * 2**-24 * end).all()


@pytest.mark.parametrize("bits", LOGFMT_BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_decoded_encodes_to_itself(bits: int, dtype: torch.dtype, draw: Draw) -> None:
    encoded = encode(draw(4, 300, dtype=dtype), bits)
    restored = decode(encoded)
    grid = encoded.minimum, encoded.step
    assert torch.equal(to_codes(restored, *grid, bits), unpack_bits(encoded.data, bits, 300))


def test_errors_come_in_the_expected_order(draw: Draw) -> None:
    """Relative RMS errors on Gaussian tiles: BF16, LogFMT-10, LogFMT-8, then E4M3 and E5M2 with tile scales."""
    x = draw(64, 1024)
    rounded = [x.bfloat16().float(), round_to_logfmt(x, 10), round_to_logfmt(x, 8)]
    rounded += [dequantize(quantize(x, (1, 128), format)) for format in ("e4m3", "e5m2")]
    errors = [((each - x).norm() / x.norm()).item() for each in rounded]
    assert errors == sorted(errors)
    assert all(larger > 1.5 * smaller for smaller, larger in zip(errors, errors[1:], strict=False))


def test_error_halves_with_every_bit(draw: Draw) -> None:
    x = draw(64, 512)
    errors = {bits: (round_to_logfmt(x, bits) - x).norm().item() for bits in LOGFMT_BITS}
    for bits in range(7, 13):
        steps = (2 ** (bits - 1) - 2) / (2 ** (bits - 2) - 2)  # as many more in the same range
        assert errors[bits - 1] / errors[bits] == pytest.approx(steps, rel=0.03)


def test_signed_values_and_zeros_keep_their_sign() -> None:
    x = one_tile([-1.0, 1.0, -0.0, 0.0, -0.25, 0.25])
    restored = decode(encode(x, 8))
    assert torch.equal(restored.signbit(), x.signbit())
    assert restored[0, 2:4].tolist() == [0.0, 0.0]


def test_tiles_of_zeros_and_of_one_magnitude() -> None:
    x = torch.zeros(2, 256)
    x[0, 128:] = torch.tensor([0.3, -0.3, 0.0, 0.3]).repeat(32)
    encoded = encode(x, 4)
    assert encoded.step[1].tolist() == encoded.minimum[1].tolist() == [0.0, 0.0]
    assert torch.allclose(decode(encoded), x, rtol=2**-22, atol=0)


def test_every_tile_has_a_grid_of_its_own(draw: Draw) -> None:
    x = draw(3, 300)
    whole = round_to_logfmt(x, 8)
    for start in (0, 128, 256):
        part = slice(start, start + 128)
        assert torch.equal(round_to_logfmt(x[:, part], 8), whole[:, part])
    shifted = round_to_logfmt(x[:, 1:], 8)
    assert not torch.equal(shifted, whole[:, 1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 7, 10, 12])
def test_rounding_is_encoding_and_decoding(bits: int, dtype: torch.dtype, draw: Draw) -> None:
    x = draw(5, 200, dtype=dtype)
    rounded = round_to_logfmt(x, bits)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, decode(encode(x, bits), dtype))
    assert torch.equal(rounded.t(), round_to_logfmt(x.t().contiguous().t(), bits).t())  # other strides


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", LOGFMT_BITS)
def test_kernels_are_the_references(bits: int, dtype: torch.dtype, draw: Draw) -> None:
    tiles = hard_tiles(draw).to(dtype)
    shapes = [torch.cat([tiles, tiles[:, :70].flip(0)], 1), draw(40, 300, dtype=dtype), tiles[:0], tiles[:, :1]]
    for x in shapes:
        x = x.masked_fill(x.isinf(), 1.0)  # of the largest number, in BF16
        ends = extremes_reference(x)
        assert all(torch.equal(*each) for each in zip(extremes(x), ends, strict=True))
        expected = round_reference(x, *tile_grid(*ends, bits), bits)
        kernel = round_to_logfmt(x, bits)
        assert torch.equal(kernel, expected) and torch.equal(kernel.signbit(), expected.signbit())


def test_the_kernel_doubts_at_borders_and_the_reference_decides(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """1.5 lies in the middle of 1 and 2: with a step of one octave the last bit of a logarithm would decide."""
    x = torch.cat([draw(20, 5), torch.tensor([[1.0, 1.5, 2.0, 64.0, 0.0]])]).bfloat16()
    expected, asked = round_reference(x, *tile_grid(*extremes(x), 4), 4), []
    monkeypatch.setattr(logfmt, "round_reference", lambda x, *grid: asked.append(len(x)) or round_reference(x, *grid))
    assert torch.equal(round_to_logfmt(x, 4), expected)
    assert asked == [1]


@pytest.mark.parametrize("bits", LOGFMT_BITS)
@pytest.mark.parametrize("shape", [(3, 128), (2, 5), (1, 1), (4, 3, 21), (0, 8), (2, 0)], ids=str)
def test_packing_is_a_little_endian_stream(bits: int, shape: tuple[int, ...]) -> None:
    codes = torch.arange(math.prod(shape)).mul(2617).remainder(2**bits).view(shape).to(torch.int16)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (*shape[:-1], -(-shape[-1] * bits // 8))
    assert torch.equal(unpack_bits(packed, bits, shape[-1]), codes)
    for row, stored in zip(codes.flatten(0, -2), packed.flatten(0, -2), strict=True):
        stream = sum(code << bits * i for i, code in enumerate(row.tolist()))
        assert bytes(stored.tolist()) == stream.to_bytes(packed.shape[-1], "little")


@pytest.mark.parametrize("bits", LOGFMT_BITS)
def test_bytes_are_those_of_codes_and_metadata(bits: int, draw: Draw) -> None:
    assert encode(draw(3, 512), bits).num_bytes == 3 * 4 * (16 * bits + 8)
    assert encode(draw(3, 130), bits).num_bytes == 3 * (math.ceil(130 * bits / 8) + 2 * 8)


@pytest.mark.parametrize("shape", [(0, 128), (3, 0), (0, 0)], ids=str)
def test_empty_matrices_pass(shape: tuple[int, int]) -> None:
    assert decode(encode(torch.zeros(shape), 8)).shape == shape


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_not_a_number_is_refused_or_spoils_its_tile(bad: float, draw: Draw) -> None:
    x = draw(2, 256)
    x[0, 3], x[0, 4], x[1, 0] = bad, 0.0, 0.0
    with pytest.raises(ValueError, match=r"expert outputs, shape \[2, 256\], holds"):
        encode(x, 8, name="expert outputs")
    with pytest.raises(ValueError, match=r"\[2, 256\]"):
        round_to_logfmt(x, 8)
    restored = round_to_logfmt(x, 8, check=False)
    assert restored[0, :128].isnan().all()
    assert restored[0, 128:].isfinite().all() and restored[1].isfinite().all()


def test_wrong_inputs_are_refused() -> None:
    for bits in (3, 13):
        with pytest.raises(ValueError, match=f"4 to 12 bits, not {bits}"):
            encode(torch.zeros(2, 128), bits)
    with pytest.raises(ValueError, match=r"int64 with shape \[2, 128\]"):
        encode(torch.zeros(2, 128, dtype=torch.int64), 8)
    good = encode(torch.ones(2, 256), 8)
    with pytest.raises(ValueError, match=r"metadata \[2, 2\], not \[2, 1\]"):
        decode(LogFmt(data=good.data, minimum=good.minimum[:, :1], step=good.step, bits=8, columns=256))
    with pytest.raises(ValueError, match=r"\[..., 320\], not torch.uint8 \[2, 256\]"):
        unpack_bits(good.data, 10, 256)
