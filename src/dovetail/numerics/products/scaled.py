"""The three products of a linear layer on quantised operands, for all groups (experts) at once.

    fprop   rows [R, K], weight [G, N, K]          -> [R, N]
    dgrad   grad [R, N], weight [G, N, K]          -> [R, K]
    wgrad   grad [R, N], rows [R, K] (column tiles) -> [G, N, K]

A sum runs over tiles of 128 of k; each tile's sum is multiplied by the product of its two scales and added in FP32
[V3 §3.3.2], or, with a `TensorCore`, summed as `accumulate.matmul` does. Rows offsets[g] : offsets[g + 1] belong to
group g. BF16 comes out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from dovetail.numerics import capability
from dovetail.numerics.cpu.kernels import array
from dovetail.numerics.operands.operands import TILE, Operand, spread, token_tiles
from dovetail.numerics.products import accumulate_numba, scaled_numba
from dovetail.numerics.products.accumulate import (
    HopperAccumulator,
    Scales,
    TensorCore,
    least_exponents,
    matmul,
    takes_scales,
)
from dovetail.numerics.products.grouped import bounds_of


def fprop(rows: Operand, weight: Operand, offsets: Sequence[int], core: TensorCore | None = None) -> Tensor:
    return _by_rows(rows, weight, offsets, core, transposed=False)


def dgrad(grad: Operand, weight: Operand, offsets: Sequence[int], core: TensorCore | None = None) -> Tensor:
    return _by_rows(grad, weight, offsets, core, transposed=True)


def _by_rows(
    rows: Operand, weight: Operand, offsets: Sequence[int], core: TensorCore | None, transposed: bool
) -> Tensor:
    """Each group's rows times its weight's rows, or, `transposed`, its columns."""
    if _is_for_tensor_cores(rows, weight, core):
        from dovetail.numerics.products import scaled_triton  # Triton comes with torch's CUDA builds only

        return scaled_triton.by_rows(rows, weight, offsets, _accumulator(core), transposed)
    grid, scale = weight.grid, weight.scale
    if transposed:
        grid, scale = grid.transpose(1, 2), scale.transpose(1, 2)
    groups, width, inner = grid.shape
    output = rows.grid.new_empty(len(rows.grid), width, dtype=torch.bfloat16)
    if not _has_kernel(rows, weight, core):
        for g, here in _groups(offsets):
            output[here] = _product(core, rows.grid[here], grid[g], rows.scale[here], spread(scale[g], 0, width))
        return output
    starts, counts = bounds_of(offsets)
    experts, tiles = np.arange(groups), rows.scale.shape[1]
    _multiply(
        (rows, weight, output),
        (starts * inner, experts * width * inner, starts * width),
        (counts, width, inner),
        (inner, weight.grid.shape[2], width),
        (True, not transposed),
        (starts * tiles, experts * scale[0].numel()),
        (tiles, 1, *scale.stride()[1:]),
        TILE,
        core,
    )
    return output


def wgrad(grad: Operand, rows: Operand, offsets: Sequence[int], core: TensorCore | None = None) -> Tensor:
    """Zero for a group without rows."""
    if _is_for_tensor_cores(grad, rows, core):
        from dovetail.numerics.products import scaled_triton

        return scaled_triton.wgrad(grad, rows, offsets, _accumulator(core))
    (height, width), groups = (grad.grid.shape[1], rows.grid.shape[1]), len(offsets) - 1
    output = grad.grid.new_empty(groups, height, width, dtype=torch.bfloat16)
    bounds, firsts = token_tiles(offsets)
    if not _has_kernel(grad, rows, core):
        ends = [*firsts[1:].tolist(), len(bounds)]
        for g, here in _groups(offsets):
            tiles = slice(int(firsts[g]), ends[g])
            left, right = (each.grid[here].t() for each in (grad, rows))
            output[g] = _product(core, left, right, grad.scale[tiles].t(), rows.scale[tiles].t())
        return output
    starts, counts = bounds_of(offsets)
    _multiply(
        (grad, rows, output),
        (starts * height, starts * width, np.arange(groups) * height * width),
        (height, width, counts),
        (height, width, width),
        (False, False),
        (firsts * height, firsts * width),
        (1, height, 1, width),
        1,
        core,
    )
    return output


def _has_kernel(a: Operand, b: Operand, core: TensorCore | None) -> bool:
    # Values that are not finite have scales that are not.
    return (
        capability.on_bf16_cpu(a.grid, b.grid) if core is None else takes_scales(a.scale, b.scale, formats=core.formats)
    )


def _product(core: TensorCore | None, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    """a [M, K] b^T [K, N] with scales [M, tiles] and [N, tiles], where there is no kernel."""
    if core is None:
        return product_by_tiles(a, b, a_scale, b_scale)
    scales = Scales(a=a_scale, b=b_scale, width=TILE)
    return matmul(a.float(), b.float(), core.accumulator, scales, core.formats).to(torch.bfloat16)


def product_by_tiles(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    """A product per tile."""
    total = torch.zeros(len(a), len(b), dtype=torch.float32, device=a.device)
    for tile in range(a_scale.shape[1]):
        terms = slice(tile * TILE, (tile + 1) * TILE)
        part = a[:, terms].float() @ b[:, terms].float().t()
        total += part * (a_scale[:, tile, None] * b_scale[None, :, tile])
    return total.to(torch.bfloat16)


def product_reference(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    """The same in the kernel's order of summation and bit for bit its result, short of a double rounding (FP64, then
    FP32) where each tile's sum is added."""
    total = torch.zeros(len(a), len(b), dtype=torch.float32, device=a.device)
    wide_a, wide_b = a.float(), b.float()
    for tile in range(a_scale.shape[1]):
        part = torch.zeros_like(total)
        end = min((tile + 1) * TILE, a.shape[1])
        for k in range(tile * TILE, end, 2):
            for each in (k + 1, k):  # the odd one of a pair first
                if each < end:
                    part += wide_a[:, each, None] * wide_b[None, :, each]  # the product is exact
        factor = a_scale[:, tile, None] * b_scale[None, :, tile]
        total = (total.double() + part.double() * factor.double()).float()
    return total.to(torch.bfloat16)


def _multiply(
    tensors: tuple[Operand, Operand, Tensor],
    starts: tuple[np.ndarray, ...],
    sizes: tuple[np.ndarray | int, ...],
    strides: tuple[int, int, int],
    is_inner: tuple[bool, bool],
    scale_starts: tuple[np.ndarray, np.ndarray],
    scale_strides: tuple[int, int, int, int],
    block: int,
    core: TensorCore | None,
) -> None:
    left, right, out = tensors
    groups = len(starts[0])
    arguments = (
        *(array(x.reshape(-1)) for x in (left.grid, right.grid, out)),
        np.stack(starts, axis=1),
        np.stack([np.broadcast_to(size, groups) for size in sizes], axis=1),
        np.array(strides),
        *is_inner,
        *(array(x.contiguous().reshape(-1)) for x in (left.scale, right.scale)),
        np.stack(scale_starts, axis=1),
        np.array(scale_strides),
        block,
        numba.get_num_threads(),
    )
    if core is None:
        scaled_numba.grouped_scaled_gemm(*arguments)
    else:
        least, step = least_exponents(core.formats), core.accumulator.promotion or 0
        accumulate_numba.grouped_hopper(*arguments, least, TILE, step)


def _is_for_tensor_cores(a: Operand, b: Operand, core: TensorCore | None) -> bool:
    """Only a GPU has FP8 operands. One beside another in BF16 goes tile by tile, as do sums that its kernels do not
    make: they promote within a tile or at its end."""
    promotion = _accumulator(core).promotion
    is_within_tile = promotion is not None and TILE % promotion == 0
    return is_within_tile and all(operand.grid.element_size() == 1 for operand in (a, b))


def _accumulator(core: TensorCore | None) -> HopperAccumulator:
    """What a GPU uses: sums within a tile are its own, whichever a recipe names."""
    return HopperAccumulator() if core is None else core.accumulator


def _groups(offsets: Sequence[int]) -> list[tuple[int, slice]]:
    return [(g, slice(start, stop)) for g, (start, stop) in enumerate(zip(offsets, offsets[1:], strict=False))]
