"""Products of a few rows of activations with AMX tiles: weights are read once, in the order of memory.

Here weights are the left operand, 32 rows of them at a time, and rows of activations the right one, a column each. So
sums come out by columns, and are turned. An element is summed as by `amx_grouped_numba`, which takes activations on
the left: by the same products, in the same order, to the same bits.

Nothing asks for memory ahead here: with 32 rows under way at once the CPU does so itself, and to ask once more made it
slower, as did a copy of the rows, or reading them in their order, before they are multiplied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, register_jitable

from dovetail.numerics.cpu.tiles_numba import (
    FLOATS,
    INT32,
    INT64,
    LANES,
    PANEL,
    data_of,
    first_lanes,
    load_vector,
    transpose,
)
from dovetail.numerics.panels.amx_numba import (
    PANEL_BYTES,
    ROW_BYTES,
    STEP,
    STEP_BYTES,
    TILE,
    add_32_rows,
    add_half_panel,
    address,
    clear_sums,
    store_sums,
    write,
)
from dovetail.numerics.panels.amx_panels_numba import left_size, pack_left, pack_right, panel_size, steps_of

FEW = 4  # rows whose sums are picked one by one


@register_jitable
def pack_activations(x, at, k, rows, out):  # type: ignore[no-untyped-def]
    """Of x [rows, k], from x.flat[at] on. Where they are few, columns of rows that do not exist hold anything."""
    if rows >= FEW:
        pack_right(x, at, k, True, k, rows, out)
    else:
        for row in range(rows):
            for pair in range(steps_of(k) * LANES):
                place = at + row * k + 2 * pair
                low = np.uint32(x[place]) if 2 * pair < k else np.uint32(0)
                high = np.uint32(x[place + 1]) if 2 * pair + 1 < k else np.uint32(0)
                out[pair * PANEL + row] = low | high << np.uint32(16)


@intrinsic
def _turn_tile(typing_context, sums, at, rows, columns, c, c_at, ldc):  # type: ignore[no-untyped-def]
    """c.flat[c_at + i ldc + j] = sums.flat[at + j PANEL + i] for up to 16 rows i and columns j."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target = (data_of(context, builder, signature, arguments, i) for i in (0, 4))
        source, mask = builder.gep(source, [arguments[1]]), first_lanes(builder, LANES, arguments[3])
        loaded = [load_vector(builder, builder.gep(source, [INT64(j * PANEL)]), FLOATS) for j in range(LANES)]
        for i, row in enumerate(transpose(builder, loaded)):
            with builder.if_then(builder.icmp_signed("<", INT64(i), arguments[2]), likely=True):
                place = builder.add(arguments[5], builder.mul(INT64(i), arguments[6]))
                write(builder, [row], builder.gep(target, [place]), mask)
        return context.get_dummy_value()

    index = types.int64
    return types.none(sums, index, index, index, c, index, index), generate


@intrinsic
def _pick_row(typing_context, sums, at, columns, c, c_at):  # type: ignore[no-untyped-def]
    """c.flat[c_at + j] = sums.flat[at + j PANEL] for up to 16 columns j."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target = (data_of(context, builder, signature, arguments, i) for i in (0, 3))
        value = ir.Constant(FLOATS, ir.Undefined)
        for j in range(LANES):
            place = builder.gep(source, [builder.add(arguments[1], INT64(j * PANEL))])
            value = builder.insert_element(value, builder.load(place), INT32(j))
        write(builder, [value], builder.gep(target, [arguments[4]]), first_lanes(builder, LANES, arguments[2]))
        return context.get_dummy_value()

    index = types.int64
    return types.none(sums, index, index, c, index), generate


@register_jitable
def _turn(sums, rows, columns, c, at, ldc):  # type: ignore[no-untyped-def]
    """c[rows, columns] from sums [PANEL columns, PANEL rows]."""
    for column in range(0, columns, LANES):
        if rows < FEW:
            for row in range(rows):
                _pick_row(sums, column * PANEL + row, columns - column, c, at + row * ldc + column)
        else:
            for row in range(0, rows, LANES):
                place = at + row * ldc + column
                _turn_tile(sums, column * PANEL + row, rows - row, columns - column, c, place, ldc)


@register_jitable
def multiply_few(packed, m, w, w_at, n, k, c, c_at, ldc):  # type: ignore[no-untyped-def]
    """c[m, n], BF16 or FP32, of packed rows of activations by n rows of w, which are k long: flat arrays."""
    steps, sums = steps_of(k), np.empty(PANEL * PANEL, np.float32)
    fills_tiles = k % STEP == 0
    copied = np.empty(left_size(k, PANEL) if n % PANEL or not fills_tiles else 0, np.uint32)
    for column in range(0, n, PANEL):
        columns, at = min(PANEL, n - column), w_at + column * k
        if columns == PANEL and fills_tiles:
            start, second, stride, step = address(w, at), 2 * LANES * k, 2 * k, 2 * STEP
        else:
            pack_left(w, at, k, True, k, columns, copied)
            start, second, stride, step = address(copied, 0), 4 * TILE, ROW_BYTES, 8 * TILE
        for first in range(0, m, PANEL):
            rows, left, right = min(PANEL, m - first), start, address(packed, first // PANEL * panel_size(k))
            clear_sums()
            for _ in range(steps):
                if rows > LANES:
                    add_32_rows(left, second, stride, right)
                else:
                    add_half_panel(left, second, stride, right)
                left += step
                right += STEP_BYTES
            store_sums(address(sums, 0), PANEL_BYTES, True)
            _turn(sums, rows, columns, c, c_at + first * ldc + column, ldc)
