"""Products of BF16 rows whose sums run along k in sixteen lanes, with AVX-512 BF16.

VDPBF16PS takes 32 values of a row of activations and 32 of a row of weights as they lie in memory, and adds their
products to 16 sums. A result is the sum of these lanes, in one order, whatever rows and columns are computed beside
it. Nothing is packed: a single row reads each weight once, in the order of memory.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from dovetail.numerics.cpu.tiles_numba import (
    FLOATS,
    INT64,
    LANES,
    NEAREST,
    PAIRS,
    ask_for,
    data_of,
    first_lanes,
    load_halves,
    load_vector,
    shuffle,
    store_vector,
    to_bf16,
)

STEP = 2 * LANES  # values of k that an instruction takes
AHEAD = 2048  # values of the weights that are asked for before they are needed


def quarter_sums(builder: Any, vectors: list[Any]) -> Any:
    """In each quarter of a vector the sums of that quarter of four vectors, side by side."""
    a, b, c, d = vectors * (4 // len(vectors))
    quarters = range(0, LANES, 4)
    low = [at + i for at in quarters for i in (0, LANES, 1, LANES + 1)]  # neighbours of x and y, in turn
    high = [lane + 2 for lane in low]
    both = [builder.fadd(shuffle(builder, x, y, low), shuffle(builder, x, y, high)) for x, y in ((a, b), (c, d))]
    first = [at + i for at in quarters for i in (0, 1, LANES, LANES + 1)]
    return builder.fadd(shuffle(builder, *both, first), shuffle(builder, *both, [lane + 2 for lane in first]))


def sums_of_lanes(builder: Any, rows: list[Any]) -> Any:
    """Four sums of each of up to four rows of `quarter_sums`, row after row: halves added to halves."""
    a, b, c, d = (rows * 4)[:4] if len(rows) < 3 else (rows * 2)[:4]
    low, high = [*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]
    both = [builder.fadd(shuffle(builder, x, y, low), shuffle(builder, x, y, high)) for x, y in ((a, b), (c, d))]
    even = [at + i for at in range(0, 2 * LANES, 8) for i in range(4)]
    return builder.fadd(shuffle(builder, *both, even), shuffle(builder, *both, [lane + 4 for lane in even]))


def _make_tile(rows: int, outputs: int, in_parts: bool = False) -> Any:
    """c[i, j] in BF16 for so many rows i of x and rows j of w, which lie `stride` apart.

    `in_parts`: of values begin .. end - 1 of k, a whole number of STEPs but for the last part; `sums` has the lanes
    from one part to the next.
    """

    @intrinsic
    def tile(typing_context, x, x_at, w, w_at, stride, begin, end, c, c_at, ldc, sums, sums_at):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            left, right, out, lanes = (data_of(context, builder, signature, arguments, i) for i in (0, 2, 7, 10))
            k, first_k, last_k = arguments[4], arguments[5], arguments[6]

            def starts(data: Any, at: Any, count: int) -> list[Any]:
                return [builder.gep(data, [builder.add(at, builder.mul(INT64(i), k))]) for i in range(count)]

            x_rows, w_rows = starts(left, arguments[1], rows), starts(right, arguments[3], outputs)
            dot_type = ir.FunctionType(FLOATS, [FLOATS, PAIRS, PAIRS])
            dot = cgutils.get_or_insert_function(builder.module, dot_type, "llvm.x86.avx512bf16.dpbf16ps.512")
            slots = [[cgutils.alloca_once(builder, FLOATS) for _ in range(outputs)] for _ in range(rows)]
            places = [
                [
                    builder.gep(lanes, [builder.add(arguments[11], INT64((i * outputs + j) * LANES))])
                    for j in range(outputs)
                ]
                for i in range(rows)
            ]
            zero = ir.Constant(FLOATS, [0.0] * LANES)
            for slot in (slot for row in slots for slot in row):
                builder.store(zero, slot)
            if in_parts:
                with builder.if_then(builder.icmp_signed(">", first_k, INT64(0))):
                    for row, row_places in zip(slots, places, strict=True):
                        for slot, place in zip(row, row_places, strict=True):
                            builder.store(load_vector(builder, place, FLOATS), slot)

            def add(load: Any, at: Any, asks: bool) -> None:
                weights = []
                for row in w_rows:
                    if asks:
                        ask_for(builder, builder.gep(row, [builder.add(at, INT64(AHEAD))]), NEAREST)
                    weights.append(load(builder.gep(row, [at])))
                for row, row_slots in zip(x_rows, slots, strict=True):
                    value = load(builder.gep(row, [at]))
                    for weight, slot in zip(weights, row_slots, strict=True):
                        builder.store(builder.call(dot, [builder.load(slot), value, weight]), slot)

            whole = builder.add(first_k, builder.and_(builder.sub(last_k, first_k), INT64(-STEP)))
            with cgutils.for_range_slice(builder, first_k, whole, INT64(STEP), inc=True) as (at, _):
                add(lambda pointer: load_vector(builder, pointer, PAIRS), at, not in_parts)
            with builder.if_then(builder.icmp_signed("<", whole, last_k), likely=False):
                mask = first_lanes(builder, STEP, builder.sub(last_k, whole))
                add(lambda pointer: builder.bitcast(load_halves(builder, pointer, mask), PAIRS), whole, False)

            def finish() -> None:
                parts = [quarter_sums(builder, [builder.load(slot) for slot in row]) for row in slots]
                for first in range(0, rows, 4):
                    here = parts[first : first + 4]
                    halves = to_bf16(builder, [sums_of_lanes(builder, here)])
                    for i in range(len(here)):
                        place = builder.add(arguments[8], builder.mul(INT64(first + i), arguments[9]))
                        four = shuffle(builder, halves, halves, list(range(4 * i, 4 * i + outputs)))
                        address = builder.bitcast(builder.gep(out, [place]), four.type.as_pointer())
                        builder.store(four, address).align = 2

            if not in_parts:
                finish()
            else:
                with builder.if_else(builder.icmp_signed("<", last_k, k)) as (then, otherwise):
                    with then:
                        for row, row_places in zip(slots, places, strict=True):
                            for slot, place in zip(row, row_places, strict=True):
                                store_vector(builder, builder.load(slot), place)
                    with otherwise:
                        finish()
            return context.get_dummy_value()

        index = types.int64
        return types.none(x, index, w, index, index, index, index, c, index, index, sums, index), generate

    return tile


tile_1_4, tile_2_4, tile_4_4, tile_1_1 = (_make_tile(*size) for size in ((1, 4), (2, 4), (4, 4), (1, 1)))
part_6_4 = _make_tile(6, 4, True)
PART = 1024  # values of k that six rows and four are in the nearest cache with


@register_jitable
def dot_block(x, x_at, m, w, w_at, n, k, c, c_at, ldc, sums):  # type: ignore[no-untyped-def]
    """c[m, n] of m rows of x by n rows of w, flat arrays with rows of k."""
    whole = n // 4 * 4
    many = m // 6 * 6 if m >= 12 else 0
    if many:
        for begin in range(0, k, PART):
            end = min(begin + PART, k)
            for i in range(0, many, 6):
                for j in range(0, whole, 4):
                    part_6_4(
                        x,
                        x_at + i * k,
                        w,
                        w_at + j * k,
                        k,
                        begin,
                        end,
                        c,
                        c_at + i * ldc + j,
                        ldc,
                        sums,
                        (i * whole + j * 6) * 16,
                    )
    i = many
    while i < m:
        here = 4 if i + 4 <= m else (2 if i + 2 <= m else 1)
        at, to = x_at + i * k, c_at + i * ldc
        for j in range(0, whole, 4):
            if here == 4:
                tile_4_4(x, at, w, w_at + j * k, k, 0, k, c, to + j, ldc, sums, 0)
            elif here == 2:
                tile_2_4(x, at, w, w_at + j * k, k, 0, k, c, to + j, ldc, sums, 0)
            else:
                tile_1_4(x, at, w, w_at + j * k, k, 0, k, c, to + j, ldc, sums, 0)
        i += here
    for j in range(whole, n):
        for r in range(m):
            tile_1_1(x, x_at + r * k, w, w_at + j * k, k, 0, k, c, c_at + r * ldc + j, ldc, sums, 0)


ROWS = 48  # of x that stay in the second cache


@register_jitable
def dot_room(m, n, k):  # type: ignore[no-untyped-def]
    """Numbers that `dot_rows` needs to work with."""
    return min(m, ROWS) * n * LANES if k > PART else 0


@register_jitable
def dot_rows(x, x_at, m, w, w_at, n, k, c, c_at, ldc, sums):  # type: ignore[no-untyped-def]
    """`dot_block` for any number of rows."""
    for i in range(0, m, ROWS):
        dot_block(x, x_at + i * k, min(ROWS, m - i), w, w_at, n, k, c, c_at + i * ldc, ldc, sums)
