"""The products of `scaled_reference` as Triton kernels, for FP8 Tensor Cores (Hopper first).

    fprop, dgrad    each group's rows, which lie one after another       prefill and training
    wgrad           sums over each group's rows
    masked_fprop    each group's first rows of a fixed number            decoding: no shape depends on routing

`HopperAccumulator(promotion)` multiplies as FP8; how the Tensor Core adds within an interval is its own. Under
`Fp32Accumulator` values are widened to FP16, which is exact, and added in FP32, at half the rate.
Operands are fast when contiguous along K with rows that begin at multiples of 16 bytes; others are correct.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import triton
from torch import Tensor

from dovetail.numerics.formats.quantized import (
    TORCH_DTYPES,
    Quantized,
    capacity_of,
    check_groups,
    check_height,
    check_scale,
    token_tiles,
    transposed,
)
from dovetail.numerics.products.accumulators import HOPPER, Accumulator, Fp32Accumulator
from dovetail.numerics.products.scaled_blocks_triton import (
    BAND,
    CONTIGUOUS,
    DENSE,
    HOPPER_MULTIPROCESSORS,
    MASKED,
    Blocking,
    choose_blocking,
    multiply,
    sum_outer,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Which rows belong to which group."""

    layout: object  # DENSE, CONTIGUOUS, MASKED
    groups: Sequence[int] | Tensor | None  # offsets (CONTIGUOUS) or numbers of rows (MASKED)
    counts: Sequence[int]  # rows of each group, at most


def fprop(
    rows: Quantized,
    weight: Quantized,
    offsets: Sequence[int],
    accumulator: Accumulator = HOPPER,
    dtype: torch.dtype = torch.bfloat16,
    blocking: Blocking | None = None,
) -> Tensor:
    """rows [R, K] by weight [G, N, K] transposed -> [R, N]; tiles of one width, those of rows of height 1 unless there
    is one group, which also needs no table of groups on the GPU."""
    groups = len(weight.data)
    check_groups(offsets, len(rows.data), groups)
    counts = [stop - start for start, stop in pairwise(offsets)]
    if groups == 1:
        return _multiply(rows, weight, Rows(layout=DENSE, groups=None, counts=counts), accumulator, dtype, blocking)
    check_height(rows, groups)
    where = Rows(layout=CONTIGUOUS, groups=offsets, counts=counts)
    return _multiply(rows, weight, where, accumulator, dtype, blocking)


def dgrad(
    grad: Quantized,
    weight: Quantized,
    offsets: Sequence[int],
    accumulator: Accumulator = HOPPER,
    dtype: torch.dtype = torch.bfloat16,
    blocking: Blocking | None = None,
) -> Tensor:
    """grad [R, N] by weight [G, N, K] -> [R, K]. FP8 products on Hopper read along k alone: a transposed copy of eight
    bits is a small part of the product."""
    turned = transposed(weight)
    turned = replace(turned, data=turned.data.contiguous(), scale=turned.scale.contiguous())
    return fprop(grad, turned, offsets, accumulator, dtype, blocking)


def masked_fprop(
    rows: Quantized,
    weight: Quantized,
    counts: Tensor,
    accumulator: Accumulator = HOPPER,
    dtype: torch.dtype = torch.bfloat16,
    blocking: Blocking | None = None,
) -> Tensor:
    """rows [G * capacity, K]: `capacity` of each group, of which the first counts[g] (int32 on their device) hold
    values. They are multiplied by weight g transposed -> [G * capacity, N], whose other rows are left as they are in
    fresh memory. Nothing waits for the GPU [DeepGEMM's masked layout]."""
    groups = len(weight.data)
    capacity = capacity_of(rows, counts, groups)
    where = Rows(layout=MASKED, groups=counts, counts=[capacity] * groups)
    return _multiply(rows, weight, where, accumulator, dtype, blocking)


def wgrad(
    grad: Quantized,
    rows: Quantized,
    offsets: Sequence[int],
    accumulator: Accumulator = HOPPER,
    dtype: torch.dtype = torch.bfloat16,
    blocking: Blocking | None = None,
) -> Tensor:
    """grad [R, N] transposed times rows [R, K], both in tiles 128x1, for each group's rows -> [G, N, K].

    As in the reference, rows are tiled group by group. Fast where both are K-major, as `quantize_triton` writes such
    tiles, and every group's rows begin at a multiple of 128.
    """
    height, width, tile = grad.data.shape[1], rows.data.shape[1], grad.tile[0]
    counts = [stop - start for start, stop in pairwise(offsets)]
    bounds, firsts = token_tiles(offsets, tile)
    for each in (grad, rows):
        expected = (len(bounds), each.data.shape[1])
        if each.tile != (tile, 1) or each.data.dtype not in TORCH_DTYPES.values() or each.scale.shape != expected:
            raise ValueError(
                f"{each.format} {list(each.data.shape)} in tiles {list(each.tile)}, scales {list(each.scale.shape)}:"
                f" experts with rows {list(offsets)} need FP8 in tiles {[tile, 1]} with scales {list(expected)}"
            )
    promotion, is_wide = _interval(accumulator, tile, max(counts, default=0))
    out = grad.data.new_empty(len(counts), height, width, dtype=dtype)
    if not out.numel():
        return out
    table = _table(zip(offsets, counts, firsts, strict=False), out.device)
    blocking = blocking or choose_blocking([height] * len(counts), width, _multiprocessors(out.device))
    grid = (triton.cdiv(height, blocking.rows) * triton.cdiv(width, blocking.columns), len(counts))
    sum_outer[grid](
        grad.data, grad.scale.contiguous(), rows.data, rows.scale.contiguous(), out, table, height, width,
        *grad.data.stride(), *rows.data.stride(), WIDTH=tile, PROMOTION=promotion,
        IS_EVEN=all(count % tile == 0 for count in counts), IS_WIDE=is_wide, **blocking.options,
    )  # fmt: skip
    return out


def _multiply(
    a: Quantized, b: Quantized, rows: Rows, accumulator: Accumulator, dtype: torch.dtype, blocking: Blocking | None
) -> Tensor:
    """a [M, K] by b [G, N, K] transposed -> [M, N]."""
    _check_operands(a, b)
    promotion, is_wide = _interval(accumulator, a.tile[1], a.data.shape[1])
    (height, inner), columns = a.data.shape, b.data.shape[1]
    out = a.data.new_empty(height, columns, dtype=dtype)
    if not out.numel():
        return out
    blocking = blocking or choose_blocking(rows.counts, columns, _multiprocessors(out.device))
    table = rows.groups
    if rows.layout == CONTIGUOUS:
        bounds = enumerate(pairwise(rows.groups))
        entries = [(g, first, stop) for g, (start, stop) in bounds for first in range(start, stop, blocking.rows)]
        table = _table(entries, out.device)
    blocks = sum(triton.cdiv(count, blocking.rows) for count in rows.counts) * triton.cdiv(columns, blocking.columns)
    multiply[(blocks,)](
        a.data, a.scale, b.data, b.scale, out, table, rows.counts[0], columns, inner,
        *a.data.stride(), *a.scale.stride(), *b.data.stride(), *b.scale.stride(),
        A_TILE=a.tile[0], B_TILE=b.tile[0], LAYOUT=rows.layout, WIDTH=a.tile[1],
        PROMOTION=promotion, IS_EVEN=inner % promotion == 0, IS_WIDE=is_wide, BAND=BAND, **blocking.options,
    )  # fmt: skip
    return out


def _check_operands(a: Quantized, b: Quantized) -> None:
    if a.data.ndim != 2 or b.data.ndim != 3 or a.data.shape[1] != b.data.shape[2]:
        raise ValueError(f"a is {list(a.data.shape)} and b {list(b.data.shape)}; expected [M, K] and [G, N, K]")
    if a.tile[1] != b.tile[1]:
        raise ValueError(
            f"tiles {list(a.tile)} of a and {list(b.tile)} of b differ in width, which the kernel does not take;"
            " quantise one of them anew"
        )
    for each in (a, b):
        if each.data.dtype not in TORCH_DTYPES.values():
            raise ValueError(f"the kernel multiplies FP8, not {each.data.dtype} {list(each.data.shape)}")
        check_scale(each)


def _interval(accumulator: Accumulator, width: int, inner: int) -> tuple[int, bool]:
    """Elements of K between promotions, and whether values are widened."""
    if isinstance(accumulator, Fp32Accumulator):
        promotion = width
    else:
        promotion = accumulator.promotion or max(inner, width)
        if inner <= width:
            promotion = min(promotion, width)
        elif width % promotion:
            raise ValueError(
                f"promotion = {accumulator.promotion} with one scale per {width} of K = {inner}: no Tensor Core applies"
                f" scales within its sums; take a divisor of {width}, or the reference, `products.scaled_reference`"
            )
    if promotion < 32 or promotion & (promotion - 1) and promotion % 128:
        raise ValueError(f"sums over {promotion} of K: the kernel takes 32, 64 and multiples of 128")
    return promotion, isinstance(accumulator, Fp32Accumulator)


def _table(entries: Iterable[Sequence[int]], device: torch.device) -> Tensor:
    return torch.tensor(list(entries), dtype=torch.int32).to(device, non_blocking=True)


def _multiprocessors(device: torch.device) -> int:
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else HOPPER_MULTIPROCESSORS
    )
