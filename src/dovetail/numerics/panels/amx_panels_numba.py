"""Packed BF16 operands and their products with AMX tiles: the same functions as `vectors_numba`.

    left     32 rows after 32; of them 32 values of k after 32: two whole tiles     [2, 16 rows, 16 pairs]
    right    32 columns after 32; of them pairs of k after pairs                    [pairs, 32 columns]

Both are filled with zeros up to a multiple of 32 along k. Each element of a product is summed in the order of k.
"""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from dovetail.numerics.cpu.tiles_numba import LANES, PANEL
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
    load_sums,
    pack_columns,
    pack_pairs,
    pack_rows,
    pack_transposed,
    round_row,
    store_sums,
    take_tiles,
)

__all__ = ["give_tiles", "take_tiles"]


@register_jitable
def steps_of(k):  # type: ignore[no-untyped-def]
    return (k + STEP - 1) // STEP


@register_jitable
def left_size(k, rows):  # type: ignore[no-untyped-def]
    """Words (uint32) that `pack_left` may write."""
    return (rows + STEP - 1) // STEP * 2 * TILE * steps_of(k)


@register_jitable
def pack_left(x, at, stride, k_is_inner, k, rows, out):  # type: ignore[no-untyped-def]
    """Of x [rows, k] (k_is_inner) or [k, rows], rows of it `stride` apart, from `at` on."""
    steps = steps_of(k)
    for first in range(0, rows, STEP):
        for step in range(steps):
            to, left = first * steps * LANES + step * 2 * TILE, k - step * STEP
            if k_is_inner:
                start = at + first * stride + step * STEP
                pack_rows(x, start, stride, rows - first, left, out, to)
                if first + LANES < rows:
                    pack_rows(x, start + LANES * stride, stride, rows - first - LANES, left, out, to + TILE)
            else:
                pack_columns(x, at + step * STEP * stride + first, stride, left, rows - first, out, to)


@register_jitable
def panel_size(k):  # type: ignore[no-untyped-def]
    """Words of a right operand's 32 columns."""
    return PANEL * LANES * steps_of(k)


@register_jitable
def right_size(k, columns):  # type: ignore[no-untyped-def]
    return (columns + PANEL - 1) // PANEL * panel_size(k)


@register_jitable
def parts_of(k, k_is_inner):  # type: ignore[no-untyped-def]
    """How many times `pack_part` makes a panel."""
    return 2 * steps_of(k) if k_is_inner else steps_of(k)


@register_jitable(forceinline=True)
def pack_part(x, at, stride, k_is_inner, k, columns, out, to, part):  # type: ignore[no-untyped-def]
    """A part of a panel of up to 32 columns, which lies at out[to]: 32 along k, where k is inner of 16 columns."""
    if k_is_inner:
        step, half = part // 2, part % 2 * LANES
        start, place = at + half * stride + step * STEP, to + step * PANEL * LANES + half
        pack_transposed(x, start, stride, columns - half, k - step * STEP, out, place)
    else:
        start, place = at + part * STEP * stride, to + part * PANEL * LANES
        pack_pairs(x, start, stride, k - part * STEP, columns, out, place)


@register_jitable
def pack_right(x, at, stride, k_is_inner, k, columns, out):  # type: ignore[no-untyped-def]
    """Of x [columns, k] (k_is_inner) or [k, columns], rows of it `stride` apart, from `at` on."""
    for column in range(0, columns, PANEL):
        start = at + (column * stride if k_is_inner else column)
        for part in range(parts_of(k, k_is_inner)):
            to = column // PANEL * panel_size(k)
            pack_part(x, start, stride, k_is_inner, k, columns - column, out, to, part)


@register_jitable(forceinline=True)
def _add_up(left, right, steps, is_tall):  # type: ignore[no-untyped-def]
    """Sums of packed operands at the addresses `left` and `right`."""
    for _ in range(steps):
        if is_tall:
            add_32_rows(left, 4 * TILE, ROW_BYTES, right)
        else:
            add_16_rows(left, 0, ROW_BYTES, right)
        left += 8 * TILE
        right += STEP_BYTES


@register_jitable
def product(left, k, right, panel, m, n, c, at, ldc):  # type: ignore[no-untyped-def]
    """c[m, n] in BF16, at c.flat[at], rows ldc apart, of packed operands; `panel`: words from panel to panel."""
    steps, sums = steps_of(k), np.empty(STEP * PANEL, np.float32)
    for column in range(0, n, PANEL):
        for row in range(0, m, STEP):
            is_tall = m - row > LANES
            clear_sums()
            above, before = address(left, row * steps * LANES), address(right, column // PANEL * panel)
            _add_up(above, before, steps, is_tall)
            store_sums(address(sums, 0), PANEL_BYTES, is_tall)
            for i in range(min(STEP, m - row)):
                round_row(sums, i * PANEL, c, at + (row + i) * ldc + column, n - column)


@register_jitable
def float_product(left, k, right, panel, m, n, c, adds):  # type: ignore[no-untyped-def]
    """c[:m, :n] in FP32, likewise, or c[:m, :n] += it; c has multiples of 16 rows and of PANEL columns, and anything
    may be written past m and n."""
    steps, stride = steps_of(k), 4 * c.shape[1]
    for column in range(0, n, PANEL):
        for row in range(0, m, STEP):
            is_tall, place = m - row > LANES, address(c, row * c.shape[1] + column)
            if adds:
                load_sums(place, stride, is_tall)
            else:
                clear_sums()
            above, before = address(left, row * steps * LANES), address(right, column // PANEL * panel)
            _add_up(above, before, steps, is_tall)
            store_sums(place, stride, is_tall)
