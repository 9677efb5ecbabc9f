"""CPU kernels of `grouped`: many small BF16 products in one call, with AVX-512 BF16.

    c[g] = op(a[g]) op(b[g]),  c[g] [m, n] BF16, sums in FP32

Each product's operands are packed into panels as they are needed, pairs of k side by side as the instruction
VDPBF16PS takes them, and no product pays for setting up a shape it has not met before. Threads take
blocks of c as they get free, so experts with uneven loads keep all cores busy. Each element of c is summed in the
order of k, whatever the number of threads.

A panel of b (all k, 32 columns) stays in the first-level cache while blocks of 8 rows of a pass by it from the
second level: 8 x 32 sums in 16 registers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
from numba import prange
from torch import Tensor

from dovetail.numerics import capability
from dovetail.numerics.cpu.kernels import array, kernel
from dovetail.numerics.cpu.tiles_numba import LANES, PANEL, TILE_ROWS, take_next
from dovetail.numerics.panels import amx_grouped_numba
from dovetail.numerics.panels.ahead_numba import fetch, lines_in, window_of
from dovetail.numerics.panels.tasks_numba import list_tasks
from dovetail.numerics.panels.vectors_numba import bf16_tile, pack, packed_size

BLOCK_ROWS = 256  # rows of a that are packed at a time: 256 KB of the second-level cache at k = 512
BLOCK_COLUMNS = 256  # columns of c that a thread takes at a time


@kernel
def grouped_gemm(a, b, c, starts, sizes, strides, a_inner, b_inner, threads):  # type: ignore[no-untyped-def]
    """c[g] = op(a[g]) op(b[g]) for every group g.

    a, b, c: flat BF16 bits; starts [G, 3]: where each group's operands begin; sizes [G, 3]: m, n, k of each;
    strides: elements between rows of a, b, c. a is [m, k] (a_inner) or [k, m]; b is [n, k] (b_inner) or [k, n].

    Threads take the next block of c when they are done with one. While a panel is multiplied, what will be packed
    next is fetched: operands come from memory as often as not.
    """
    tasks = list_tasks(sizes, BLOCK_ROWS, BLOCK_COLUMNS)
    most_m, most_k = sizes[:, 0].max(), sizes[:, 2].max()
    counter = np.zeros(1, np.int64)
    for _ in prange(threads):
        packed_a = np.empty(packed_size(most_k, min(most_m, BLOCK_ROWS)), np.uint32)
        packed_b = np.empty(packed_size(most_k, PANEL), np.uint32)
        held = (-1, -1)
        while True:
            task = take_next(counter)
            if task >= len(tasks):
                break
            g, first, begin, end = tasks[task]
            m, n, k = sizes[g]
            rows, pairs = min(BLOCK_ROWS, m - first), (k + 1) // 2
            if held != (g, first):
                window = window_of(starts[g, 0], first, rows, k, strides[0], a_inner)
                pack(a, window[0], strides[0], a_inner, k, rows, packed_a, LANES)
                held = (g, first)
            next_g, next_first, next_begin, next_end = tasks[min(task + threads, len(tasks) - 1)]
            next_m, next_n, next_k = sizes[next_g]
            next_a = window_of(
                starts[next_g, 0], next_first, min(BLOCK_ROWS, next_m - next_first), next_k, strides[0], a_inner
            )
            tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
            a_at, a_lines = (0, 0), lines_in(next_a, tiles * ((end - begin + PANEL - 1) // PANEL))
            for column in range(begin, end, PANEL):
                columns = min(PANEL, n - column)
                window = window_of(starts[g, 1], column, columns, k, strides[1], b_inner)
                pack(b, window[0], strides[1], b_inner, k, columns, packed_b, PANEL)
                if column + PANEL < end:
                    next_b = window_of(
                        starts[g, 1], column + PANEL, min(PANEL, n - column - PANEL), k, strides[1], b_inner
                    )
                else:
                    next_b = window_of(
                        starts[next_g, 1], next_begin, min(PANEL, next_n - next_begin), next_k, strides[1], b_inner
                    )
                b_at, b_lines = (0, 0), lines_in(next_b, tiles)
                at = starts[g, 2] + first * strides[2] + column
                for tile in range(tiles):
                    row = tile * TILE_ROWS
                    start = row // LANES * LANES * pairs + row % LANES
                    bf16_tile(
                        packed_a, start, packed_b, 0, pairs, c, at + row * strides[2], strides[2], rows - row, columns
                    )
                    b_at, a_at = fetch(b, next_b, b_at, b_lines), fetch(a, next_a, a_at, a_lines)


def fprop(rows: Tensor, weight: Tensor, offsets: Sequence[int]) -> Tensor:
    """As `grouped` has it; `weight` may be a transposed view."""
    output = rows.new_empty(rows.shape[0], weight.shape[1])
    starts, counts = bounds_of(offsets)
    groups = np.arange(len(starts))
    _multiply(
        (rows, weight.transpose(1, 2), output),
        (starts * rows.stride(0), groups * weight.stride(0), starts * output.stride(0)),
        (counts, weight.shape[1], weight.shape[2]),
    )
    return output


def wgrad(grad: Tensor, rows: Tensor, offsets: Sequence[int]) -> Tensor:
    output = grad.new_empty(len(offsets) - 1, grad.shape[1], rows.shape[1])
    starts, counts = bounds_of(offsets)
    _multiply(
        (grad.t(), rows, output),
        (starts * grad.stride(0), starts * rows.stride(0), np.arange(len(starts)) * output.stride(0)),
        (grad.shape[1], rows.shape[1], counts),
    )
    return output


def _multiply(
    operands: tuple[Tensor, Tensor, Tensor], starts: tuple[np.ndarray, ...], sizes: tuple[np.ndarray | int, ...]
) -> None:
    """Groups of a [., m, k], b [., k, n] and c [., m, n]: starts and sizes m, n, k of each, in elements."""
    a, b, out = operands
    (a_row, a_inner), (b_row, k_is_outer) = _row_stride(a), _row_stride(b)
    assert out.stride(-1) == 1
    gemm = amx_grouped_numba.grouped_gemm if capability.has_tiles() else grouped_gemm
    gemm(
        _flat(a),
        _flat(b),
        _flat(out),
        np.stack(starts, axis=1),
        np.stack([np.broadcast_to(size, len(starts[0])) for size in sizes], axis=1),
        np.array([a_row, b_row, out.stride(-2)]),
        a_inner,
        not k_is_outer,
        numba.get_num_threads(),
    )


def _row_stride(x: Tensor) -> tuple[int, bool]:
    """The stride between rows in memory, and whether these are x's rows (else x is a transposed view)."""
    if x.stride(-1) == 1:
        return x.stride(-2), True
    assert x.stride(-2) == 1, f"neither dimension is contiguous: shape {tuple(x.shape)}, strides {x.stride()}"
    return x.stride(-1), False


def _flat(x: Tensor) -> np.ndarray:
    """All memory from x's first element to the end of what it is a view of, as BF16 bits."""
    return array(x.as_strided((x.untyped_storage().nbytes() // 2 - x.storage_offset(),), (1,)))


def bounds_of(offsets: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """First row and number of rows of each group."""
    ends = np.asarray(offsets)
    return ends[:-1], np.diff(ends)
