"""Asks for memory ahead of its use, a few cache lines at a time between other work.

A window (start, stride, rows, columns) is a part of a matrix of BF16 values; rows are `stride` apart.
"""

from __future__ import annotations

from numba.extending import register_jitable

from dovetail.numerics.cpu.tiles_numba import LINE, prefetch


@register_jitable(forceinline=True)
def fetch(x, window, at, lines):  # type: ignore[no-untyped-def]
    """The next so many cache lines of a window (start, stride, rows, columns) of x, from row and column `at` on;
    returns where to go on."""
    start, stride, rows, columns = window
    row, column = at
    for _ in range(lines):
        if row >= rows:
            break
        prefetch(x, start + row * stride + column)
        column += LINE
        if column >= columns:
            row, column = row + 1, 0
    return row, column


@register_jitable(forceinline=True)
def lines_in(window, parts):  # type: ignore[no-untyped-def]
    """Cache lines of a window to fetch in each of so many parts."""
    return (window[2] * ((window[3] + LINE - 1) // LINE) + parts - 1) // parts


@register_jitable(forceinline=True)
def window_of(start, first, count, k, stride, k_is_inner):  # type: ignore[no-untyped-def]
    """Where `count` rows (k_is_inner) or columns from `first` on, and all k, lie in memory."""
    if k_is_inner:
        return start + first * stride, stride, count, k
    return start + first, stride, k, count
