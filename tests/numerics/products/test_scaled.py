"""Products of quantised operands: the CPU kernel bit for bit as its reference, and both near the exact product."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dovetail.numerics import capability
from dovetail.numerics.formats.errors import normwise_error, tolerance
from dovetail.numerics.formats.quantized import Quantized, grid_values, spread_scale, token_tiles
from dovetail.numerics.operands.operands import quantize_blocks, quantize_columns, quantize_rows
from dovetail.numerics.products import accumulate, scaled, scaled_numba, scaled_reference, scaled_torch
from dovetail.numerics.products.accumulators import FP32, HOPPER, Accumulator, HopperAccumulator
from dovetail.numerics.products.scaled import dgrad, fprop, wgrad
from dovetail.reproduce.fp8_accumulation import measure
from dovetail.spec.precision import BLOCK, COLUMN, ROW

Draw = Callable[..., Tensor]
OFFSETS = [[0, 0, 0], [0, 5, 5], [0, 130, 301]]
WIDTHS = [(8, 8), (130, 70), (257, 300), (33, 128)]  # inputs, outputs


def operands(offsets: list[int], widths: tuple[int, int], draw: Draw) -> dict[str, Quantized]:
    inputs, outputs = widths
    rows = draw(offsets[-1], inputs, dtype=torch.bfloat16)
    grad = draw(offsets[-1], outputs, dtype=torch.bfloat16, scale=1e-3)
    weight = draw(2, outputs, inputs, dtype=torch.bfloat16, scale=0.02)
    return {
        "rows": quantize_rows(rows, ROW),
        "grad": quantize_rows(grad, ROW),
        "weight": quantize_blocks(weight, BLOCK),
        "rows_t": quantize_columns(rows, offsets, COLUMN),
        "grad_t": quantize_columns(grad, offsets, COLUMN),
    }


def products(
    parts: dict[str, Quantized], offsets: list[int], accumulator: Accumulator = FP32, path: ModuleType = scaled
) -> list[Tensor]:
    """By the module that `scaled` chooses, or by another."""
    return [
        path.fprop(parts["rows"], parts["weight"], offsets, accumulator),
        path.dgrad(parts["grad"], parts["weight"], offsets, accumulator),
        path.wgrad(parts["grad_t"], parts["rows_t"], offsets, accumulator),
    ]


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_kernel_is_the_reference_bit_for_bit(
    offsets: list[int], widths: tuple[int, int], draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = operands(offsets, widths, draw)
    ours, has_kernel = products(parts, offsets), capability.has_bf16_instructions()
    monkeypatch.setattr(capability, "has_bf16_instructions", lambda: False)
    by_tiles, references = products(parts, offsets), products(parts, offsets, path=scaled_reference)
    terms = (*widths, offsets[-1] + 1)
    for mine, tiled, reference, count in zip(ours, by_tiles, references, terms, strict=True):
        assert mine.dtype == tiled.dtype == torch.bfloat16
        assert torch.equal(mine, reference if has_kernel else tiled)
        assert normwise_error(tiled, reference.double()) < 2 * tolerance(torch.bfloat16, terms=count)


def test_each_path_is_taken_where_it_is_for(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight = quantize_rows(draw(3, 256).bfloat16(), ROW), quantize_blocks(draw(2, 8, 256).bfloat16(), BLOCK)
    tiles, in_fp8 = (rows.tile, weight.tile), replace(rows, data=rows.data.to(torch.float8_e4m3fn))
    inside, never = HopperAccumulator(32), HopperAccumulator(None)
    for has_instructions in (True, False):
        monkeypatch.setattr(capability, "has_bf16_instructions", lambda answer=has_instructions: answer)
        fp32 = scaled_numba if has_instructions else scaled_torch
        assert scaled._path(rows, weight, tiles, FP32) == (fp32, FP32)
        for accumulator in (HOPPER, inside, never):
            assert scaled._path(rows, weight, tiles, accumulator) == (scaled_numba, accumulator)
        assert scaled._path(in_fp8, weight, tiles, FP32) == (scaled_torch, FP32)
        assert scaled._path(in_fp8, weight, tiles, HOPPER) == (scaled_reference, HOPPER)


def test_operands_of_another_product_are_refused(draw: Draw) -> None:
    parts = operands([0, 1, 3], (256, 8), draw)
    codes = replace(parts["rows"], data=parts["rows"].data.to(torch.float8_e4m3fn).view(torch.uint8))
    with pytest.raises(AssertionError, match=r"in codes \(torch.uint8\)"):
        fprop(codes, parts["weight"], [0, 1, 3])
    with pytest.raises(AssertionError, match=r"in tiles \(128, 1\), not \(1, 128\)"):
        dgrad(parts["grad_t"], parts["weight"], [0, 1, 3])
    with pytest.raises(AssertionError, match=r"in tiles \(1, 128\), not \(128, 1\)"):
        wgrad(parts["grad_t"], parts["rows"], [0, 1, 3])


def wide(quantized: Quantized) -> Tensor:
    """Values times scales in FP64."""
    return grid_values(quantized).double() * spread_scale(quantized).double()


def test_products_are_those_of_the_dequantised_matrices(draw: Draw) -> None:
    offsets = [0, 130, 301]
    parts = operands(offsets, (257, 300), draw)
    ours = products(parts, offsets)
    block = parts["weight"].scale.double().repeat_interleave(128, 1)[:, :300].repeat_interleave(128, 2)[:, :, :257]
    weight = parts["weight"].data.double() * block
    bounds, firsts = token_tiles(offsets)
    for g, (start, stop) in enumerate([(0, 130), (130, 301)]):
        rows, grad = wide(parts["rows"])[start:stop], wide(parts["grad"])[start:stop]
        assert normwise_error(ours[0][start:stop], rows @ weight[g].t()) < tolerance(torch.bfloat16, terms=257)
        assert normwise_error(ours[1][start:stop], grad @ weight[g]) < tolerance(torch.bfloat16, terms=300)
        tiles = [(int(a), int(b)) for a, b in bounds.tolist() if start <= a < stop]
        columns = []
        for name in ("grad_t", "rows_t"):
            pieces = [
                parts[name].data[a:b].double() * parts[name].scale[firsts[g] + i].double()
                for i, (a, b) in enumerate(tiles)
            ]
            columns.append(torch.cat(pieces))
        assert normwise_error(ours[2][g], columns[0].t() @ columns[1]) < tolerance(torch.bfloat16, terms=171)


@pytest.mark.parametrize("promotion", [None, 32, 128, 256])
@pytest.mark.parametrize(("offsets", "widths"), list(zip(OFFSETS, WIDTHS[1:], strict=True)), ids=str)
def test_a_tensor_core_adds_all_groups_as_the_references_do(
    promotion: int | None, offsets: list[int], widths: tuple[int, int], draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, accumulator = operands(offsets, widths, draw), HopperAccumulator(promotion)
    ours = products(parts, offsets, accumulator)
    monkeypatch.setattr(accumulate, "_has_kernel", lambda *arguments: False)
    references = products(parts, offsets, accumulator, scaled_reference)
    for mine, reference in zip(ours, references, strict=True):
        assert mine.dtype == torch.bfloat16 and torch.equal(mine, reference)
    if offsets[-1] > 128 and promotion is None:
        assert not any(torch.equal(x, y) for x, y in zip(ours, products(parts, offsets), strict=True))


def test_what_no_promotion_costs_is_what_the_tensor_core_shows(draw: Draw) -> None:
    """Positive values, K = 2048: the error of long sums, under scales of tiles as under one scale."""
    k = 2048
    rows = quantize_rows(draw(32, k, dtype=torch.bfloat16).float().sigmoid().bfloat16(), ROW)
    weight = quantize_blocks(draw(1, 32, k, dtype=torch.bfloat16).float().sigmoid().bfloat16(), BLOCK)
    exact = wide(rows) @ wide(weight)[0].t()
    shown = {row.promotion: row.rms for row in measure("uniform 0..1", k, 32)}
    for promotion in (None, 128):
        error = normwise_error(fprop(rows, weight, [0, 32], HopperAccumulator(promotion)), exact)
        bf16 = tolerance(torch.bfloat16)
        assert shown[promotion] / 2 - bf16 < error < 2 * shown[promotion] + bf16
    assert shown[None] > 10 * shown[128] and shown[None] > 4 * bf16


def test_what_is_not_finite_stays_so_on_a_tensor_core(draw: Draw) -> None:
    x, weight = draw(3, 256, dtype=torch.bfloat16), draw(1, 8, 256, dtype=torch.bfloat16)
    x[1, 200] = float("inf")
    output = fprop(quantize_rows(x, ROW), quantize_blocks(weight, BLOCK), [0, 3], HOPPER)
    assert output.isfinite().all(1).tolist() == [True, False, True]
