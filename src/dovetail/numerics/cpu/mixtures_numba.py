"""Mixtures of BF16 rows as they lie in memory, with AVX-512 BF16.

    out[i] = sum_s p[i, s] w[s]

VDPBF16PS takes pairs: values of two rows side by side, and the two weights of a mixture in every lane. So a mixture is
summed over pairs of rows, in the order of s, whatever mixtures are computed beside it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from dovetail.numerics.cpu.tiles_numba import (
    FLOATS,
    INT32,
    INT64,
    LANES,
    PAIRS,
    add_dot,
    data_of,
    first_lanes,
    load_halves,
    shuffle,
    spread,
    store_halves,
    to_bf16,
)

COLUMNS = 2 * LANES  # of a mixture that are in registers at a time
# Lanes of a and b, side by side: those of each quarter's first half, and of its second one.
HALVES = [[at + j for at in range(first, COLUMNS, 8) for i in range(4) for j in (i, COLUMNS + i)] for first in (0, 4)]
# And back: sums of 4 columns each, in turn from the first halves and the second ones.
IN_ORDER = [
    [LANES * half + 4 * quarter + i for quarter in quarters for half in (0, 1) for i in range(4)]
    for quarters in ((0, 1), (2, 3))
]


def _make_mixture(count: int) -> Any:
    """COLUMNS columns from `column` on, or as many as there are below `width`, of `count` mixtures of `num` rows.

    Row s of w begins at starts[s]. p has rows `stride` apart, of `num` BF16 values, and a zero behind an odd number.
    """

    @intrinsic
    def mixture(typing_context, p, p_at, stride, w, starts, num, column, width, out, at, ldo):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            factors, rows, numbers, results = (data_of(context, builder, signature, arguments, i) for i in (0, 3, 4, 8))
            stride, num, column, width, ldo = (arguments[i] for i in (2, 5, 6, 7, 10))
            mask = first_lanes(builder, COLUMNS, builder.sub(width, column))
            sums = [[cgutils.alloca_once(builder, FLOATS) for _ in HALVES] for _ in range(count)]
            for slot in (slot for row in sums for slot in row):
                builder.store(ir.Constant(FLOATS, [0.0] * LANES), slot)
            last = builder.sub(num, INT64(1))
            with cgutils.for_range_slice(builder, INT64(0), num, INT64(2), inc=True) as (s, _):
                second = builder.add(s, INT64(1))
                second = builder.select(builder.icmp_signed("<", second, num), second, last)
                two = []
                for number in (s, second):
                    start = builder.add(builder.load(builder.gep(numbers, [number])), column)
                    two.append(load_halves(builder, builder.gep(rows, [start]), mask))
                sides = [builder.bitcast(shuffle(builder, *two, lanes), PAIRS) for lanes in HALVES]
                for i, slots in enumerate(sums):
                    place = builder.add(arguments[1], builder.add(builder.mul(INT64(i), stride), s))
                    pair = builder.load(builder.bitcast(builder.gep(factors, [place]), INT32.as_pointer()))
                    pair.align = 2
                    for side, slot in zip(sides, slots, strict=True):
                        add_dot(builder, slot, spread(builder, pair), side)
            for i, slots in enumerate(sums):
                both = [builder.load(slot) for slot in slots]
                halves = to_bf16(builder, [shuffle(builder, *both, lanes) for lanes in IN_ORDER])
                place = builder.add(arguments[9], builder.add(builder.mul(INT64(i), ldo), column))
                store_halves(builder, halves, builder.gep(results, [place]), mask)
            return context.get_dummy_value()

        index = types.int64
        return types.none(p, index, index, w, starts, index, index, index, out, index, index), generate

    return mixture


_mixture8, _mixture4, _mixture2, _mixture1 = (_make_mixture(count) for count in (8, 4, 2, 1))


@register_jitable
def mix_rows(p, p_at, stride, count, w, starts, num, width, out, at, ldo):  # type: ignore[no-untyped-def]
    """out[i, :width], BF16, of `count` mixtures of rows of w: flat arrays, see `_make_mixture`."""
    for column in range(0, width, COLUMNS):
        i = 0
        while i + 8 <= count:
            _mixture8(p, p_at + i * stride, stride, w, starts, num, column, width, out, at + i * ldo, ldo)
            i += 8
        if i + 4 <= count:
            _mixture4(p, p_at + i * stride, stride, w, starts, num, column, width, out, at + i * ldo, ldo)
            i += 4
        if i + 2 <= count:
            _mixture2(p, p_at + i * stride, stride, w, starts, num, column, width, out, at + i * ldo, ldo)
            i += 2
        if i < count:
            _mixture1(p, p_at + i * stride, stride, w, starts, num, column, width, out, at + i * ldo, ldo)
