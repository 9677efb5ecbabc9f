"""Operands that a GPU makes: bit for bit those of a CPU, in float8 where it multiplies that, and kept alike."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dovetail.numerics.formats.quantize import dequantize
from dovetail.numerics.formats.quantized import Quantized, codes_of
from dovetail.numerics.operands.health import measure_health
from dovetail.numerics.operands.operands import (
    keep,
    quantize_and_keep,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
    retile,
)
from dovetail.spec.precision import ROW, Quantization, Tile

pytest.importorskip("triton", reason="Triton is published for Linux only")

Draw = Callable[..., Tensor]
SHAPES = [(0, 5), (1, 1), (3, 128), (130, 257), (5, 300)]
E5M6 = Quantization(format="e5m6", power_of_two=True)


def values(shape: tuple[int, int], draw: Draw) -> Tensor:
    """Normal numbers of very different rows, zeros of both signs, a row of zeros, and values that fall below the
    smallest normal."""
    x = draw(*shape) * torch.exp2(torch.arange(shape[0]) % 40 - 20.0)[:, None]
    x[:, ::7] *= 1e-4
    x[:, 3::11] = -0.0
    x[2:3] = 0
    return x.bfloat16()


def same(gpu: Quantized, cpu: Quantized) -> bool:
    """Also the signs of zeros, and NaN where there is NaN."""
    (ours, theirs), scales = (each.data.float().cpu() for each in (gpu, cpu)), (gpu.scale.cpu(), cpu.scale)
    return (
        (gpu.tile, gpu.format, gpu.columns) == (cpu.tile, cpu.format, cpu.columns)
        and all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in ((ours, theirs), scales))
        and torch.equal(ours.isnan(), theirs.isnan())
        and torch.equal(ours.nan_to_num().signbit(), theirs.nan_to_num().signbit())
    )


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operands_are_those_of_a_cpu(
    shape: tuple[int, int], power_of_two: bool, format: str, draw: Draw, with_triton: Callable[[], object]
) -> None:
    x = values(shape, draw)
    offsets = [0, shape[0] // 3, shape[0] // 3, shape[0]]

    def quantization(tile: Tile) -> Quantization:
        return Quantization(format=format, tile=tile, power_of_two=power_of_two)

    row, column, block = quantization("row"), quantization("column"), quantization("block")
    stacked = torch.stack((x, x.flip(0)))
    expected = [quantize_rows(x, row), quantize_columns(x, offsets, column), quantize_blocks(stacked, block)]
    with with_triton() as device:
        x = x.to(device)
        ours = [quantize_rows(x, row), quantize_columns(x, offsets, column)]
        ours += [quantize_blocks(stacked.to(device), block)]
    for mine, cpu in zip(ours, expected, strict=True):
        assert mine.data.element_size() == 1 and same(mine, cpu)


@pytest.mark.parametrize("kept_in", [Quantization(), Quantization(format="e5m2"), E5M6], ids=lambda each: each.format)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_kept_is_what_a_cpu_keeps(
    shape: tuple[int, int], kept_in: Quantization, draw: Draw, with_triton: Callable[[], object]
) -> None:
    x, column = values(shape, draw), Quantization(tile="column")
    offsets = [0, shape[0] // 3, shape[0]]
    cpu = keep(x, kept_in)
    restored = [dequantize(cpu, dtype) for dtype in (torch.bfloat16, torch.float32)]
    retiled = retile(cpu, offsets, column)
    with with_triton() as device:
        ours = keep(x.to(device), kept_in)
        assert torch.equal(codes_of(ours).cpu(), codes_of(cpu)) and torch.equal(ours.scale.cpu(), cpu.scale)
        assert (ours.tile, ours.format, ours.columns) == (cpu.tile, cpu.format, cpu.columns)
        for expected in restored:
            assert torch.equal(dequantize(ours, expected.dtype).cpu(), expected)
        mine = retile(ours, offsets, column)
    assert mine.data.element_size() == 1 and same(mine, retiled)


def test_other_formats_and_tiles_come_from_the_references(draw: Draw, with_triton: Callable[[], object]) -> None:
    """In BF16, which products take tile by tile."""
    x = values((140, 200), draw)
    cases = [Quantization(format="e5m6"), Quantization(tile="tensor")]
    expected = [quantize_rows(x, each) for each in cases]
    columns = quantize_columns(x, [0, 140], Quantization(tile="tensor"))
    weight = quantize_blocks(x[None], Quantization(tile="tensor"))
    with with_triton() as device:
        x = x.to(device)
        ours = [quantize_rows(x, each) for each in cases]
        ours += [quantize_columns(x, [0, 140], Quantization(tile="tensor"))]
        ours += [quantize_blocks(x[None], Quantization(tile="tensor"))]
    for mine, cpu in zip(ours, [*expected, columns, weight], strict=True):
        assert mine.data.dtype == torch.bfloat16 and same(mine, cpu)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_in_its_tile_alone(
    poison: float, draw: Draw, with_triton: Callable[[], object]
) -> None:
    x = values((9, 300), draw)
    x[4, 130] = poison
    expected, _ = quantize_and_keep(x, Quantization())
    with with_triton() as device:
        rows, kept = quantize_and_keep(x.to(device), Quantization())
        restored = dequantize(kept, torch.bfloat16).cpu()
    assert torch.equal(rows.scale.cpu().isfinite(), expected.scale.isfinite())
    assert not restored[4, 128:256].isfinite().any()
    restored[4, 128:256] = 0
    assert restored.isfinite().all()


def test_health_is_that_of_the_same_values_in_bf16(draw: Draw, with_triton: Callable[[], object]) -> None:
    x = values((9, 300), draw)
    measured = []
    with with_triton() as device:
        on_gpu = quantize_rows(x.to(device), ROW)
    for rows in (on_gpu, quantize_rows(x, ROW)):
        measured.append(measure_health(x.to(rows.data.device), rows))
    assert measured[0] == measured[1] and measured[0].flushed > 0
