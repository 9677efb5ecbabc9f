"""Multiplies a few rows by a matrix as it lies in memory, with AVX-512 BF16.

The tiles of `tiles_numba` take packed operands, which many rows pay for. Here weights are transposed in registers on
their way.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from dovetail.numerics.cpu.tiles_numba import (
    FLOATS,
    INT64,
    LANES,
    NEAREST,
    PAIRS,
    PANEL,
    ask_for,
    data_of,
    first_lanes,
    load_vector,
    spread,
    store_halves,
    to_bf16,
    transpose,
)

AHEAD = 128  # BF16 values of a row that are asked for before they are needed


def _make_row_tile(count: int, vectors: int) -> Any:
    """Up to `count` rows of c in BF16, 16 `vectors` columns, of a packed in panels and b as it lies in memory, [n, k].

    Each block of 16 rows and 16 pairs of b is transposed in registers, and its sums are in the order of k: bit for bit
    those of packed tiles. For few rows, which do not pay for packing. k is a whole number of PANELs; nothing past row m
    or column n is written.
    """

    @intrinsic
    def tile(typing_context, a, a_at, b, b_at, stride, k, c, c_at, ldc, m, n):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            left, right, out = (data_of(context, builder, signature, arguments, i) for i in (0, 2, 6))
            left = builder.gep(left, [arguments[1]])
            dot_signature = ir.FunctionType(FLOATS, [FLOATS, PAIRS, PAIRS])
            dot = cgutils.get_or_insert_function(builder.module, dot_signature, "llvm.x86.avx512bf16.dpbf16ps.512")
            sums = [[cgutils.alloca_once(builder, FLOATS) for _ in range(vectors)] for _ in range(count)]
            for slot in (slot for row in sums for slot in row):
                builder.store(ir.Constant(FLOATS, [0.0] * LANES), slot)
            starts = []
            for i in range(LANES * vectors):  # rows past the last are the first again
                row = builder.select(builder.icmp_signed("<", INT64(i), arguments[10]), INT64(i), INT64(0))
                starts.append(builder.gep(right, [builder.add(arguments[3], builder.mul(row, arguments[4]))]))
            with cgutils.for_range_slice(builder, INT64(0), arguments[5], INT64(PANEL), inc=True) as (at, _):
                a_here = builder.gep(left, [builder.mul(builder.lshr(at, INT64(1)), INT64(LANES))])
                for v in range(vectors):
                    rows = []
                    for start in starts[v * LANES : (v + 1) * LANES]:
                        here = builder.gep(start, [at])
                        ask_for(builder, builder.gep(here, [INT64(AHEAD)]), NEAREST)
                        rows.append(load_vector(builder, here, PAIRS))
                    for p, weight in enumerate(transpose(builder, rows)):
                        for i in range(count):
                            pair = builder.load(builder.gep(a_here, [INT64(p * LANES + i)]))
                            slot = sums[i][v]
                            builder.store(builder.call(dot, [builder.load(slot), spread(builder, pair), weight]), slot)
            mask = first_lanes(builder, LANES * vectors, arguments[10])
            for i, row in enumerate(sums):
                with builder.if_then(builder.icmp_signed("<", INT64(i), arguments[9]), likely=True):
                    first = builder.gep(out, [builder.add(arguments[7], builder.mul(INT64(i), arguments[8]))])
                    store_halves(builder, to_bf16(builder, [builder.load(slot) for slot in row]), first, mask)
            return context.get_dummy_value()

        index = types.int64
        return types.none(a, index, b, index, index, index, c, index, index, index, index), generate

    return tile


row_tile1, row_tile2, row_tile4, row_tile8 = (_make_row_tile(*size) for size in ((1, 2), (2, 2), (4, 2), (8, 1)))
