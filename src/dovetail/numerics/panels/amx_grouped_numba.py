"""The CPU kernel of `grouped` with AMX tiles: many small BF16 products in one call.

    c[g] = op(a[g]) op(b[g]),  c[g] [m, n] BF16, sums in FP32 in the order of k

Rows of a are read where they lie, if k is inner there and a multiple of 32; else they are packed for each task. 32
columns of b are packed for all rows of a task. Tiles multiply by themselves for 64 cycles at each step of k, and the
core has time: then it packs a part of the next 32 columns, and rounds and stores rows of the block before.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from numba.extending import register_jitable

from dovetail.numerics.cpu.kernels import kernel
from dovetail.numerics.cpu.tiles_numba import LANES, PANEL, take_next
from dovetail.numerics.panels.ahead_numba import fetch, lines_in, window_of
from dovetail.numerics.panels.amx_numba import (
    PANEL_BYTES,
    ROW_BYTES,
    STEP,
    STEP_BYTES,
    TILE,
    add_16_rows,
    add_32_rows,
    address,
    clear_sums,
    give_tiles,
    round_row,
    store_sums,
    take_tiles,
)
from dovetail.numerics.panels.amx_panels_numba import left_size, pack_left, pack_part, panel_size, parts_of, steps_of
from dovetail.numerics.panels.tasks_numba import list_tasks

BLOCK_ROWS = 512  # rows of a for which 32 columns of b are packed once
FEW_COLUMNS, MANY_COLUMNS = 128, 512  # of c that a thread takes at a time: few where there are few tasks
BLOCK = STEP * PANEL  # sums of a block


@register_jitable
def _columns_of(sizes, threads):  # type: ignore[no-untyped-def]
    """Columns of a task."""
    blocks = 0
    for g in range(len(sizes)):
        blocks += (sizes[g, 0] + BLOCK_ROWS - 1) // BLOCK_ROWS * ((sizes[g, 1] + MANY_COLUMNS - 1) // MANY_COLUMNS)
    return MANY_COLUMNS if blocks >= 4 * threads else FEW_COLUMNS


@register_jitable
def _are_whole_steps(sizes):  # type: ignore[no-untyped-def]
    rest = 0
    for g in range(len(sizes)):
        rest += sizes[g, 2] % STEP
    return rest == 0


@register_jitable(forceinline=True)
def _store(sums, c, ldc, waiting, first, last):  # type: ignore[no-untyped-def]
    """Rows of a block (where its sums are, its place in c, its rows and columns)."""
    for row in range(first, min(last, waiting[2])):
        round_row(sums, waiting[0] + row * PANEL, c, waiting[1] + row * ldc, waiting[3])


@kernel
def grouped_gemm(a, b, c, starts, sizes, strides, a_inner, b_inner, threads):  # type: ignore[no-untyped-def]
    """As `grouped_numba.grouped_gemm` has it."""
    tasks = list_tasks(sizes, BLOCK_ROWS, _columns_of(sizes, threads))
    most_m, most_k = sizes[:, 0].max(), sizes[:, 2].max()
    reads_a = a_inner and _are_whole_steps(sizes)
    ldc, counter = strides[2], np.zeros(1, np.int64)
    for _ in prange(threads):
        take_tiles()
        left = np.empty(left_size(most_k, STEP if reads_a else min(most_m, BLOCK_ROWS)), np.uint32)
        right = np.empty(2 * panel_size(most_k), np.uint32)
        sums = np.empty(2 * BLOCK, np.float32)
        held = (-1, -1)
        waiting = (0, 0, 0, 0)
        here, there = 0, panel_size(most_k)  # in `right`: the panel that is multiplied, the one that is packed
        while True:
            task = take_next(counter)
            if task >= len(tasks):
                break
            g, first, begin, end = tasks[task]
            m, n, k = sizes[g]
            rows, steps, parts = min(BLOCK_ROWS, m - first), steps_of(k), parts_of(k, b_inner)
            a_at = starts[g, 0] + (first * strides[0] if a_inner else first)
            if held != (g, first):
                if not reads_a:
                    pack_left(a, a_at, strides[0], a_inner, k, rows, left)
                elif rows % LANES:
                    pack_left(a, a_at + rows // STEP * STEP * strides[0], strides[0], True, k, rows % STEP, left)
                held = (g, first)
            next_g, next_first, next_begin, next_end = tasks[min(task + threads, len(tasks) - 1)]
            next_rows = min(BLOCK_ROWS, sizes[next_g, 0] - next_first)
            next_a = window_of(starts[next_g, 0], next_first, next_rows, sizes[next_g, 2], strides[0], a_inner)
            blocks = (rows + STEP - 1) // STEP * max(steps, 1)
            fetched_a, a_lines = (0, 0), lines_in(next_a, blocks * ((end - begin + PANEL - 1) // PANEL))
            b_at = starts[g, 1] + (begin * strides[1] if b_inner else begin)
            for part in range(parts):
                pack_part(b, b_at, strides[1], b_inner, k, n - begin, right, here, part)
            for column in range(begin, end, PANEL):
                following = column + PANEL
                b_at = starts[g, 1] + (following * strides[1] if b_inner else following)
                done = 0 if following < end else parts
                ahead = following + PANEL
                if ahead < end:
                    next_b = window_of(starts[g, 1], ahead, min(PANEL, n - ahead), k, strides[1], b_inner)
                else:
                    ahead += next_begin - end
                    columns = max(min(PANEL, next_end - ahead), 0)
                    next_b = window_of(starts[next_g, 1], ahead, columns, sizes[next_g, 2], strides[1], b_inner)
                fetched_b, b_lines = (0, 0), lines_in(next_b, blocks)
                for row in range(0, rows, STEP):
                    if reads_a and (rows - row >= STEP or rows - row == LANES):
                        a_here, stride, step = address(a, a_at + row * strides[0]), 2 * strides[0], 2 * STEP
                        second = stride * LANES
                    else:
                        a_here = address(left, 0 if reads_a else row * steps * LANES)
                        stride, step, second = ROW_BYTES, 8 * TILE, 4 * TILE
                    b_here, stored = address(right, here), 0
                    share = (waiting[2] + max(steps, 1) - 1) // max(steps, 1)
                    clear_sums()
                    for _step in range(steps):
                        if rows - row > LANES:
                            add_32_rows(a_here, second, stride, b_here)
                        else:
                            add_16_rows(a_here, 0, stride, b_here)
                        a_here += step
                        b_here += STEP_BYTES
                        if done < parts:
                            pack_part(b, b_at, strides[1], b_inner, k, n - following, right, there, done)
                            done += 1
                        _store(sums, c, ldc, waiting, stored, stored + share)
                        stored += share
                        fetched_a = fetch(a, next_a, fetched_a, a_lines)
                        fetched_b = fetch(b, next_b, fetched_b, b_lines)
                    _store(sums, c, ldc, waiting, stored, STEP)
                    place = starts[g, 2] + (first + row) * ldc + column
                    waiting = (BLOCK - waiting[0], place, min(STEP, rows - row), n - column)
                    store_sums(address(sums, waiting[0]), PANEL_BYTES, rows - row > LANES)
                for part in range(done, parts):
                    pack_part(b, b_at, strides[1], b_inner, k, n - following, right, there, part)
                here, there = there, here
        _store(sums, c, ldc, waiting, 0, STEP)
        give_tiles()
