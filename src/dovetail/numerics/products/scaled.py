"""The three products of a linear layer on quantised operands, for all groups (experts) at once.

    fprop   rows [R, K], weight [G, N, K]             -> [R, N]       rows weight^T
    dgrad   grad [R, N], weight [G, N, K]             -> [R, K]       grad weight
    wgrad   grad [R, N], rows [R, K] (column tiles)   -> [G, N, K]    grad^T rows

Rows offsets[g] : offsets[g + 1] belong to group g. A sum runs over tiles of 128 of k; each tile's sum is multiplied by
the product of its two scales and added in FP32 [V3 §3.3.2], or kept as a `HopperAccumulator` does (`accumulate`). BF16
comes out. `grouped` has the same three for operands that are not quantised.

Each module below has all three, with these arguments:

    scaled_triton       a GPU whose Tensor Cores multiply FP8, for operands in float8
    scaled_numba        a CPU: FP32 sums where it has BF16 instructions, Hopper's on any
    scaled_torch        FP32 sums anywhere else
    scaled_reference    the definition, exact to the bit, slow: what kernels are held to, and Hopper's sums elsewhere
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from dovetail.numerics import capability
from dovetail.numerics.formats.quantized import BLOCK_TILE, COLUMN_TILE, ROW_TILE, TILE, TORCH_DTYPES, Quantized
from dovetail.numerics.products import scaled_numba, scaled_reference, scaled_torch
from dovetail.numerics.products.accumulate import takes_scales
from dovetail.numerics.products.accumulators import FP32, HOPPER, Accumulator, Fp32Accumulator

Tile = tuple[int, int]


def fprop(rows: Quantized, weight: Quantized, offsets: Sequence[int], accumulator: Accumulator = FP32) -> Tensor:
    path, sums = _path(rows, weight, (ROW_TILE, BLOCK_TILE), accumulator)
    return path.fprop(rows, weight, offsets, sums)


def dgrad(grad: Quantized, weight: Quantized, offsets: Sequence[int], accumulator: Accumulator = FP32) -> Tensor:
    path, sums = _path(grad, weight, (ROW_TILE, BLOCK_TILE), accumulator)
    return path.dgrad(grad, weight, offsets, sums)


def wgrad(grad: Quantized, rows: Quantized, offsets: Sequence[int], accumulator: Accumulator = FP32) -> Tensor:
    """Zero for a group without rows."""
    path, sums = _path(grad, rows, (COLUMN_TILE, COLUMN_TILE), accumulator)
    return path.wgrad(grad, rows, offsets, sums)


def _path(
    a: Quantized, b: Quantized, tiles: tuple[Tile, Tile], accumulator: Accumulator
) -> tuple[ModuleType, Accumulator]:
    """The module that multiplies these operands, and the sums it is asked for."""
    for each, tile in zip((a, b), tiles, strict=True):
        assert each.tile == tile, f"an operand in tiles {each.tile}, not {tile}: see numerics.operands"
        assert each.data.is_floating_point(), f"an operand in codes ({each.data.dtype}): see numerics.operands"
    if _is_for_tensor_cores(a, b, accumulator):
        from dovetail.numerics.products import scaled_triton  # Triton comes with torch's CUDA builds only

        # Sums within a tile are the Tensor Core's own, whichever a recipe names.
        return scaled_triton, HOPPER if isinstance(accumulator, Fp32Accumulator) else accumulator
    if isinstance(accumulator, Fp32Accumulator):
        return scaled_numba if capability.on_bf16_cpu(a.data, b.data) else scaled_torch, accumulator
    # Values that are not finite have scales that are not.
    has_kernel = capability.on_cpu(a.data, b.data) and takes_scales(a.scale, b.scale, formats=(a.format, b.format))
    return scaled_numba if has_kernel else scaled_reference, accumulator


def _is_for_tensor_cores(a: Quantized, b: Quantized, accumulator: Accumulator) -> bool:
    """An operand in FP8 beside one in BF16 is not for them, nor are sums that their kernels do not make: they promote
    within a tile or at its end."""
    promotion = TILE if isinstance(accumulator, Fp32Accumulator) else accumulator.promotion
    is_within_tile = promotion is not None and TILE % promotion == 0
    is_fp8 = all(each.data.dtype in TORCH_DTYPES.values() for each in (a, b))
    return is_within_tile and is_fp8 and capability.on_fp8_gpu(a.data, b.data)
