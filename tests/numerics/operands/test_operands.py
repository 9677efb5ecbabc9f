"""Operands: CPU kernels bit for bit as the references, tile by tile; what is kept comes back."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dovetail.numerics import capability
from dovetail.numerics.formats.floats import float_format, round_to
from dovetail.numerics.operands.operands import (
    Operand,
    block_operand,
    column_operand,
    keep,
    keep_rows,
    retiled_operand,
    row_operand,
    scales_of,
    token_tiles,
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


def same(ours: Operand, reference: Operand) -> bool:
    grids = (each.grid.view(torch.int16) for each in (ours, reference))
    return torch.equal(*grids) and torch.equal(ours.scale, reference.scale)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e3m4", "e5m6"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_are_the_references(
    shape: tuple[int, int], name: str, power_of_two: bool, draw: Draw, by_torch: Callable[..., object]
) -> None:
    x = values(shape, draw)
    bounds, _ = token_tiles([0, shape[0] // 3, shape[0]])
    tiles: tuple[Tile, ...] = ("row", "column", "block", "tensor")
    row, column, block, tensor = (Quantization(format=name, tile=tile, power_of_two=power_of_two) for tile in tiles)
    for quantization in (row, block, tensor):
        assert same(row_operand(x, quantization), by_torch(row_operand, x, quantization))
    for quantization in (column, block, tensor):
        assert same(column_operand(x, bounds, quantization), by_torch(column_operand, x, bounds, quantization))
    for quantization in (block, tensor):
        weight = torch.stack([x, x.flip(0) * 3])
        assert same(block_operand(weight, quantization), by_torch(block_operand, weight, quantization))
    for kept_in in (row, tensor):
        operand, kept = keep_rows(x, kept_in)
        expected, reference = by_torch(keep_rows, x, kept_in)
        assert same(operand, expected)
        for each in (kept, keep(x, kept_in)):
            assert torch.equal(each.codes, reference.codes)
            assert torch.equal(each.scale, reference.scale)
        for dtype in (torch.bfloat16, torch.float32):
            assert torch.equal(kept.restore(dtype), by_torch(kept.restore, dtype))
        for quantization in (column, tensor, Quantization(tile="column")):
            ours = retiled_operand(kept, bounds, quantization)
            assert same(ours, by_torch(retiled_operand, kept, bounds, quantization))


def test_a_grid_of_fp32_is_bf16(draw: Draw, by_torch: Callable[..., object]) -> None:
    x = values((5, 300), draw, torch.float32)
    for tile in ("row", "block", "tensor"):
        quantization = Quantization(tile=tile)
        assert same(row_operand(x, quantization), by_torch(row_operand, x, quantization))


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e5m6"])
@pytest.mark.parametrize("tile", ["row", "block", "tensor"])
def test_a_grid_is_the_rounded_quotient(name: str, tile: Tile, draw: Draw) -> None:
    """Against one scale per row and tile, spelt out."""
    x, fmt = values((140, 200), draw), float_format(name)
    ours = row_operand(x, Quantization(format=name, tile=tile))
    for row in (0, 77, 139):
        rows = {"row": slice(row, row + 1), "block": slice(row // 128 * 128, row // 128 * 128 + 128)}.get(
            tile, slice(140)
        )
        for number, columns in enumerate([slice(0, 128), slice(128, 200)]):
            seen = x[rows] if tile == "tensor" else x[rows, columns]
            scale = seen.float().abs().max().clamp(min=1e-4) / fmt.max
            assert ours.scale[row, number] == scale
            assert torch.equal(ours.grid[row, columns].float(), round_to(x[row, columns].float() / scale, fmt))


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
        operand, kept = call(keep_rows, x, Quantization())
        is_nan = torch.zeros(9, 3, dtype=torch.bool)
        is_nan[4, 1] = True
        assert torch.equal(operand.scale.isnan(), is_nan)
        assert torch.equal(kept.restore().isnan().any(1), is_nan.any(1))


def test_kept_bytes(draw: Draw) -> None:
    x = values((64, 256), draw)
    assert keep(x, Quantization()).codes.nbytes == x.numel()
    assert keep(x, E5M6).codes.nbytes == 1.5 * x.numel()
