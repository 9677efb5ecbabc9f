"""Packs BF16 operands, and multiplies them in tiles of sums, with AVX-512 BF16.

VDPBF16PS adds to each of 16 FP32 sums the products of one pair of BF16 with another: operands are packed so that the
two values of a pair, neighbours along k, lie side by side. Like torch's own BF16 products on these machines it takes
subnormals for zero.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # 32-bit lanes of a vector: FP32 sums, or pairs of BF16
TILE_ROWS = 8
PANEL = 2 * LANES  # columns of b that are packed together
LINE = 32  # BF16 values in a cache line


INT16, INT32, INT64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOATS = ir.VectorType(ir.FloatType(), LANES)
PAIRS = ir.VectorType(INT32, LANES)
HALVES = ir.VectorType(INT16, LANES)


def data_of(context: Any, builder: Any, signature: Any, arguments: Any, index: int) -> Any:
    return context.make_array(signature.args[index])(context, builder, arguments[index]).data


def load_vector(builder: Any, pointer: Any, type_: Any) -> Any:
    value = builder.load(builder.bitcast(pointer, type_.as_pointer()))
    value.align = 4
    return value


def store_vector(builder: Any, value: Any, pointer: Any) -> None:
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = 4


def spread(builder: Any, value: Any, lanes: int = LANES) -> Any:
    """A scalar in every lane."""
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    return shuffle(builder, builder.insert_element(undefined, value, INT32(0)), undefined, [0] * lanes)


def sum_lanes(builder: Any, vector: Any) -> Any:
    """Halves added to halves."""
    lanes = vector.type.count
    while lanes > 1:
        lanes //= 2
        low, high = (shuffle(builder, vector, vector, list(range(at, at + lanes))) for at in (0, lanes))
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, INT32(0))


def first_lanes(builder: Any, lanes: int, count: Any) -> Any:
    """A mask of the first `count` (int64, any) of so many lanes."""
    numbers = ir.Constant(ir.VectorType(INT64, lanes), list(range(lanes)))
    return builder.icmp_signed("<", numbers, spread(builder, count, lanes))


def load_halves(builder: Any, pointer: Any, mask: Any) -> Any:
    """BF16 bits where the mask is set, zeros elsewhere: nothing past the end of a matrix is read."""
    type_ = ir.VectorType(INT16, mask.type.count)
    pointer = builder.bitcast(pointer, type_.as_pointer())
    signature = ir.FunctionType(type_, [pointer.type, INT32, mask.type, type_])
    function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.masked.load.v{type_.count}i16.p0")
    return builder.call(function, [pointer, INT32(2), mask, ir.Constant(type_, [0] * type_.count)])


def store_halves(builder: Any, value: Any, pointer: Any, mask: Any) -> None:
    pointer = builder.bitcast(pointer, value.type.as_pointer())
    signature = ir.FunctionType(ir.VoidType(), [value.type, pointer.type, INT32, mask.type])
    function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.masked.store.v{mask.type.count}i16.p0")
    builder.call(function, [value, pointer, INT32(2), mask])


def shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT32, len(lanes)), lanes))


def to_bf16(builder: Any, values: list[Any]) -> Any:
    """One or two vectors of FP32, rounded to nearest even, side by side."""
    halves = ir.VectorType(INT16, LANES * len(values))
    name = "cvtneps2bf16" if len(values) == 1 else "cvtne2ps2bf16"
    signature = ir.FunctionType(halves, [FLOATS] * len(values))
    function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.x86.avx512bf16.{name}.512")
    return builder.call(function, values[::-1])


def add_dot(builder: Any, slot: Any, a: Any, b: Any) -> None:
    """*slot += the products of the pairs a and b: VDPBF16PS."""
    signature = ir.FunctionType(FLOATS, [FLOATS, PAIRS, PAIRS])
    dot = cgutils.get_or_insert_function(builder.module, signature, "llvm.x86.avx512bf16.dpbf16ps.512")
    builder.store(builder.call(dot, [builder.load(slot), a, b]), slot)


def sums_of(builder: Any, left: Any, right: Any, pairs: Any, start: Any) -> list[list[Any]]:
    """Registers of FP32 sums, `start` plus products of packed panels of a [pairs, LANES] and b [pairs, PANEL]."""
    slots = [[cgutils.alloca_once(builder, FLOATS) for _ in row] for row in start]
    for row, values in zip(slots, start, strict=True):
        for slot, value in zip(row, values, strict=True):
            builder.store(value, slot)
    with cgutils.for_range(builder, pairs) as loop:
        a_here = builder.gep(left, [builder.mul(loop.index, INT64(LANES))])
        b_here = builder.gep(right, [builder.mul(loop.index, INT64(PANEL))])
        weights = [load_vector(builder, builder.gep(b_here, [INT64(v * LANES)]), PAIRS) for v in range(len(slots[0]))]
        for i, row in enumerate(slots):
            pair = spread(builder, builder.load(builder.gep(a_here, [INT64(i)])))
            for weight, slot in zip(weights, row, strict=True):
                add_dot(builder, slot, pair, weight)
    return [[builder.load(slot) for slot in row] for row in slots]


def _make_bf16_tile(vectors: int) -> Any:
    """Up to TILE_ROWS x (16 vectors) of c in BF16; nothing past row m or column n is written."""

    @intrinsic
    def tile(typing_context, a, a_at, b, b_at, pairs, c, c_at, ldc, m, n):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            left, right, out = (data_of(context, builder, signature, arguments, i) for i in (0, 2, 5))
            left, right = builder.gep(left, [arguments[1]]), builder.gep(right, [arguments[3]])
            zeros = [[ir.Constant(FLOATS, [0.0] * LANES)] * vectors] * TILE_ROWS
            sums = sums_of(builder, left, right, arguments[4], zeros)
            mask = first_lanes(builder, LANES * vectors, arguments[9])
            for i, row in enumerate(sums):
                with builder.if_then(builder.icmp_signed("<", INT64(i), arguments[8]), likely=True):
                    first = builder.gep(out, [builder.add(arguments[6], builder.mul(INT64(i), arguments[7]))])
                    store_halves(builder, to_bf16(builder, row), first, mask)
            return context.get_dummy_value()

        index = types.int64
        return types.none(a, index, b, index, index, c, index, index, index, index), generate

    return tile


def _makefloat_tile(adds: bool) -> Any:
    """TILE_ROWS x PANEL of c in FP32, whole: c has room for it. `adds` to what c holds, or replaces it."""

    @intrinsic
    def tile(typing_context, a, a_at, b, b_at, pairs, c, c_at, ldc):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            left, right, out = (data_of(context, builder, signature, arguments, i) for i in (0, 2, 5))
            left, right = builder.gep(left, [arguments[1]]), builder.gep(right, [arguments[3]])
            places = []
            for i in range(TILE_ROWS):
                start = builder.add(arguments[6], builder.mul(INT64(i), arguments[7]))
                places.append([builder.gep(out, [builder.add(start, INT64(at))]) for at in range(0, PANEL, LANES)])
            zero = ir.Constant(FLOATS, [0.0] * LANES)
            begin = [[load_vector(builder, place, FLOATS) if adds else zero for place in row] for row in places]
            for row, sums in zip(places, sums_of(builder, left, right, arguments[4], begin), strict=True):
                for place, value in zip(row, sums, strict=True):
                    store_vector(builder, value, place)
            return context.get_dummy_value()

        index = types.int64
        return types.none(a, index, b, index, index, c, index, index), generate

    return tile


bf16_tile1, bf16_tile2 = _make_bf16_tile(1), _make_bf16_tile(2)
float_tile, adding_tile = _makefloat_tile(adds=False), _makefloat_tile(adds=True)


NEAREST, SECOND = 3, 2  # caches


def ask_for(builder: Any, pointer: Any, level: int) -> None:
    """Ask for the cache line of `pointer`, into this level of caches and those behind it."""
    address = builder.bitcast(pointer, ir.IntType(8).as_pointer())
    signature = ir.FunctionType(ir.VoidType(), [address.type, INT32, INT32, INT32])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
    builder.call(function, [address, INT32(0), INT32(level), INT32(1)])


def transpose(builder: Any, rows: list[Any]) -> list[Any]:
    """16 vectors of 16 pairs, transposed: 32- and 64-bit interleaving, then 128-bit lanes."""

    def interleave(size: int, high: bool) -> list[int]:
        lanes = []
        for quarter in range(0, LANES, 4):
            for at in range(quarter + 2 * high, quarter + 2 * high + 2, size):
                lanes += [at + i for i in range(size)] + [LANES + at + i for i in range(size)]
        return lanes

    def quarters(a: int, b: int) -> list[int]:
        return [4 * q + i for q in (a, b, a + 4, b + 4) for i in range(4)]

    by_pair = []
    for i in range(0, LANES, 2):
        by_pair += [shuffle(builder, rows[i], rows[i + 1], interleave(1, high)) for high in (False, True)]
    by_four: list[Any] = []  # [4 block + c]: of rows 4 block ... 4 block + 3, columns c, 4 + c, 8 + c, 12 + c
    for i in range(0, LANES, 4):
        for low in (0, 1):
            pairs = by_pair[i + low], by_pair[i + 2 + low]
            by_four += [shuffle(builder, *pairs, interleave(2, high)) for high in (False, True)]
    result: list[Any] = [None] * LANES
    for c in range(4):
        for first, lanes in ((0, quarters(0, 2)), (4, quarters(1, 3))):
            low = shuffle(builder, by_four[c], by_four[4 + c], lanes)
            high = shuffle(builder, by_four[8 + c], by_four[12 + c], lanes)
            result[first + c] = shuffle(builder, low, high, quarters(0, 2))
            result[first + 8 + c] = shuffle(builder, low, high, quarters(1, 3))
    return result


@intrinsic
def pack_transposed(typing_context, x, at, stride, rows, left, out, out_at, out_stride):  # type: ignore[no-untyped-def]
    """out[p, i] = the pair (x[i, 2p], x[i, 2p + 1]) for 16 rows i and 16 pairs p.

    Only `rows` rows, and `left` elements of each, exist: zeros for elements past the end, anything in rows past it.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target = (data_of(context, builder, signature, arguments, i) for i in (0, 5))
        mask = first_lanes(builder, 2 * LANES, arguments[4])
        rows = []
        for i in range(LANES):
            row = builder.select(builder.icmp_signed("<", INT64(i), arguments[3]), INT64(i), INT64(0))
            start = builder.add(arguments[1], builder.mul(row, arguments[2]))
            halves = load_halves(builder, builder.gep(source, [start]), mask)
            rows.append(builder.bitcast(halves, PAIRS))
        for i, row in enumerate(transpose(builder, rows)):
            start = builder.add(arguments[6], builder.mul(INT64(i), arguments[7]))
            store_vector(builder, row, builder.gep(target, [start]))
        return context.get_dummy_value()

    index = types.int64
    return types.none(x, index, index, index, index, out, index, index), generate


@intrinsic
def pack_interleaved(typing_context, x, at, stride, has_second, columns, out, out_at):  # type: ignore[no-untyped-def]
    """out[i] = the pair (x[0, i], x[1, i]) of two rows `stride` apart, zeros past `columns` and for no second row."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target = (data_of(context, builder, signature, arguments, i) for i in (0, 5))
        first = load_halves(builder, builder.gep(source, [arguments[1]]), first_lanes(builder, LANES, arguments[4]))
        columns = builder.select(arguments[3], arguments[4], INT64(0))
        start = builder.add(arguments[1], arguments[2])
        second = load_halves(builder, builder.gep(source, [start]), first_lanes(builder, LANES, columns))
        lanes = [j for i in range(LANES) for j in (i, LANES + i)]
        pairs = builder.bitcast(shuffle(builder, first, second, lanes), PAIRS)
        store_vector(builder, pairs, builder.gep(target, [arguments[6]]))
        return context.get_dummy_value()

    index = types.int64
    return types.none(x, index, index, types.boolean, index, out, index), generate


@intrinsic
def prefetch(typing_context, x, at):  # type: ignore[no-untyped-def]
    """Ask for x.flat[at]'s cache line, into the second level on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        ask_for(builder, builder.gep(data_of(context, builder, signature, arguments, 0), [arguments[1]]), SECOND)
        return context.get_dummy_value()

    return types.none(x, types.int64), generate


@intrinsic
def take_next(typing_context, counter):  # type: ignore[no-untyped-def]
    """counter[0]++, atomically; returns what it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = data_of(context, builder, signature, arguments, 0)
        return builder.atomic_rmw("add", pointer, INT64(1), "monotonic")

    return types.int64(counter), generate
