"""Packed BF16 operands and their products with AVX-512 BF16: the same functions as `amx_panels_numba`.

    left     16 rows after 16 rows; of them pairs of k after pairs        [pairs, 16 rows]
    right    32 columns after 32; of them pairs of k after pairs          [pairs, 32 columns]

Each element of a product is summed in the order of k.
"""

from __future__ import annotations

from numba.extending import register_jitable

from dovetail.numerics.cpu.tiles_numba import (
    LANES,
    PANEL,
    TILE_ROWS,
    adding_tile,
    bf16_tile1,
    bf16_tile2,
    float_tile,
    pack_interleaved,
    pack_transposed,
)


@register_jitable
def take_tiles():  # type: ignore[no-untyped-def]
    """Vectors are there without."""


@register_jitable
def give_tiles():  # type: ignore[no-untyped-def]
    """Vectors are there without."""


@register_jitable
def pack(x, at, stride, k_is_inner, k, count, out, width):  # type: ignore[no-untyped-def]
    """Pairs along k of `count` rows (k_is_inner) or columns of x, in panels of `width`: out[panel, pair, width].

    x: flat BF16 bits, from `at` on, rows `stride` apart. Sixteen pairs and 16 rows are written at a time, past the
    last ones too: `packed_size` says how much room that takes.
    """
    pairs = (k + 1) // 2
    for first in range(0, count, LANES):
        base = first // width * width * pairs + first % width
        if k_is_inner:
            for p in range(0, pairs, LANES):
                start, left = at + first * stride + 2 * p, k - 2 * p
                pack_transposed(x, start, stride, count - first, left, out, base + p * width, width)
        else:
            for p in range(pairs):
                start = at + 2 * p * stride + first
                pack_interleaved(x, start, stride, 2 * p + 1 < k, count - first, out, base + p * width)


@register_jitable
def packed_size(k, count):  # type: ignore[no-untyped-def]
    """Words (uint32) that `pack` may write."""
    return (count + PANEL - 1) // PANEL * PANEL * ((k + 1) // 2) + LANES * PANEL


@register_jitable
def left_size(k, rows):  # type: ignore[no-untyped-def]
    return packed_size(k, rows)


@register_jitable
def right_size(k, columns):  # type: ignore[no-untyped-def]
    return packed_size(k, columns)


@register_jitable
def panel_size(k):  # type: ignore[no-untyped-def]
    """Words of a right operand's 32 columns."""
    return PANEL * ((k + 1) // 2)


@register_jitable
def pack_left(x, at, stride, k_is_inner, k, rows, out):  # type: ignore[no-untyped-def]
    pack(x, at, stride, k_is_inner, k, rows, out, LANES)


@register_jitable
def pack_right(x, at, stride, k_is_inner, k, columns, out):  # type: ignore[no-untyped-def]
    pack(x, at, stride, k_is_inner, k, columns, out, PANEL)


@register_jitable(forceinline=True)
def bf16_tile(a, a_at, b, b_at, pairs, c, at, ldc, m, n):  # type: ignore[no-untyped-def]
    if n > LANES:
        bf16_tile2(a, a_at, b, b_at, pairs, c, at, ldc, m, n)
    else:
        bf16_tile1(a, a_at, b, b_at, pairs, c, at, ldc, m, n)


@register_jitable
def product(left, k, right, panel, m, n, c, at, ldc):  # type: ignore[no-untyped-def]
    """c[m, n] in BF16, at c.flat[at], rows ldc apart, of packed operands; `panel`: words from panel to panel."""
    pairs = (k + 1) // 2
    for column in range(0, n, PANEL):
        start = column // PANEL * panel
        for row in range(0, m, TILE_ROWS):
            above, place = row // LANES * LANES * pairs + row % LANES, at + row * ldc + column
            bf16_tile(left, above, right, start, pairs, c, place, ldc, m - row, n - column)


@register_jitable
def float_product(left, k, right, panel, m, n, c, adds):  # type: ignore[no-untyped-def]
    """c[:m, :n] in FP32, likewise, or c[:m, :n] += it; c has multiples of TILE_ROWS rows and PANEL columns, and
    anything may be written past m and n."""
    pairs, ldc = (k + 1) // 2, c.shape[1]
    for column in range(0, n, PANEL):
        start = column // PANEL * panel
        for row in range(0, m, TILE_ROWS):
            above = row // LANES * LANES * pairs + row % LANES
            if adds:
                adding_tile(left, above, right, start, pairs, c, row * ldc + column, ldc)
            else:
                float_tile(left, above, right, start, pairs, c, row * ldc + column, ldc)
