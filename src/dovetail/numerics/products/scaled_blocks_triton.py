"""The kernels of `scaled_triton`: blocks of FP8 products with scales per tile of K.

How large blocks are is decided here too.

Per tile of K (128) and per PROMOTION of it, a sum in the Tensor Core that starts at zero, then

    total = fma(sum, scale of a * scale of b, total)        FP32, in ordinary registers [V3 §3.3.2, DeepGEMM]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl

from dovetail.numerics.formats.rounding_triton import narrow

DENSE, CONTIGUOUS, MASKED = (tl.constexpr(value) for value in range(3))
HOPPER_MULTIPROCESSORS = 132  # where there is no device to ask


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocking:
    """How a product is cut up."""

    rows: int
    columns: int
    warps: int
    stages: int  # tiles of K in flight

    @property
    def options(self) -> dict[str, int]:
        return {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "num_warps": self.warps, "num_stages": self.stages}


# Besides the total a program holds the sum under way, in FP32: a larger block than 128 x 128 leaves the registers.
BLOCKINGS = (
    Blocking(rows=128, columns=128, warps=8, stages=3),
    Blocking(rows=64, columns=128, warps=4, stages=3),
    Blocking(rows=64, columns=64, warps=4, stages=4),
    Blocking(rows=64, columns=32, warps=4, stages=5),
    Blocking(rows=64, columns=16, warps=4, stages=6),
)
BAND = 8  # rows of blocks that run side by side
# A row or column of a block brings 128 bytes per tile of K, at some 40 bytes a cycle and multiprocessor; an output is
# 128 products, at 4096 a cycle: reading one costs as much as computing this many. An estimate, not a measurement.
EDGE_COST = 100


def choose_blocking(rows: Sequence[int], columns: int, multiprocessors: int = HOPPER_MULTIPROCESSORS) -> Blocking:
    """The blocks that finish first when every multiprocessor takes one after another; `rows` of each group."""

    def cost(blocking: Blocking) -> int:
        blocks = sum(triton.cdiv(each, blocking.rows) for each in rows) * triton.cdiv(columns, blocking.columns)
        edges = blocking.rows + blocking.columns
        return triton.cdiv(blocks, multiprocessors) * (blocking.rows * blocking.columns + EDGE_COST * edges)

    return min(BLOCKINGS, key=cost)


@triton.jit
def _sum_tiles(  # type: ignore[no-untyped-def]
    a,
    a_inner,
    a_scale,
    a_scale_inner,
    b,
    b_inner,
    b_scale,
    b_scale_inner,
    length,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    PROMOTION: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_WIDE: tl.constexpr,
):
    """FP32 block [BLOCK_M, BLOCK_N]. a, b, a_scale, b_scale: pointers to each row's first value and first scale;
    b_scale may be one pointer, for a scale that all columns share. IS_EVEN: `length` is whole intervals."""
    BLOCK_K: tl.constexpr = PROMOTION if PROMOTION < 128 else 128
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, length, PROMOTION):
        tile = start // WIDTH
        factor = tl.load(a_scale + tile * a_scale_inner)[:, None] * tl.load(b_scale + tile * b_scale_inner)
        partial = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(0, PROMOTION, BLOCK_K):
            k = start + step + tl.arange(0, BLOCK_K)
            if IS_EVEN:
                left = tl.load(a[:, None] + k[None, :] * a_inner)
                right = tl.load(b[None, :] + k[:, None] * b_inner)
            else:
                left = tl.load(a[:, None] + k[None, :] * a_inner, mask=k[None, :] < length, other=0.0)
                right = tl.load(b[None, :] + k[:, None] * b_inner, mask=k[:, None] < length, other=0.0)
            if IS_WIDE:
                partial = tl.dot(left.to(tl.float16), right.to(tl.float16), partial)
            else:
                partial = tl.dot(left, right, partial)
        total = tl.fma(partial, tl.broadcast_to(factor, (BLOCK_M, BLOCK_N)), total)
    return total


@triton.jit
def multiply(  # type: ignore[no-untyped-def]
    a,
    a_scale,
    b,
    b_scale,
    out,
    table,
    rows,
    columns,
    inner,
    a_row,
    a_inner,
    a_scale_row,
    a_scale_inner,
    b_group,
    b_row,
    b_inner,
    b_scale_group,
    b_scale_row,
    b_scale_inner,
    A_TILE: tl.constexpr,
    B_TILE: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    PROMOTION: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_WIDE: tl.constexpr,
    BAND: tl.constexpr,
):
    """A block of out [rows, columns]. DENSE: all rows are one group. CONTIGUOUS: table [blocks, 3] of each block's
    group, first row and the group's end. MASKED: table [groups] of counts, `rows` of each group."""
    across = tl.cdiv(columns, BLOCK_N)
    block = tl.program_id(0)
    # Blocks of BAND rows of blocks run side by side, so that what they share stays in the second-level cache.
    down = tl.num_programs(0) // across
    band = block // (BAND * across)
    height = tl.minimum(down - band * BAND, BAND)
    row_block = band * BAND + block % (BAND * across) % height
    column_block = block % (BAND * across) // height
    if LAYOUT == DENSE:
        group, first, end = 0, row_block * BLOCK_M, rows
    elif LAYOUT == CONTIGUOUS:
        entry = table + row_block * 3
        group, first, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    else:
        per_group = tl.cdiv(rows, BLOCK_M)
        group = row_block // per_group
        first = group * rows + row_block % per_group * BLOCK_M
        end = group * rows + tl.minimum(tl.load(table + group), rows)
    if first < end:
        row, column = first + tl.arange(0, BLOCK_M), column_block * BLOCK_N + tl.arange(0, BLOCK_N)
        a_at, b_at = tl.minimum(row, end - 1).to(tl.int64), tl.minimum(column, columns - 1).to(tl.int64)
        group_at = group.to(tl.int64) if LAYOUT != DENSE else group
        b_factor = b_scale + group_at * b_scale_group
        if B_TILE % BLOCK_N == 0:
            b_factor += column_block * BLOCK_N // B_TILE * b_scale_row
        else:
            b_factor += (b_at // B_TILE * b_scale_row)[None, :]
        total = _sum_tiles(
            a + a_at * a_row,
            a_inner,
            a_scale + a_at // A_TILE * a_scale_row,
            a_scale_inner,
            b + group_at * b_group + b_at * b_row,
            b_inner,
            b_factor,
            b_scale_inner,
            inner,
            BLOCK_M,
            BLOCK_N,
            WIDTH,
            PROMOTION,
            IS_EVEN,
            IS_WIDE,
        )
        target = out + row.to(tl.int64)[:, None] * columns + column[None, :]
        inside = (row < end)[:, None] & (column < columns)[None, :]
        tl.store(target, narrow(total, out.dtype.element_ty), mask=inside)


@triton.jit
def sum_outer(  # type: ignore[no-untyped-def]
    left,
    left_scale,
    right,
    right_scale,
    out,
    table,
    height,
    width,
    left_row,
    left_column,
    right_row,
    right_column,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    PROMOTION: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_WIDE: tl.constexpr,
):
    """A block of out [groups, height, width]; table [groups, 3]: first row, number of rows, first row of scales.
    Scales are contiguous [tiles, height] and [tiles, width]. IS_EVEN: groups begin and end at multiples of WIDTH."""
    group = tl.program_id(1)
    across = tl.cdiv(width, BLOCK_N)
    m = tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    entry = table + group * 3
    first, length, tile = tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2).to(tl.int64)
    if IS_EVEN:
        first = tl.multiple_of(first, WIDTH)
    m_at, n_at = tl.minimum(m, height - 1).to(tl.int64), tl.minimum(n, width - 1).to(tl.int64)
    total = _sum_tiles(
        left + first * left_row + m_at * left_column,
        left_row,
        left_scale + tile * height + m_at,
        height,
        right + first * right_row + n_at * right_column,
        right_row,
        right_scale + (tile * width + n_at)[None, :],
        width,
        length,
        BLOCK_M,
        BLOCK_N,
        WIDTH,
        PROMOTION,
        IS_EVEN,
        IS_WIDE,
    )
    target = out + group.to(tl.int64) * height * width + m.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(target, narrow(total, out.dtype.element_ty), mask=(m < height)[:, None] & (n < width)[None, :])
