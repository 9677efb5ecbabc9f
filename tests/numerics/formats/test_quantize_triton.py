"""The quantisation kernel has the reference's bits: codes, scales, and what it refuses."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dovetail.catalog.presets import load_model
from dovetail.numerics.formats import quantize as reference
from dovetail.numerics.formats.floats import E4M3, FORMATS, FloatFormat, decode, encode, pack_e5m6
from dovetail.numerics.formats.quantized import Quantized, grid_values, token_tiles

triton = pytest.importorskip("triton", reason="Triton is published for Linux only")
tl = triton.language

from dovetail.numerics.formats import quantize_triton  # noqa: E402
from dovetail.numerics.formats.quantize_triton import dequantize, quantize, quantize_parts, reads  # noqa: E402
from dovetail.numerics.formats.rounding_triton import divide, narrow, rounding, widen  # noqa: E402
from dovetail.numerics.formats.rounding_triton import encode as encode_block  # noqa: E402

Draw = Callable[..., Tensor]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROW, COLUMN, BLOCK = (1, 128), (128, 1), (128, 128)
SMALL = ["e4m3", "e5m2", "e5m6", "e3m4"]


def bits(x: Tensor) -> Tensor:
    return x.cpu().contiguous().view(torch.int32)


def assert_same(actual: Quantized, expected: Quantized) -> None:
    assert (actual.tile, actual.format) == (expected.tile, expected.format)
    assert actual.data.dtype == expected.data.dtype
    assert torch.equal(bits(actual.scale), bits(expected.scale))
    assert torch.equal(bits(grid_values(actual)), bits(grid_values(expected)))


def uneven(draw: Draw, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (draw(rows, columns) * torch.exp(3 * draw(rows, 1)) * torch.exp(draw(1, columns))).to(dtype)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (1, 300), (37, 129), (130, 260)], ids=str)
@pytest.mark.parametrize("tile", [ROW, COLUMN, BLOCK, (1, 16), (8, 8)], ids=str)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_bits_are_the_reference(shape: tuple[int, int], tile: tuple[int, int], power_of_two: bool, draw: Draw) -> None:
    dtypes = (torch.bfloat16,) if shape[0] > 100 else (torch.float32, torch.bfloat16, torch.float16)
    for dtype in dtypes:
        x = uneven(draw, *shape, dtype=dtype).clamp(-6e4, 6e4)
        actual = quantize(x.to(DEVICE), tile, power_of_two=power_of_two)
        assert_same(actual, reference.quantize(x, tile, power_of_two=power_of_two))


@pytest.mark.parametrize("name", SMALL)
def test_formats_round_as_the_reference(name: str) -> None:
    """A tile whose largest value is the format's has scale 1: its codes are those of the values themselves. Each number
    of the format, each middle between two, and what lies next to these."""
    form: FloatFormat = FORMATS[name]
    grid = decode(torch.arange(form.nan_code), form)
    grid = grid[grid <= form.max].sort().values
    middles = (grid[1:].double() + grid[:-1].double()).div(2).float()
    near = torch.cat([grid, middles])
    near = torch.cat(
        [near, torch.nextafter(near, near.new_tensor(torch.inf)), torch.nextafter(near, near.new_zeros(()))]
    )
    near = torch.cat([near, torch.tensor([1e-45, 1e-38, form.smallest_subnormal / 4])]).clamp(max=form.max)
    values = torch.cat([near, -near])
    rows = -(-len(values) // 127)
    x = torch.zeros(rows, 128)
    x[:, 0] = form.max
    x[:, 1:].copy_(torch.nn.functional.pad(values, (0, rows * 127 - len(values))).view(rows, 127))
    actual = quantize(x.to(DEVICE), ROW, name)
    assert (actual.scale == 1).all()
    assert torch.equal(bits(grid_values(actual)), bits(decode(encode(x, form), form)))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_extreme_values(power_of_two: bool) -> None:
    x = torch.zeros(8, 128)
    x[0] = 3.4e38
    x[1] = torch.logspace(-38, 38, 128)
    x[2] = 1e-45
    x[3, 7] = -1e-4
    x[4] = torch.logspace(-12, -4, 128)
    x[5, ::2] = -0.0
    x[6] = 448.0 * 2.0**-9  # its scale is a power of two already
    for dtype in (torch.float32, torch.bfloat16):
        narrow = x.to(dtype).nan_to_num(0, 3e38)
        for name in SMALL:
            actual = quantize(narrow.to(DEVICE), ROW, name, power_of_two)
            assert_same(actual, reference.quantize(narrow, ROW, name, power_of_two))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_what_is_not_finite_is_refused_or_stays_so(bad: float, power_of_two: bool, draw: Draw) -> None:
    x = draw(3, 300)
    x[1, 150] = bad
    with pytest.raises(ValueError, match=r"the gradient, shape \[3, 300\], holds"):
        quantize(x.to(DEVICE), ROW, power_of_two=power_of_two, name="the gradient")
    actual = quantize(x.to(DEVICE), ROW, power_of_two=power_of_two, check=False)
    expected = reference.quantize(x, ROW, power_of_two=power_of_two, check=False)
    values, expected_values = grid_values(actual).cpu(), grid_values(expected)
    assert torch.equal(values.isnan(), expected_values.isnan()) and values.isnan().any()
    assert torch.equal(values.nan_to_num(0), expected_values.nan_to_num(0))
    assert torch.equal(actual.scale.cpu().isfinite(), expected.scale.isfinite())


@pytest.mark.parametrize("tile", [ROW, COLUMN, BLOCK], ids=str)
def test_strides_do_not_matter(tile: tuple[int, int], draw: Draw) -> None:
    x = draw(140, 2 * 131, dtype=torch.bfloat16)
    for view in (x.t(), x[:, ::2], x[5:, 3:], x[:1].expand(9, -1)):
        assert_same(quantize(view.to(DEVICE), tile), reference.quantize(view.contiguous(), tile))


def test_column_tiles_are_written_along_k(draw: Draw) -> None:
    """As FP8 products on Hopper read them: a column's values side by side, from a multiple of 16 bytes on."""
    data = quantize(draw(37, 20).to(DEVICE), COLUMN).data
    assert data.stride() == (1, 48) and data.data_ptr() % 16 == 0


@pytest.mark.parametrize("offsets", [[0, 0], [0, 1], [0, 0, 130, 130, 301], [0, 128, 256]], ids=str)
def test_column_tiles_begin_anew_with_every_expert(offsets: Sequence[int], draw: Draw) -> None:
    x = uneven(draw, offsets[-1], 40)
    actual = quantize_parts(x.to(DEVICE), token_tiles(offsets)[0], COLUMN)
    parts = [reference.quantize(x[start:stop], COLUMN) for start, stop in pairwise(offsets)]
    assert torch.equal(bits(actual.scale), bits(torch.cat([part.scale for part in parts])))
    values = torch.cat([grid_values(part) for part in parts])
    assert torch.equal(bits(grid_values(actual)), bits(values))
    if offsets == [0, 0, 130, 130, 301]:  # tiles that ran on over experts would be wrong
        assert len(actual.scale) != len(reference.quantize(x, COLUMN).scale)


def test_dequantising_takes_row_tiles_of_float8_and_packed_codes(draw: Draw, with_triton: Callable[[], object]) -> None:
    x = uneven(draw, 9, 300)
    with with_triton() as device:
        for name in ("e4m3", "e5m2"):
            rows = quantize(x.to(device), ROW, name)
            assert reads(rows)
            for dtype in (torch.float32, torch.bfloat16):
                assert torch.equal(dequantize(rows, dtype), reference.dequantize_reference(rows, dtype))
        codes = quantize(x.to(device), ROW, "e5m6")
        padded = torch.nn.functional.pad(codes.data.view(torch.int16), (0, 4))
        packed = replace(codes, data=pack_e5m6(padded), columns=300)
        assert reads(packed) and packed.shape == (9, 300)
        assert torch.equal(dequantize(packed, torch.float32), reference.dequantize_reference(codes))
        others = [
            codes,
            quantize(x.to(device), COLUMN),
            quantize(x.to(device), BLOCK),
            quantize(x.to(device), ROW, "e3m4"),
        ]
        assert not any(reads(each) for each in others)


def test_operands_of_the_published_model(draw: Draw) -> None:
    """Its widths, a 56th of them, with tiles that shrink alike: 7168 in tiles of 128 become 128 in tiles of 2."""
    spec = load_model("deepseek-v3")
    assert spec.moe is not None
    for width in (spec.hidden_size, spec.intermediate_size, spec.moe.moe_intermediate_size):
        x = uneven(draw, 9, width // 56, torch.bfloat16)
        for tile in ((1, 2), (2, 2), (2, 1)):
            assert_same(quantize(x.to(DEVICE), tile), reference.quantize(x, tile))


def test_wrong_inputs_are_refused(draw: Draw) -> None:
    x = draw(4, 8).to(DEVICE)
    with pytest.raises(ValueError, match=r"\[1, 100\].*powers of two"):
        quantize(x, (1, 100))
    with pytest.raises(ValueError, match="bf16 reaches"):
        quantize(x, ROW, "bf16")
    with pytest.raises(ValueError, match=r"float64 \[4, 8\]"):
        quantize(x.double(), ROW)


@triton.jit
def _encode(x, codes, ROUNDING: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    tl.store(codes + at, encode_block(tl.load(x + at), ROUNDING))


@pytest.mark.parametrize("name", SMALL)
def test_codes_saturate_and_keep_nan(name: str, draw: Draw) -> None:
    """Any FP32 number, as `formats.encode` has it: rounding does not rely on the scale to keep values in range."""
    form, size = FORMATS[name], 4096
    x = (draw(size).view(torch.int32) ^ (draw(size).view(torch.int32) << 9)).view(torch.float32)
    edges = [
        torch.nan,
        torch.inf,
        -torch.inf,
        form.max,
        1.03 * form.max,
        1.07 * form.max,
        -2 * form.max,
        3e38,
        0.0,
        -0.0,
    ]
    x[: len(edges)] = torch.tensor(edges)
    codes = torch.empty(size, dtype=torch.uint8 if form.bits <= 8 else torch.uint16, device=DEVICE)
    _encode[(1,)](x.to(DEVICE), codes, rounding(form, False, torch.device("cpu")), size)
    expected = encode(x, form)
    assert torch.equal(codes.cpu()[~x.isnan()].int(), expected[~x.isnan()].int())
    assert decode(codes.cpu(), form)[x.isnan()].isnan().all()


@triton.jit
def _divide(x, scale, out, ROUNDING: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    tl.store(out + at, divide(tl.load(x + at), tl.load(scale + at), ROUNDING))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_division_by_fused_products_is_the_exact_division(power_of_two: bool, draw: Draw) -> None:
    """Also for scales whose significand is all ones, and next to the middles between numbers of the format."""
    size = 1 << 16
    scale = torch.exp2(draw(size) * 12) * (1 + draw(size).abs() % 1)
    scale[: size // 4] = (scale[: size // 4].view(torch.int32) | 0x7FFFFF).view(torch.float32)
    if power_of_two:
        scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
    x = scale * torch.exp2(draw(size) * 3)
    middles = (torch.arange(16, 32).repeat(size // 32) / 16 + 2.0**-5) * torch.exp2(draw(size // 2).round())
    x[::2] = middles * scale[::2]
    rule = replace(rounding(E4M3, power_of_two, torch.device("cpu")), fused=True)
    out = torch.empty(size, device=DEVICE)
    _divide[(1,)](x.to(DEVICE), scale.to(DEVICE), out, rule, size)
    assert torch.equal(out.cpu(), x / scale)
    if not power_of_two:
        assert not torch.equal(x * (1 / scale), x / scale)  # without the corrections it is not


@triton.jit
def _round(x, out, wide, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    value = narrow(tl.load(x + at), tl.bfloat16)
    tl.store(out + at, value)
    tl.store(wide + at, widen(value))


def test_bf16_is_rounded_as_torch_does(draw: Draw) -> None:
    size = 1 << 14
    pattern = (draw(size).view(torch.int32) ^ (draw(size).view(torch.int32) << 7)).view(torch.float32)
    pattern[:8] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3.4e38, 1e-40, 1.00390625])
    out, wide = torch.empty(size, dtype=torch.bfloat16, device=DEVICE), torch.empty(size, device=DEVICE)
    _round[(1,)](pattern.to(DEVICE), out, wide, size)
    expected = pattern.bfloat16()
    assert torch.equal(out.cpu().isnan(), expected.isnan())
    assert torch.equal(out.cpu().nan_to_num().view(torch.int16), expected.nan_to_num().view(torch.int16))
    assert torch.equal(wide.cpu().nan_to_num(), expected.float().nan_to_num())


def test_a_gpu_s_matrices_are_quantised_by_the_kernel(
    draw: Draw, monkeypatch: pytest.MonkeyPatch, with_triton: Callable[[], object]
) -> None:
    """What it does not take, FP64 and other tiles and formats, by the reference; both refuse NaN."""
    x, seen = draw(20, 140), []

    def watched(*arguments: object) -> Quantized:
        seen.append(arguments)
        return quantize(*arguments)

    monkeypatch.setattr(quantize_triton, "quantize", watched)
    with with_triton() as device:
        for tile in (ROW, COLUMN, BLOCK):
            assert_same(reference.quantize(x.to(device), tile), reference.quantize_reference(x, tile))
        assert len(seen) == 3
        reference.quantize(x.double().to(device), ROW)
        reference.quantize(x.to(device), (3, 5))
        reference.quantize(x.to(device), ROW, "e7m3")
        assert len(seen) == 3
        with pytest.raises(ValueError, match="'e4m33'|e4m33"):
            reference.quantize(x.to(device), ROW, "e4m33")
        x[3, 7] = torch.nan
        with pytest.raises(ValueError, match=r"a gate, shape \[20, 140\], holds 1 NaN"):
            reference.quantize(x.to(device), ROW, name="a gate")
