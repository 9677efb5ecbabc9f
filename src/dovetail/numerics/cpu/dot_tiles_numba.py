"""Products of BF16 rows whose sums run along k in sixteen lanes, with AVX-512 BF16.

VDPBF16PS takes 32 values of a row of activations and 32 of a row of weights as they lie in memory, and adds their
products to 16 sums. A result is the sum of these lanes, in one order, whatever rows and columns are computed beside
it. Nothing is packed: a single row reads each weight once, in the order of memory.
"""

from __future__ import annotations

from collections.abc import Callable
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
    add_dot,
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
AHEAD = 8  # rows of weights before which memory is asked for them
MANY = 6  # rows of the largest tile, which has `OUTPUTS` columns like the others
OUTPUTS = 4
PART = 1024  # values of k that the rows of a tile have in the nearest cache,
ROWS = 48  # and rows of activations that are in the second one


def quarter_sums(builder: Any, vectors: list[Any]) -> Any:
    """In each quarter of a vector the sums of that quarter of four vectors (or one), side by side."""
    a, b, c, d = vectors * (4 // len(vectors))
    quarters = range(0, LANES, 4)
    even = [at + i for at in quarters for i in (0, LANES, 1, LANES + 1)]  # neighbours of x and y, in turn
    odd = [lane + 2 for lane in even]
    both = [builder.fadd(shuffle(builder, x, y, even), shuffle(builder, x, y, odd)) for x, y in ((a, b), (c, d))]
    first = [at + i for at in quarters for i in (0, 1, LANES, LANES + 1)]
    return builder.fadd(shuffle(builder, *both, first), shuffle(builder, *both, [lane + 2 for lane in first]))


def sums_of_lanes(builder: Any, rows: list[Any]) -> Any:
    """Up to four `quarter_sums` -> their four sums each, row after row: halves added to halves, then quarters."""
    a, b, c, d = (rows * 4)[:4]
    low, high = [*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]
    both = [builder.fadd(shuffle(builder, x, y, low), shuffle(builder, x, y, high)) for x, y in ((a, b), (c, d))]
    first = [at + i for at in range(0, 2 * LANES, 8) for i in range(4)]
    return builder.fadd(shuffle(builder, *both, first), shuffle(builder, *both, [lane + 4 for lane in first]))


def _write(builder: Any, sums: list[list[Any]], out: Any, at: Any, stride: Any) -> None:
    """out.flat[at + i stride + j] = the sum of *sums[i][j], in the format of `out`."""
    parts = [quarter_sums(builder, [builder.load(slot) for slot in row]) for row in sums]
    for first in range(0, len(parts), 4):
        here = parts[first : first + 4]
        values = sums_of_lanes(builder, here)
        if not isinstance(out.type.pointee, ir.FloatType):
            values = to_bf16(builder, [values])
        for i in range(len(here)):
            row = shuffle(builder, values, values, list(range(4 * i, 4 * i + len(sums[0]))))
            place = builder.gep(out, [builder.add(at, builder.mul(INT64(first + i), stride))])
            builder.store(row, builder.bitcast(place, row.type.as_pointer())).align = 2


def _make_tile(rows: int, outputs: int, asks: bool = True) -> Any:
    """c[i, j], BF16 or FP32, for so many rows i of x and rows j of w, which are k long.

    Values begin .. end - 1 of k are added, a whole number of STEPs but for the last; `lanes` has the sums from one
    part of k to the next. `asks`: rows of w that come later are asked for, since they are in memory yet.
    """

    @intrinsic
    def tile(typing_context, x, x_at, w, w_at, k, begin, end, c, c_at, ldc, lanes, lanes_at):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            left, right, out, kept = (data_of(context, builder, signature, arguments, i) for i in (0, 2, 7, 10))
            k, begin, end = arguments[4:7]

            def starts(data: Any, at: Any, count: int) -> list[Any]:
                return [builder.gep(data, [builder.add(at, builder.mul(INT64(i), k))]) for i in range(count)]

            x_rows, w_rows = starts(left, arguments[1], rows), starts(right, arguments[3], outputs)
            sums = [[cgutils.alloca_once(builder, FLOATS) for _ in range(outputs)] for _ in range(rows)]
            slots = [slot for row in sums for slot in row]
            places = [builder.gep(kept, [builder.add(arguments[11], INT64(i * LANES))]) for i in range(rows * outputs)]
            for slot in slots:
                builder.store(ir.Constant(FLOATS, [0.0] * LANES), slot)
            with builder.if_then(builder.icmp_signed(">", begin, INT64(0))):
                for slot, place in zip(slots, places, strict=True):
                    builder.store(load_vector(builder, place, FLOATS), slot)

            ahead = builder.mul(k, INT64(AHEAD))

            def add(load: Callable[[Any], Any], at: Any) -> None:
                if asks:
                    for row in w_rows:
                        ask_for(builder, builder.gep(row, [builder.add(at, ahead)]), NEAREST)
                x, w = ([load(builder.gep(row, [at])) for row in each] for each in (x_rows, w_rows))
                for value, row in zip(x, sums, strict=True):
                    for weight, slot in zip(w, row, strict=True):
                        add_dot(builder, slot, value, weight)

            whole = builder.add(begin, builder.and_(builder.sub(end, begin), INT64(-STEP)))
            with cgutils.for_range_slice(builder, begin, whole, INT64(STEP), inc=True) as (at, _):
                add(lambda place: load_vector(builder, place, PAIRS), at)
            with builder.if_then(builder.icmp_signed("<", whole, end), likely=False):
                mask = first_lanes(builder, STEP, builder.sub(end, whole))
                add(lambda place: builder.bitcast(load_halves(builder, place, mask), PAIRS), whole)
            with builder.if_else(builder.icmp_signed("<", end, k)) as (is_part, is_last):
                with is_part:
                    for slot, place in zip(slots, places, strict=True):
                        store_vector(builder, builder.load(slot), place)
                with is_last:
                    _write(builder, sums, out, arguments[8], arguments[9])
            return context.get_dummy_value()

        index = types.int64
        return types.none(x, index, w, index, index, index, index, c, index, index, lanes, index), generate

    return tile


tile_6, tile_4, tile_2, tile_1 = (_make_tile(rows, OUTPUTS) for rows in (MANY, 4, 2, 1))
quiet_tile_6 = _make_tile(MANY, OUTPUTS, asks=False)
single = _make_tile(1, 1)


@register_jitable
def room(rows, columns, k):  # type: ignore[no-untyped-def]
    """How many FP32 `multiply` needs to work with."""
    return min(rows, ROWS) * columns * LANES if k > PART else 0


@register_jitable
def multiply(x, x_at, m, w, w_at, n, k, c, c_at, ldc, lanes):  # type: ignore[no-untyped-def]
    """c[m, n] of m rows of x by n rows of w: flat arrays, rows of x and w are k long."""
    for first in range(0, m, ROWS):
        _multiply(x, x_at + first * k, min(ROWS, m - first), w, w_at, n, k, c, c_at + first * ldc, ldc, lanes)


@register_jitable
def _multiply(x, x_at, m, w, w_at, n, k, c, c_at, ldc, lanes):  # type: ignore[no-untyped-def]
    whole = n // OUTPUTS * OUTPUTS
    many = m // MANY * MANY if m >= 2 * MANY else 0
    for begin in range(0, max(k, 1) if many else 0, PART):  # sums of nothing are written too
        end = min(begin + PART, k)
        for i in range(0, many, MANY):
            for j in range(0, whole, OUTPUTS):
                kept = (i * whole + j * MANY) * LANES
                at, to = x_at + i * k, c_at + i * ldc + j
                if i == 0:  # the rows of weights are in a cache afterwards
                    tile_6(x, at, w, w_at + j * k, k, begin, end, c, to, ldc, lanes, kept)
                else:
                    quiet_tile_6(x, at, w, w_at + j * k, k, begin, end, c, to, ldc, lanes, kept)
    i = many
    while i < m:
        here = 4 if i + 4 <= m else (2 if i + 2 <= m else 1)
        at, to = x_at + i * k, c_at + i * ldc
        for j in range(0, whole, OUTPUTS):
            if here == 4:
                tile_4(x, at, w, w_at + j * k, k, 0, k, c, to + j, ldc, lanes, 0)
            elif here == 2:
                tile_2(x, at, w, w_at + j * k, k, 0, k, c, to + j, ldc, lanes, 0)
            else:
                tile_1(x, at, w, w_at + j * k, k, 0, k, c, to + j, ldc, lanes, 0)
        i += here
    for j in range(whole, n):
        for i in range(m):
            single(x, x_at + i * k, w, w_at + j * k, k, 0, k, c, c_at + i * ldc + j, ldc, lanes, 0)
