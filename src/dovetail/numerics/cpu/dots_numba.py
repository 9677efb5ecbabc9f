"""Dot products and mixtures of rows in vector code, for the CPU kernels.

    dots   out[i] = sum_k w[row, k] x[first + i, k]                 one row of weights, several of activations
    products   dots of several rows of weights, in an order in which activations stay in the nearest cache
    mix    out[i, c] = sum_s p[first + i, s] w[row + s, c], c < C   several mixtures of the same rows of weights

Weights w are FP32 or BF16 (as uint16) and are loaded and widened once for up to four results. Every result has
its own accumulators, summed in an order that depends on its length alone: what comes out for one row is bit for bit
the same whether it is computed alone or with others. A compiler's own vectorisation gives no such promise, and
leaves up to 63 elements of a row to scalar code. Rows are named by number, since a view of a row costs more
than the row's arithmetic.

Written with LLVM's 16-lane vectors, which LLVM splits on machines with narrower ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload, register_jitable

from dovetail.numerics.cpu.scalars_numba import load
from dovetail.numerics.cpu.tiles_numba import spread, sum_lanes

LANES = 16
UNROLL = 2  # accumulators per result in `dots`
OUTPUTS = 2  # rows of weights that `products` takes together: 4 rows of activations then have 16 accumulators
PREFETCH_BYTES = 4096
BLOCK = 2 * LANES  # columns of `mix` that are in registers at a time

FLOAT, VECTOR = ir.FloatType(), ir.VectorType(ir.FloatType(), LANES)
INT64 = ir.IntType(64)


def _load_weights(builder: Any, pointer: Any, lanes: int) -> Any:
    """`lanes` weights as FP32."""
    element = pointer.type.pointee
    if lanes == 1:
        value = builder.load(pointer)
        if isinstance(element, ir.FloatType):
            return value
        wide = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, FLOAT)
    value = builder.load(builder.bitcast(pointer, ir.VectorType(element, lanes).as_pointer()))
    value.align = element.width // 8 if isinstance(element, ir.IntType) else 4
    if isinstance(element, ir.FloatType):
        return value
    wide_type = ir.VectorType(ir.IntType(32), lanes)
    wide = builder.shl(builder.zext(value, wide_type), ir.Constant(wide_type, [16] * lanes))
    return builder.bitcast(wide, VECTOR)


def _load_floats(builder: Any, pointer: Any) -> Any:
    value = builder.load(builder.bitcast(pointer, VECTOR.as_pointer()))
    value.align = 4
    return value


def _multiply_add(builder: Any, a: Any, b: Any, total: Any) -> None:
    """*total += a * b, rounded once."""
    suffix = "f32" if a.type == FLOAT else f"v{LANES}f32"
    signature = ir.FunctionType(a.type, [a.type] * 3)
    function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.fma.{suffix}")
    builder.store(builder.call(function, [a, b, builder.load(total)]), total)


def _prefetch(builder: Any, pointer: Any) -> None:
    """Ask for the memory PREFETCH_BYTES past `pointer`: hardware stops at every 4 KB page, a matrix does not."""
    address = builder.gep(builder.bitcast(pointer, ir.IntType(8).as_pointer()), [INT64(PREFETCH_BYTES)])
    word = ir.IntType(32)
    signature = ir.FunctionType(ir.VoidType(), [address.type, word, word, word])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
    builder.call(function, [address, word(0), word(3), word(1)])  # to read, into all caches, data


def _accumulator(builder: Any, type_: Any) -> Any:
    slot = cgutils.alloca_once(builder, type_)
    builder.store(ir.Constant(type_, [0.0] * LANES if type_ == VECTOR else 0.0), slot)
    return slot


def _arrays(context: Any, builder: Any, signature: Any, arguments: Any) -> list[Any]:
    kinds = zip(signature.args, arguments, strict=True)
    return [context.make_array(kind)(context, builder, value) for kind, value in kinds if isinstance(kind, types.Array)]


def _make_dots(count: int, outputs: int) -> Any:
    """Of `count` rows of activations and `outputs` rows of weights that follow one another."""

    @intrinsic
    def dots(typing_context: Any, w: Any, row: Any, x: Any, first: Any, out: Any, at: Any, step: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
            weights, rows, results = _arrays(context, builder, signature, arguments)
            width = cgutils.unpack_tuple(builder, rows.shape)[1]

            def starts_of(data: Any, start: Any, number: int) -> list[Any]:
                return [builder.gep(data, [builder.mul(builder.add(start, INT64(i)), width)]) for i in range(number)]

            weight_rows, starts = (
                starts_of(weights.data, arguments[1], outputs),
                starts_of(rows.data, arguments[3], count),
            )
            pairs = [(i, j) for i in range(count) for j in range(outputs)]
            whole = {pair: [_accumulator(builder, VECTOR) for _ in range(UNROLL)] for pair in pairs}
            rest = {pair: _accumulator(builder, FLOAT) for pair in pairs}

            def add(begin: Any, end: Any, unroll: int) -> None:
                with cgutils.for_range_slice(builder, begin, end, INT64(LANES * unroll), inc=True) as (index, _):
                    for u in range(unroll):
                        here = builder.add(index, INT64(u * LANES))
                        if u % 2 == 0:  # 32 BF16 are a cache line
                            for weight_row in weight_rows:
                                _prefetch(builder, builder.gep(weight_row, [here]))
                        loaded = [_load_weights(builder, builder.gep(each, [here]), LANES) for each in weight_rows]
                        for i, start in enumerate(starts):
                            value = _load_floats(builder, builder.gep(start, [here]))
                            for j, weight in enumerate(loaded):
                                _multiply_add(builder, weight, value, whole[i, j][u])

            unrolled = builder.and_(width, INT64(-LANES * UNROLL))
            vectors = builder.and_(width, INT64(-LANES))
            add(INT64(0), unrolled, UNROLL)
            add(unrolled, vectors, 1)
            with cgutils.for_range_slice(builder, vectors, width, INT64(1), inc=True) as (index, _):
                for i, j in pairs:
                    weight = _load_weights(builder, builder.gep(weight_rows[j], [index]), 1)
                    _multiply_add(builder, weight, builder.load(builder.gep(starts[i], [index])), rest[i, j])
            for i, j in pairs:
                vector = builder.load(whole[i, j][0])
                for more in whole[i, j][1:]:
                    vector = builder.fadd(vector, builder.load(more))
                value = builder.fadd(sum_lanes(builder, vector), builder.load(rest[i, j]))
                index = builder.add(arguments[5], builder.add(builder.mul(INT64(i), arguments[6]), INT64(j)))
                builder.store(value, builder.gep(results.data, [index]))

        integer = types.int64
        return types.void(w, integer, x, integer, out, integer, integer), generate

    return dots


def _make_mix(count: int) -> Any:
    @intrinsic
    def mix(typing_context: Any, p: Any, first: Any, num: Any, w: Any, row: Any, column: Any, out: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
            factors, weights, *numbers, results = _arrays(context, builder, signature, arguments)
            stride = cgutils.unpack_tuple(builder, factors.shape)[1]
            width = cgutils.unpack_tuple(builder, weights.shape)[1]
            out_width = cgutils.unpack_tuple(builder, results.shape)[1]
            block = range(BLOCK // LANES)
            totals = [[_accumulator(builder, VECTOR) for _ in block] for _ in range(count)]
            with cgutils.for_range(builder, arguments[2]) as loop:
                if numbers:
                    number = builder.load(builder.gep(numbers[0].data, [loop.index]))
                else:
                    number = builder.add(arguments[4], loop.index)
                at = builder.mul(number, width)
                here = builder.gep(weights.data, [builder.add(at, arguments[5])])
                vectors = [_load_weights(builder, builder.gep(here, [INT64(u * LANES)]), LANES) for u in block]
                for i in range(count):
                    start = builder.mul(builder.add(arguments[1], INT64(i)), stride)
                    factor = builder.load(builder.gep(factors.data, [builder.add(start, loop.index)]))
                    for vector, total in zip(vectors, totals[i], strict=True):
                        _multiply_add(builder, spread(builder, factor), vector, total)
            for i in range(count):
                start = builder.add(builder.mul(builder.add(arguments[7], INT64(i)), out_width), arguments[5])
                for u, total in enumerate(totals[i]):
                    where = builder.gep(results.data, [builder.add(start, INT64(u * LANES))])
                    stored = builder.store(builder.load(total), builder.bitcast(where, VECTOR.as_pointer()))
                    stored.align = 4

        integer = types.int64
        where = row if isinstance(row, types.Array) else integer
        return types.void(p, integer, integer, w, where, integer, out, integer), generate

    return mix


_dots1, _dots2, _dots4 = (_make_dots(count, 1) for count in (1, 2, 4))
_tile1, _tile2, _tile4 = _make_dots(1, OUTPUTS), _make_dots(2, OUTPUTS), _make_dots(4, OUTPUTS)
_mix1, _mix2, _mix4 = (_make_mix(count) for count in (1, 2, 4))


@register_jitable(forceinline=True)
def dots(w, row, x, first, count, out, at, step):  # type: ignore[no-untyped-def]
    """out.flat[at + i * step] = w[row] . x[first + i] for i < count; all contiguous, w and x [., K], x FP32."""
    i = 0
    while i + 4 <= count:
        _dots4(w, row, x, first + i, out, at + i * step, step)
        i += 4
    if i + 2 <= count:
        _dots2(w, row, x, first + i, out, at + i * step, step)
        i += 2
    if i < count:
        _dots1(w, row, x, first + i, out, at + i * step, step)


@register_jitable
def products(w, row, num, x, first, count, out, at, step):  # type: ignore[no-untyped-def]
    """out.flat[at + i * step + j] = w[row + j] . x[first + i] for i < count and j < num.

    Four rows of activations at a time, for all rows of weights: 32 rows of 2,048 do not fit into a first-level cache,
    four do, and some dozen rows of weights wait in the second for the next four.
    """
    whole = num // OUTPUTS * OUTPUTS
    i = 0
    while i < count:
        here = 4 if i + 4 <= count else (2 if i + 2 <= count else 1)
        for j in range(0, whole, OUTPUTS):
            to = at + i * step + j
            if here == 4:
                _tile4(w, row + j, x, first + i, out, to, step)
            elif here == 2:
                _tile2(w, row + j, x, first + i, out, to, step)
            else:
                _tile1(w, row + j, x, first + i, out, to, step)
        for j in range(whole, num):
            dots(w, row + j, x, first + i, here, out, at + i * step + j, step)
        i += here


def _number(row, s):  # type: ignore[no-untyped-def]
    """The number of row s of a mixture; kernels only."""
    raise AssertionError("compiled code only")


@overload(_number, inline="always")
def _number_of(row, s):  # type: ignore[no-untyped-def]  # numba compares the signatures word for word
    if isinstance(row, types.Array):
        return lambda row, s: row[s]
    return lambda row, s: row + s


@register_jitable(forceinline=True)
def mix(p, first, count, num, w, row, width, out, at):  # type: ignore[no-untyped-def]
    """out[at + i, :width] = p[first + i, :num] @ w[row : row + num, :width] for i < count; all contiguous, p FP32.

    Where rows stand apart, as in the pages of a cache, `row` is an array with the number of each.
    """
    whole = width // BLOCK * BLOCK
    for column in range(0, whole, BLOCK):
        i = 0
        while i + 4 <= count:
            _mix4(p, first + i, num, w, row, column, out, at + i)
            i += 4
        if i + 2 <= count:
            _mix2(p, first + i, num, w, row, column, out, at + i)
            i += 2
        if i < count:
            _mix1(p, first + i, num, w, row, column, out, at + i)
    for i in range(count):
        for c in range(whole, width):
            total = np.float32(0.0)
            for s in range(num):
                total += p[first + i, s] * load(w[_number(row, s)], c)
            out[at + i, c] = total
