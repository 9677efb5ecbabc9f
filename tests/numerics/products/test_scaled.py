"""Products of quantised operands: the CPU kernel bit for bit as its reference, and both near the exact product."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dovetail.numerics import capability
from dovetail.numerics.formats.errors import normwise_error, tolerance
from dovetail.numerics.formats.quantize import Quantized
from dovetail.numerics.operands.operands import Operand, block_operand, column_operand, row_operand, token_tiles
from dovetail.numerics.products import scaled
from dovetail.numerics.products.accumulate import HopperAccumulator, TensorCore
from dovetail.numerics.products.scaled import dgrad, fprop, wgrad
from dovetail.numerics.products.scaled_reference import grouped_scaled_matmul, grouped_scaled_outer, transposed
from dovetail.reproduce.fp8_accumulation import measure
from dovetail.spec.precision import BLOCK, COLUMN, ROW

Draw = Callable[..., Tensor]
OFFSETS = [[0, 0, 0], [0, 5, 5], [0, 130, 301]]
WIDTHS = [(8, 8), (130, 70), (257, 300), (33, 128)]  # inputs, outputs


def operands(offsets: list[int], widths: tuple[int, int], draw: Draw) -> dict[str, Operand]:
    inputs, outputs = widths
    rows = draw(offsets[-1], inputs, dtype=torch.bfloat16)
    grad = draw(offsets[-1], outputs, dtype=torch.bfloat16, scale=1e-3)
    weight = draw(2, outputs, inputs, dtype=torch.bfloat16, scale=0.02)
    bounds, _ = token_tiles(offsets)
    return {
        "rows": row_operand(rows, ROW),
        "grad": row_operand(grad, ROW),
        "weight": block_operand(weight, BLOCK),
        "rows_t": column_operand(rows, bounds, COLUMN),
        "grad_t": column_operand(grad, bounds, COLUMN),
    }


def products(parts: dict[str, Operand], offsets: list[int], core: TensorCore | None = None) -> list[Tensor]:
    return [
        fprop(parts["rows"], parts["weight"], offsets, core),
        dgrad(parts["grad"], parts["weight"], offsets, core),
        wgrad(parts["grad_t"], parts["rows_t"], offsets, core),
    ]


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_kernel_is_the_reference_bit_for_bit(
    offsets: list[int], widths: tuple[int, int], draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = operands(offsets, widths, draw)
    ours, has_kernel = products(parts, offsets), capability.has_bf16_instructions()
    monkeypatch.setattr(capability, "has_bf16_instructions", lambda: False)
    by_tiles = products(parts, offsets)
    monkeypatch.setattr(scaled, "product_by_tiles", scaled.product_reference)
    terms = (*widths, offsets[-1] + 1)
    for mine, tiled, reference, count in zip(ours, by_tiles, products(parts, offsets), terms, strict=True):
        assert mine.dtype == tiled.dtype == torch.bfloat16
        assert torch.equal(mine, reference if has_kernel else tiled)
        assert normwise_error(tiled, reference.double()) < 2 * tolerance(torch.bfloat16, terms=count)


def wide(operand: Operand, dim: int) -> Tensor:
    """Values times scales in FP64; row tiles lie along dim 1, others are given spread."""
    scale = operand.scale.double().repeat_interleave(128, dim)
    return operand.grid.double() * scale.narrow(dim, 0, operand.grid.shape[dim])


def test_products_are_those_of_the_dequantised_matrices(draw: Draw) -> None:
    offsets = [0, 130, 301]
    parts = operands(offsets, (257, 300), draw)
    ours = products(parts, offsets)
    block = parts["weight"].scale.double().repeat_interleave(128, 1)[:, :300].repeat_interleave(128, 2)[:, :, :257]
    weight = parts["weight"].grid.double() * block
    bounds, firsts = token_tiles(offsets)
    for g, (start, stop) in enumerate([(0, 130), (130, 301)]):
        rows, grad = wide(parts["rows"], 1)[start:stop], wide(parts["grad"], 1)[start:stop]
        assert normwise_error(ours[0][start:stop], rows @ weight[g].t()) < tolerance(torch.bfloat16, terms=257)
        assert normwise_error(ours[1][start:stop], grad @ weight[g]) < tolerance(torch.bfloat16, terms=300)
        tiles = [(int(a), int(b)) for a, b in bounds.tolist() if start <= a < stop]
        columns = []
        for name in ("grad_t", "rows_t"):
            pieces = [
                parts[name].grid[a:b].double() * parts[name].scale[int(firsts[g]) + i].double()
                for i, (a, b) in enumerate(tiles)
            ]
            columns.append(torch.cat(pieces))
        assert normwise_error(ours[2][g], columns[0].t() @ columns[1]) < tolerance(torch.bfloat16, terms=171)


def test_tiles_of_tokens_begin_anew_with_every_group() -> None:
    bounds, firsts = token_tiles([0, 130, 130, 131, 400])
    assert bounds.tolist() == [[0, 128], [128, 130], [130, 131], [131, 259], [259, 387], [387, 400]]
    assert firsts.tolist() == [0, 2, 2, 3]


def quantized(operand: Operand, tile: tuple[int, int]) -> Quantized:
    return Quantized(data=operand.grid.to(torch.float8_e4m3fn), scale=operand.scale, tile=tile)


@pytest.mark.parametrize("promotion", [None, 32, 128, 256])
@pytest.mark.parametrize(("offsets", "widths"), list(zip(OFFSETS, WIDTHS[1:], strict=True)), ids=str)
def test_a_tensor_core_adds_all_groups_as_the_references_do(
    promotion: int | None, offsets: list[int], widths: tuple[int, int], draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, core = operands(offsets, widths, draw), TensorCore(HopperAccumulator(promotion), ("e4m3", "e4m3"))
    ours, dtype = products(parts, offsets, core), torch.bfloat16
    stack = parts["weight"]
    weights = [quantized(Operand(*each), (128, 128)) for each in zip(stack.grid, stack.scale, strict=True)]
    rows, grad = (quantized(parts[name], (1, 128)) for name in ("rows", "grad"))
    columns = (quantized(parts[name], (128, 1)) for name in ("grad_t", "rows_t"))
    expected = [
        grouped_scaled_matmul(rows, weights, offsets, core.accumulator, dtype),
        grouped_scaled_matmul(grad, [transposed(each) for each in weights], offsets, core.accumulator, dtype),
        grouped_scaled_outer(*columns, offsets, core.accumulator, dtype),
    ]
    monkeypatch.setattr(scaled, "takes_scales", lambda *scales, formats: False)
    for mine, right, by_group in zip(ours, expected, products(parts, offsets, core), strict=True):
        assert mine.dtype == dtype
        assert torch.equal(mine, right) and torch.equal(by_group, right)
    if offsets[-1] > 128 and promotion is None:
        assert not any(torch.equal(x, y) for x, y in zip(ours, products(parts, offsets), strict=True))


def test_what_no_promotion_costs_is_what_the_tensor_core_shows(draw: Draw) -> None:
    """Positive values, K = 2048: the error of long sums, under scales of tiles as under one scale."""
    k = 2048
    rows = row_operand(draw(32, k, dtype=torch.bfloat16).float().sigmoid().bfloat16(), ROW)
    weight = block_operand(draw(1, 32, k, dtype=torch.bfloat16).float().sigmoid().bfloat16(), BLOCK)
    tiles = weight.scale[0].double().repeat_interleave(128, 1)
    exact = wide(rows, 1) @ (weight.grid[0].double() * tiles).t()
    shown = {row.promotion: row.rms for row in measure("uniform 0..1", k, 32)}
    for promotion in (None, 128):
        core = TensorCore(HopperAccumulator(promotion), ("e4m3", "e4m3"))
        error = normwise_error(fprop(rows, weight, [0, 32], core), exact)
        bf16 = tolerance(torch.bfloat16)
        assert shown[promotion] / 2 - bf16 < error < 2 * shown[promotion] + bf16
    assert shown[None] > 10 * shown[128] and shown[None] > 4 * bf16


def test_what_is_not_finite_stays_so_on_a_tensor_core(draw: Draw) -> None:
    x, weight = draw(3, 256, dtype=torch.bfloat16), draw(1, 8, 256, dtype=torch.bfloat16)
    x[1, 200] = float("inf")
    output = fprop(
        row_operand(x, ROW), block_operand(weight, BLOCK), [0, 3], TensorCore(HopperAccumulator(), ("e4m3", "e4m3"))
    )
    assert output.isfinite().all(1).tolist() == [True, False, True]
