"""Operands: CPU kernels bit for bit as the references, tile by tile; what is kept comes back."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dovetail.numerics import capability
from dovetail.numerics.formats.floats import decode, float_format, pack_e5m6, round_to
from dovetail.numerics.formats.quantize import dequantize, quantize
from dovetail.numerics.formats.quantized import (
    COLUMN_TILE,
    ROW_TILE,
    TORCH_DTYPES,
    Quantized,
    codes_of,
    grid_values,
    spread_scale,
    token_tiles,
)
from dovetail.numerics.operands.operands import (
    keep,
    quantize_and_keep,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
    retile,
    scales_of,
)
from dovetail.spec.precision import Quantization, Tile

Draw = Callable[..., Tensor]
SHAPES = [(0, 5), (1, 1), (3, 128), (130, 257), (5, 300)]
E5M6 = Quantization(format="e5m6", power_of_two=True)


def values(shape: tuple[int, int], draw: Draw, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers of very different rows, zeros of both signs, and values that fall below the smallest normal."""
    x = draw(*shape) * torch.exp2(torch.arange(shape[0]) % 40 - 20.0)[:, None]
    x[:, ::7] *= 1e-4
    x[:, 3::11] = -0.0
    return x.to(dtype)


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Calls a function without the CPU kernels."""

    def call(function: Callable[..., object], *arguments: object) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(capability, "on_cpu", lambda *tensors: False)
            return function(*arguments)

    return call


def same(ours: Quantized, reference: Quantized) -> bool:
    """Data, whether BF16 or codes, and scales bit for bit, and all that says what they are."""
    data = (
        each.data.view(torch.int16) if each.data.element_size() == 2 else codes_of(each) for each in (ours, reference)
    )
    alike = ((each.tile, each.format, each.columns, each.data.dtype) for each in (ours, reference))
    return torch.equal(*data) and torch.equal(ours.scale, reference.scale) and len(set(alike)) == 1


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e3m4", "e5m6"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_are_the_references(
    shape: tuple[int, int], name: str, power_of_two: bool, draw: Draw, by_torch: Callable[..., object]
) -> None:
    x = values(shape, draw)
    offsets = [0, shape[0] // 3, shape[0]]
    tiles: tuple[Tile, ...] = ("row", "column", "block", "tensor")
    row, column, block, tensor = (Quantization(format=name, tile=tile, power_of_two=power_of_two) for tile in tiles)
    for quantization in (row, block, tensor):
        assert same(quantize_rows(x, quantization), by_torch(quantize_rows, x, quantization))
    for quantization in (column, block, tensor):
        assert same(quantize_columns(x, offsets, quantization), by_torch(quantize_columns, x, offsets, quantization))
    for quantization in (block, tensor):
        weight = torch.stack([x, x.flip(0) * 3])
        assert same(quantize_blocks(weight, quantization), by_torch(quantize_blocks, weight, quantization))
    for kept_in in (row, tensor):
        rows, kept = quantize_and_keep(x, kept_in)
        expected, reference = by_torch(quantize_and_keep, x, kept_in)
        assert same(rows, expected)
        for each in (kept, keep(x, kept_in)):
            assert same(each, reference) and each.shape == shape
        for dtype in (torch.bfloat16, torch.float32):
            assert torch.equal(dequantize(kept, dtype), by_torch(dequantize, kept, dtype))
            assert torch.equal(dequantize(kept, dtype), dequantize(rows, dtype))
        for quantization in (column, tensor, Quantization(tile="column")):
            ours = retile(kept, offsets, quantization)
            assert same(ours, by_torch(retile, kept, offsets, quantization))


def test_a_grid_of_fp32_is_bf16(draw: Draw, by_torch: Callable[..., object]) -> None:
    x = values((5, 300), draw, torch.float32)
    for tile in ("row", "block", "tensor"):
        quantization = Quantization(tile=tile)
        assert same(quantize_rows(x, quantization), by_torch(quantize_rows, x, quantization))


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e5m6"])
@pytest.mark.parametrize("tile", ["row", "block", "tensor"])
def test_a_grid_is_the_rounded_quotient(name: str, tile: Tile, draw: Draw) -> None:
    """Against one scale per row and tile, spelt out."""
    x, fmt = values((140, 200), draw), float_format(name)
    ours = quantize_rows(x, Quantization(format=name, tile=tile))
    for row in (0, 77, 139):
        rows = {"row": slice(row, row + 1), "block": slice(row // 128 * 128, row // 128 * 128 + 128)}.get(
            tile, slice(140)
        )
        for number, columns in enumerate([slice(0, 128), slice(128, 200)]):
            seen = x[rows] if tile == "tensor" else x[rows, columns]
            scale = seen.float().abs().max().clamp(min=1e-4) / fmt.max
            assert ours.scale[row, number] == scale
            assert torch.equal(ours.data[row, columns].float(), round_to(x[row, columns].float() / scale, fmt))


def test_rounding_a_scale_down_would_clip(draw: Draw) -> None:
    amax = torch.tensor([1.0, 447.0, 448.0, 449.0, 3e-5])
    exact, rounded = (scales_of(amax, Quantization(power_of_two=power)) for power in (False, True))
    assert (rounded >= exact).all() and (rounded < 2 * exact).all()
    assert torch.equal(rounded.log2(), rounded.log2().round())
    assert rounded[2] == exact[2] == 1.0
    down = torch.exp2(exact.log2().floor())
    assert (amax[:4] / down[:4] > 448).sum() == 3


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen_in_its_tile_alone(
    poison: float, draw: Draw, by_torch: Callable[..., object]
) -> None:
    x = values((9, 300), draw)
    x[4, 130] = poison
    for call in (lambda f, *a: f(*a), by_torch):
        rows, kept = call(quantize_and_keep, x, Quantization())
        is_nan = torch.zeros(9, 3, dtype=torch.bool)
        is_nan[4, 1] = True
        assert torch.equal(rows.scale.isnan(), is_nan)
        assert torch.equal(dequantize(kept).isnan().any(1), is_nan.any(1))


def test_kept_bytes(draw: Draw) -> None:
    x = values((64, 256), draw)
    assert keep(x, Quantization()).data.nbytes == x.numel()
    assert keep(x, E5M6).data.nbytes == 1.5 * x.numel()


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e3m4", "e5m6"])
def test_what_is_kept_is_what_quantize_makes(name: str, draw: Draw) -> None:
    """One record, whoever made it: in row tiles, and in those of each group of rows."""
    x, offsets = values((140, 300), draw), [0, 128, 140]
    kept, plain = keep(x, Quantization(format=name)), quantize(x, ROW_TILE, name)
    assert torch.equal(grid_values(kept), grid_values(plain)) and torch.equal(kept.scale, plain.scale)
    columns = quantize_columns(x, offsets, Quantization(format=name, tile="column"))
    plain = quantize(x, COLUMN_TILE, name)
    assert torch.equal(grid_values(columns), grid_values(plain)) and torch.equal(columns.scale, plain.scale)
    weight = torch.stack([x, x.flip(1)])
    blocks = quantize_blocks(weight, Quantization(format=name, tile="block"))
    each = torch.stack([dequantize(quantize(one, (128, 128), name)) for one in weight])
    assert torch.equal(dequantize(blocks), each)
    assert torch.equal(grid_values(blocks) * spread_scale(blocks), each)


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e3m4", "e2m1", "e5m6"])
def test_every_code_comes_back_as_the_number_it_is(name: str, by_torch: Callable[..., object]) -> None:
    """Infinities and NaN too, which nothing here writes but a checkpoint may hold."""
    fmt = float_format(name)
    codes = torch.arange(1 << fmt.bits, dtype=torch.int32).view(-1, 8)
    packed = name == "e5m6"
    data = pack_e5m6(codes) if packed else codes.to(torch.uint8).view(TORCH_DTYPES.get(name, torch.uint8))
    kept = Quantized(
        data=data, scale=torch.ones(len(codes), 1), tile=ROW_TILE, format=name, columns=8 if packed else None
    )
    ours, reference = dequantize(kept), by_torch(dequantize, kept)
    assert torch.equal(ours.isnan(), reference.isnan()) and ours.isnan().any()
    assert torch.equal(ours.nan_to_num(7).view(torch.int32), decode(codes, fmt).nan_to_num(7).view(torch.int32))
    assert torch.equal(ours.nan_to_num(7), reference.nan_to_num(7))


@pytest.mark.parametrize("name", ["e4m3", "e5m6"])
def test_retiling_with_powers_of_two_rounds_once(name: str, draw: Draw) -> None:
    """What keeps clear of the new tiles' subnormals comes through exactly; with other scales little does [V3 §3.3]."""
    x, offsets = (1 + draw(200, 300).abs() / 2).bfloat16(), [0, 200]
    once = keep(x, Quantization(format=name, power_of_two=True))
    again = retile(once, offsets, Quantization(format=name, tile="column", power_of_two=True))
    assert again.tile == COLUMN_TILE and again.format == name and again.scale.shape == (2, 300)
    assert torch.equal(dequantize(again), dequantize(once))
    plain = keep(x, Quantization(format=name))
    twice = retile(plain, offsets, Quantization(format=name, tile="column"))
    assert (dequantize(twice) != dequantize(plain)).float().mean() > 0.2


def test_retiling_loses_only_what_sinks_below_the_new_tile(draw: Draw) -> None:
    x = (draw(256, 128) * torch.exp2(4 * draw(256, 1))).bfloat16()  # 128x1 tiles hold large and small tokens
    once = keep(x, Quantization(power_of_two=True))
    again = retile(once, [0, 256], Quantization(tile="column", power_of_two=True))
    lost = (dequantize(again) - dequantize(once)).abs()
    assert lost.any()
    assert (lost <= spread_scale(again) * 2**-10).all()  # half of the smallest subnormal


def test_retiling_can_change_the_format(draw: Draw) -> None:
    kept = keep(draw(130, 128).bfloat16(), E5M6)
    column = Quantization(tile="column", power_of_two=True)
    again, direct = retile(kept, [0, 2, 130], column), quantize_columns(dequantize(kept), [0, 2, 130], column)
    assert again.format == "e4m3" and same(again, direct)


def test_tiles_of_tokens_begin_anew_with_every_group() -> None:
    bounds, firsts = token_tiles([0, 130, 130, 131, 400])
    assert bounds.tolist() == [[0, 128], [128, 130], [130, 131], [131, 259], [259, 387], [387, 400]]
    assert firsts == [0, 2, 2, 3]


def test_tiles_of_groups_are_not_taken_for_those_of_the_whole(draw: Draw) -> None:
    columns = quantize_columns(values((130, 8), draw), [0, 1, 130], Quantization(tile="column"))
    with pytest.raises(ValueError, match=r"scale has shape \[3, 8\], not \[2, 8\]: data is \[130, 8\]"):
        dequantize(columns)
