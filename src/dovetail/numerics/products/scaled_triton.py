"""`numerics.products.scaled` for operands whose grids are FP8, on a GPU's Tensor Cores (`gemm_triton`).

Sums within 128 of k are the Tensor Core's own, those over tiles FP32 [V3 §3.3.2].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dovetail.numerics.formats.quantize import TORCH_DTYPES, Quantized
from dovetail.numerics.operands.operands import TILE, Operand
from dovetail.numerics.products.accumulate import Accumulator
from dovetail.numerics.products.scaled_kernels_triton import grouped_scaled_matmul, grouped_scaled_outer, scaled_matmul

FORMATS = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def by_rows(
    rows: Operand, weight: Operand, offsets: Sequence[int], accumulator: Accumulator, transposed: bool
) -> Tensor:
    """Each group's rows times its weight's rows, or, `transposed`, its columns."""
    grid, scale = weight.grid, weight.scale
    if transposed:  # FP8 products on Hopper read along k alone: a copy of eight bits is a small part of the product
        grid, scale = grid.transpose(1, 2).contiguous(), scale.transpose(1, 2).contiguous()
    left = _quantized(rows.grid, rows.scale, (1, TILE))
    weights = [_quantized(*each, (TILE, TILE)) for each in zip(grid, scale, strict=True)]
    if len(weights) == 1:
        return scaled_matmul(left, weights[0], accumulator)  # no table of groups has to be sent to the GPU
    return grouped_scaled_matmul(left, weights, offsets, accumulator)


def wgrad(grad: Operand, rows: Operand, offsets: Sequence[int], accumulator: Accumulator) -> Tensor:
    left, right = (_quantized(each.grid, each.scale, (TILE, 1)) for each in (grad, rows))
    return grouped_scaled_outer(left, right, offsets, accumulator, torch.bfloat16)


def _quantized(grid: Tensor, scale: Tensor, tile: tuple[int, int]) -> Quantized:
    return Quantized(data=grid, scale=scale, tile=tile, format=FORMATS[grid.dtype])
