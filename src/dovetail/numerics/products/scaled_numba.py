"""CPU kernels of `scaled`: grouped products of quantised matrices, with AVX-512 BF16.

    c[g][m, n] = sum over blocks j of 128 of k:  (a_scale[m, j] b_scale[n, j]) sum over k in block j of a[m, k] b[k, n]

Values are on an 8-bit grid (E4M3, E5M2), which BF16 holds exactly, as are their products in FP32. A block's sum is
made in FP32, for each pair of k the odd one first as VDPBF16PS does; it is then multiplied by the product of its two
scales, rounded, and added in one rounding: FP32 accumulation with promotion at every tile of 128 [V3 §3.3.2].

`fprop`, `dgrad` and `wgrad` lay operands out for this kernel, or, for the sums of Hopper's Tensor Core, for that of
`accumulate_numba`, which needs no particular CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable
from torch import Tensor

from dovetail.numerics.cpu.kernels import array, kernel
from dovetail.numerics.cpu.tiles_numba import (
    FLOATS,
    INT64,
    LANES,
    PANEL,
    TILE_ROWS,
    data_of,
    first_lanes,
    load_vector,
    spread,
    store_halves,
    sums_of,
    take_next,
    to_bf16,
)
from dovetail.numerics.formats.quantized import TILE, Quantized, token_tiles, transposed
from dovetail.numerics.panels.tasks_numba import list_tasks
from dovetail.numerics.panels.vectors_numba import pack, packed_size
from dovetail.numerics.products import accumulate_numba
from dovetail.numerics.products.accumulators import Accumulator, Fp32Accumulator, least_exponents
from dovetail.numerics.products.grouped_numba import BLOCK_COLUMNS, BLOCK_ROWS, bounds_of

PAIRS_PER_TILE = TILE // 2  # values of k under one scale, by two
VECTORS = PANEL // LANES


@intrinsic
def _tile(typing_context, a, a_at, a_scales, row, b, b_scales, pairs, c, c_at, ldc, m, n):  # type: ignore[no-untyped-def]
    """Up to TILE_ROWS x PANEL of c. a_scales [tiles, BLOCK_ROWS] from `row` on, b_scales [tiles, PANEL]."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, left_scales, right, right_scales, out = (
            data_of(context, builder, signature, arguments, i) for i in (0, 2, 4, 5, 7)
        )
        left = builder.gep(left, [arguments[1]])
        left_scales = builder.gep(left_scales, [arguments[3]])
        pairs, zero = arguments[6], ir.Constant(FLOATS, [0.0] * LANES)
        totals = [[cgutils.alloca_once(builder, FLOATS) for _ in range(VECTORS)] for _ in range(TILE_ROWS)]
        for row in totals:
            for slot in row:
                builder.store(zero, slot)
        signature_fma = ir.FunctionType(FLOATS, [FLOATS] * 3)
        fma = cgutils.get_or_insert_function(builder.module, signature_fma, "llvm.fma.v16f32")
        step = INT64(PAIRS_PER_TILE)
        with cgutils.for_range_slice(builder, INT64(0), pairs, step, inc=True) as (first, tile):
            rest = builder.sub(pairs, first)
            count = builder.select(builder.icmp_signed("<", rest, step), rest, step)
            a_here = builder.gep(left, [builder.mul(first, INT64(LANES))])
            b_here = builder.gep(right, [builder.mul(first, INT64(PANEL))])
            sums = sums_of(builder, a_here, b_here, count, [[zero] * VECTORS] * TILE_ROWS)
            b_scale = builder.gep(right_scales, [builder.mul(tile, INT64(PANEL))])
            b_row = [load_vector(builder, builder.gep(b_scale, [INT64(v * LANES)]), FLOATS) for v in range(VECTORS)]
            a_scale = builder.gep(left_scales, [builder.mul(tile, INT64(BLOCK_ROWS))])
            for i, (row, values) in enumerate(zip(totals, sums, strict=True)):
                factor = spread(builder, builder.load(builder.gep(a_scale, [INT64(i)])))
                for slot, value, scale in zip(row, values, b_row, strict=True):
                    total = builder.call(fma, [value, builder.fmul(factor, scale), builder.load(slot)])
                    builder.store(total, slot)
        mask = first_lanes(builder, PANEL, arguments[11])
        for i, row in enumerate(totals):
            with builder.if_then(builder.icmp_signed("<", INT64(i), arguments[10]), likely=True):
                start = builder.add(arguments[8], builder.mul(INT64(i), arguments[9]))
                values = [builder.load(slot) for slot in row]
                store_halves(builder, to_bf16(builder, values), builder.gep(out, [start]), mask)
        return context.get_dummy_value()

    index = types.int64
    return types.none(a, index, a_scales, index, b, b_scales, index, c, index, index, index, index), generate


@register_jitable(forceinline=True)
def _copy_scales(scales, start, first, count, block, stride, tile_stride, tiles, out, width):  # type: ignore[no-untyped-def]
    """out[tile, i] = the scale of row (column) first + i in each tile of k; one holds for `block` of them."""
    for tile in range(tiles):
        for i in range(count):
            out[tile * width + i] = scales[start + (first + i) // block * stride + tile * tile_stride]


@kernel
def grouped_scaled_gemm(  # type: ignore[no-untyped-def]
    a, b, c, starts, sizes, strides, a_inner, b_inner, a_scales, b_scales, scale_starts, scale_strides, b_block, threads
):
    """As `grouped_numba.grouped_gemm`, of values on an 8-bit grid with scales for every TILE of k.

    scale_starts [G, 2]: where each group's scales of a and b begin; scale_strides: (rows of a, tiles of a, blocks of
    b, tiles of b), in elements; b_block columns of b share a scale.
    """
    tasks = list_tasks(sizes, BLOCK_ROWS, BLOCK_COLUMNS)
    most_m, most_k = sizes[:, 0].max(), sizes[:, 2].max()
    most_tiles = (most_k + TILE - 1) // TILE
    counter = np.zeros(1, np.int64)
    for _ in prange(threads):
        packed_a = np.empty(packed_size(most_k, min(most_m, BLOCK_ROWS)), np.uint32)
        packed_b = np.empty(packed_size(most_k, PANEL), np.uint32)
        left_scales = np.ones(most_tiles * BLOCK_ROWS, np.float32)
        right_scales = np.ones(most_tiles * PANEL, np.float32)
        held = (-1, -1)
        while True:
            task = take_next(counter)
            if task >= len(tasks):
                break
            g, first, begin, end = tasks[task]
            m, k = sizes[g, 0], sizes[g, 2]
            rows, pairs, tiles = min(BLOCK_ROWS, m - first), (k + 1) // 2, (k + TILE - 1) // TILE
            if held != (g, first):
                at = starts[g, 0] + first * (strides[0] if a_inner else 1)
                pack(a, at, strides[0], a_inner, k, rows, packed_a, LANES)
                start, (stride, tile_stride) = scale_starts[g, 0], scale_strides[:2]
                _copy_scales(a_scales, start, first, rows, 1, stride, tile_stride, tiles, left_scales, BLOCK_ROWS)
                held = (g, first)
            for column in range(begin, end, PANEL):
                columns = min(PANEL, end - column)
                at = starts[g, 1] + column * (strides[1] if b_inner else 1)
                pack(b, at, strides[1], b_inner, k, columns, packed_b, PANEL)
                start, (stride, tile_stride) = scale_starts[g, 1], scale_strides[2:]
                _copy_scales(b_scales, start, column, columns, b_block, stride, tile_stride, tiles, right_scales, PANEL)
                at = starts[g, 2] + first * strides[2] + column
                for row in range(0, rows, TILE_ROWS):
                    place = row // LANES * LANES * pairs + row % LANES
                    left = rows - row
                    to = at + row * strides[2]
                    _tile(
                        packed_a,
                        place,
                        left_scales,
                        row,
                        packed_b,
                        right_scales,
                        pairs,
                        c,
                        to,
                        strides[2],
                        left,
                        columns,
                    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the groups of a product lie: what `grouped_scaled_gemm` takes beside the tensors, each number for every
    group or one for all."""

    starts: tuple[np.ndarray, ...]  # of a, b and the output
    sizes: tuple[np.ndarray | int, ...]  # m, n, k
    strides: tuple[int, int, int]
    is_inner: tuple[bool, bool]
    scale_starts: tuple[np.ndarray, np.ndarray]
    scale_strides: tuple[int, int, int, int]
    block: int  # columns of b that share a scale


def fprop(rows: Quantized, weight: Quantized, offsets: Sequence[int], accumulator: Accumulator) -> Tensor:
    return _by_rows(rows, weight, offsets, accumulator, is_transposed=False)


def dgrad(grad: Quantized, weight: Quantized, offsets: Sequence[int], accumulator: Accumulator) -> Tensor:
    return _by_rows(grad, weight, offsets, accumulator, is_transposed=True)


def _by_rows(
    rows: Quantized, weight: Quantized, offsets: Sequence[int], accumulator: Accumulator, is_transposed: bool
) -> Tensor:
    """Each group's rows times its weight's rows, or, `is_transposed`, its columns."""
    turned = transposed(weight) if is_transposed else weight
    groups, width, inner = turned.data.shape
    output = rows.data.new_empty(len(rows.data), width, dtype=torch.bfloat16)
    starts, counts = bounds_of(offsets)
    experts, tiles = np.arange(groups), rows.scale.shape[1]
    layout = Layout(
        starts=(starts * inner, experts * width * inner, starts * width),
        sizes=(counts, width, inner),
        strides=(inner, weight.data.shape[2], width),
        is_inner=(True, not is_transposed),
        scale_starts=(starts * tiles, experts * weight.scale[0].numel()),
        scale_strides=(tiles, 1, *turned.scale.stride()[1:]),
        block=TILE,
    )
    _multiply(rows, weight, output, layout, accumulator)
    return output


def wgrad(grad: Quantized, rows: Quantized, offsets: Sequence[int], accumulator: Accumulator) -> Tensor:
    (height, width), groups = (grad.data.shape[1], rows.data.shape[1]), len(offsets) - 1
    output = grad.data.new_empty(groups, height, width, dtype=torch.bfloat16)
    starts, counts = bounds_of(offsets)
    firsts = np.array(token_tiles(offsets)[1], dtype=np.int64)
    layout = Layout(
        starts=(starts * height, starts * width, np.arange(groups) * height * width),
        sizes=(height, width, counts),
        strides=(height, width, width),
        is_inner=(False, False),
        scale_starts=(firsts * height, firsts * width),
        scale_strides=(1, height, 1, width),
        block=1,
    )
    _multiply(grad, rows, output, layout, accumulator)
    return output


def _multiply(a: Quantized, b: Quantized, output: Tensor, layout: Layout, accumulator: Accumulator) -> None:
    groups = len(layout.starts[0])
    arguments = (
        *(array(x.reshape(-1)) for x in (a.data, b.data, output)),
        np.stack(layout.starts, axis=1),
        np.stack([np.broadcast_to(size, groups) for size in layout.sizes], axis=1),
        np.array(layout.strides),
        *layout.is_inner,
        *(array(x.contiguous().reshape(-1)) for x in (a.scale, b.scale)),
        np.stack(layout.scale_starts, axis=1),
        np.array(layout.scale_strides),
        layout.block,
        numba.get_num_threads(),
    )
    if isinstance(accumulator, Fp32Accumulator):
        grouped_scaled_gemm(*arguments)
    else:
        least = least_exponents((a.format, b.format))
        accumulate_numba.grouped_hopper(*arguments, least, TILE, accumulator.promotion or 0)
