"""Products of quantised operands: the CPU kernel bit for bit as its reference, and both near the exact product."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dovetail.numerics import gemm_numba, scaled_gemm
from dovetail.numerics.compare import normwise_error, tolerance
from dovetail.numerics.operands import Operand, block_operand, column_operand, row_operand, token_tiles
from dovetail.numerics.scaled_gemm import dgrad, fprop, wgrad
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


def products(parts: dict[str, Operand], offsets: list[int]) -> list[Tensor]:
    return [
        fprop(parts["rows"], parts["weight"], offsets),
        dgrad(parts["grad"], parts["weight"], offsets),
        wgrad(parts["grad_t"], parts["rows_t"], offsets),
    ]


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_kernel_is_the_reference_bit_for_bit(
    offsets: list[int], widths: tuple[int, int], draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = operands(offsets, widths, draw)
    ours, has_kernel = products(parts, offsets), gemm_numba.is_available()
    monkeypatch.setattr(gemm_numba, "is_available", lambda: False)
    by_tiles = products(parts, offsets)
    monkeypatch.setattr(scaled_gemm, "product_by_tiles", scaled_gemm.product_reference)
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
