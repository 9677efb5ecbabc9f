"""AMX tiles: packs BF16 operands for them, and multiplies.

A core has eight tiles of 16 rows of 64 bytes. TDPBF16PS adds to a tile of 16 x 16 FP32 sums the products of 16 rows of
32 values with 16 columns of as many: 16 KFLOP in 16 cycles. We give them out so:

    0 1    sums of 32 x 32: rows 0 to 15, by columns
    2 3    rows 16 to 31
    4 5    the left operand, 16 rows of 32 values along k each: as they lie in memory where k is inner
    6 7    the right operand, 16 pairs along k of 16 columns each

A thread takes the tiles before it uses them (`take_tiles`) and gives them back, so that the system need not keep their
8 KB. Like VDPBF16PS the instruction takes subnormals for zero. Tiles are numbered here: LLVM does not give them out.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from dovetail.numerics.cpu.tiles_numba import (
    FLOATS,
    INT16,
    INT32,
    INT64,
    LANES,
    PAIRS,
    PANEL,
    data_of,
    first_lanes,
    load_halves,
    load_vector,
    shuffle,
    store_halves,
    store_vector,
    to_bf16,
    transpose,
)

STEP = 32  # values along k that one instruction sums
TILE = LANES * LANES  # words (32 bits) of a tile
BYTE = ir.IntType(8)
HALVES = ir.VectorType(INT16, STEP)
ROW_BYTES, PANEL_BYTES, STEP_BYTES = 4 * LANES, 4 * PANEL, 4 * LANES * PANEL
SUMS, LEFT, RIGHT = range(4), (4, 5), (6, 7)

# Two vectors of 32 halves interleaved inside each 128 bits, the low and the high four; which columns these are.
LOW, HIGH = ([j for q in range(4) for i in range(4) for j in (8 * q + at + i, 32 + 8 * q + at + i)] for at in (0, 4))
LOW_COLUMNS, HIGH_COLUMNS = ([8 * q + at + i for q in range(4) for i in range(4)] for at in (0, 4))


def call(builder: Any, name: str, *arguments: Any) -> None:
    signature = ir.FunctionType(ir.VoidType(), [each.type for each in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, signature, f"llvm.x86.{name}"), arguments)


def pointer_to(builder: Any, address: Any, more: Any) -> Any:
    return builder.inttoptr(builder.add(address, more), BYTE.as_pointer())


def load_tile(builder: Any, tile: int, address: Any, more: Any, stride: Any) -> None:
    call(builder, "tileloadd64", BYTE(tile), pointer_to(builder, address, more), stride)


@intrinsic
def address(typing_context, x, at):  # type: ignore[no-untyped-def]
    """Of x.flat[at], in bytes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ptrtoint(builder.gep(data_of(context, builder, signature, arguments, 0), [arguments[1]]), INT64)

    return types.int64(x, types.int64), generate


@intrinsic
def take_tiles(typing_context):  # type: ignore[no-untyped-def]
    """Eight whole tiles for this thread."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        form = bytearray(64)
        form[0] = 1  # palette
        for tile in range(8):
            form[16 + 2 * tile], form[48 + tile] = ROW_BYTES, LANES
        constant = cgutils.global_constant(builder, "tile_form", ir.Constant(ir.ArrayType(BYTE, 64), form))
        call(builder, "ldtilecfg", builder.bitcast(constant, BYTE.as_pointer()))
        return context.get_dummy_value()

    return types.none(), generate


@intrinsic
def give_tiles(typing_context):  # type: ignore[no-untyped-def]
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.none(), generate


@intrinsic
def clear_sums(typing_context):  # type: ignore[no-untyped-def]
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for tile in SUMS:
            call(builder, "tilezero", BYTE(tile))
        return context.get_dummy_value()

    return types.none(), generate


def _make_move(name: str) -> Any:
    @intrinsic
    def move(typing_context, address, stride, has_second):  # type: ignore[no-untyped-def]
        """Sums from or to FP32 memory at `address`, rows `stride` bytes apart; 16 rows of them or 32."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            for tile in SUMS[:2]:
                call(
                    builder, name, BYTE(tile), pointer_to(builder, arguments[0], INT64(tile * ROW_BYTES)), arguments[1]
                )
            with builder.if_then(arguments[2]):
                below = builder.mul(arguments[1], INT64(LANES))
                for tile in SUMS[2:]:
                    at = builder.add(below, INT64((tile - 2) * ROW_BYTES))
                    call(builder, name, BYTE(tile), pointer_to(builder, arguments[0], at), arguments[1])
            return context.get_dummy_value()

        return types.none(types.int64, types.int64, types.boolean), generate

    return move


load_sums, store_sums = _make_move("tileloadd64"), _make_move("tilestored64")


def _make_add(has_second: bool, places: int = 2) -> Any:
    @intrinsic
    def add(typing_context, left, second, stride, right):  # type: ignore[no-untyped-def]
        """Sums += 16 or 32 rows at the address `left`, `stride` bytes apart, by 32 columns (or 16) at `right`; 32 of k.

        Rows 16 to 31 begin `second` bytes behind the first.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            left, second, stride, right = arguments
            load_tile(builder, LEFT[0], left, INT64(0), stride)
            for place, tile in enumerate(RIGHT[:places]):
                load_tile(builder, tile, right, INT64(place * ROW_BYTES), INT64(PANEL_BYTES))
                call(builder, "tdpbf16ps", BYTE(SUMS[place]), BYTE(LEFT[0]), BYTE(tile))
            if has_second:
                load_tile(builder, LEFT[1], left, second, stride)
                for place, tile in enumerate(RIGHT[:places]):
                    call(builder, "tdpbf16ps", BYTE(SUMS[2 + place]), BYTE(LEFT[1]), BYTE(tile))
            return context.get_dummy_value()

        index = types.int64
        return types.none(index, index, index, index), generate

    return add


add_16_rows, add_32_rows, add_half_panel = _make_add(False), _make_add(True), _make_add(True, places=1)


def _load_row(builder: Any, source: Any, row: int, stride: Any, mask: Any, rows: Any) -> Any:
    """Of 32 halves; zeros where the mask says so and from `rows` on. Without a mask all are there."""
    here = builder.gep(source, [builder.mul(INT64(row), stride)])
    if mask is None:
        value = builder.load(builder.bitcast(here, HALVES.as_pointer()))
        value.align = 2
        return value
    nothing = ir.Constant(mask.type, [0] * STEP)
    return load_halves(builder, here, builder.select(builder.icmp_signed("<", INT64(row), rows), mask, nothing))


def _pack_rows(builder: Any, source: Any, stride: Any, target: Any, mask: Any, rows: Any) -> None:
    for i in range(LANES):
        row = builder.bitcast(_load_row(builder, source, i, stride, mask, rows), PAIRS)
        store_vector(builder, row, builder.gep(target, [INT64(i * LANES)]))


def _interleave(builder: Any, source: Any, stride: Any, mask: Any, rows: Any) -> list[tuple[Any, Any]]:
    """Pairs of two rows each of 32 x 32 values: those of LOW_COLUMNS and of HIGH_COLUMNS."""
    loaded = [_load_row(builder, source, i, stride, mask, rows) for i in range(STEP)]
    return [
        tuple(builder.bitcast(shuffle(builder, *loaded[i : i + 2], lanes), PAIRS) for lanes in (LOW, HIGH))
        for i in range(0, STEP, 2)
    ]


def _pack_columns(builder: Any, source: Any, stride: Any, target: Any, mask: Any, rows: Any) -> None:
    for columns, pairs in zip(
        (LOW_COLUMNS, HIGH_COLUMNS), zip(*_interleave(builder, source, stride, mask, rows), strict=True), strict=True
    ):
        for column, row in zip(columns, transpose(builder, list(pairs)), strict=True):
            store_vector(builder, row, builder.gep(target, [INT64(column * LANES)]))


def _pack_pairs(builder: Any, source: Any, stride: Any, target: Any, mask: Any, rows: Any) -> None:
    quarters = [[4 * q + i for q in order for i in range(4)] for order in ((0, 4, 1, 5), (2, 6, 3, 7))]
    for i, (low, high) in enumerate(_interleave(builder, source, stride, mask, rows)):
        for half, lanes in enumerate(quarters):
            place = builder.gep(target, [INT64(i * PANEL + half * LANES)])
            store_vector(builder, shuffle(builder, low, high, lanes), place)


def _pack_transposed(builder: Any, source: Any, stride: Any, target: Any, mask: Any, rows: Any) -> None:
    loaded = [builder.bitcast(_load_row(builder, source, i, stride, mask, rows), PAIRS) for i in range(LANES)]
    for i, row in enumerate(transpose(builder, loaded)):
        store_vector(builder, row, builder.gep(target, [INT64(i * PANEL)]))


def _make_pack(pack: Any, whole_rows: int) -> Any:
    @intrinsic
    def kernel(typing_context, x, at, stride, rows, columns, out, out_at):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, target = (data_of(context, builder, signature, arguments, i) for i in (0, 5))
            source, target = builder.gep(source, [arguments[1]]), builder.gep(target, [arguments[6]])
            rows, columns = arguments[3], arguments[4]
            is_whole = builder.and_(
                builder.icmp_signed(">=", rows, INT64(whole_rows)), builder.icmp_signed(">=", columns, INT64(STEP))
            )
            with builder.if_else(is_whole, likely=True) as (then, otherwise):
                with then:
                    pack(builder, source, arguments[2], target, None, rows)
                with otherwise:
                    mask = first_lanes(builder, STEP, columns)
                    pack(builder, source, arguments[2], target, mask, rows)
            return context.get_dummy_value()

        index = types.int64
        return types.none(x, index, index, index, index, out, index), generate

    return kernel


# From x [rows, columns], rows `stride` apart, what lies past either is zero:
pack_rows = _make_pack(_pack_rows, LANES)  # 16 rows of 32 along k -> a left tile
pack_columns = _make_pack(_pack_columns, STEP)  # 32 along k of 32 columns -> two left tiles
pack_transposed = _make_pack(_pack_transposed, LANES)  # 16 rows of 32 along k -> half a right panel's step
pack_pairs = _make_pack(_pack_pairs, STEP)  # 32 along k of 32 columns -> a right panel's step


def write(builder: Any, values: list[Any], out: Any, mask: Any) -> None:
    """Vectors of FP32, side by side, in the format of `out`; nothing where the mask is not set."""
    if not isinstance(out.type.pointee, ir.FloatType):
        store_halves(builder, to_bf16(builder, values), out, mask)
        return
    for i, value in enumerate(values):
        place = builder.bitcast(builder.gep(out, [INT64(i * LANES)]), FLOATS.as_pointer())
        some = shuffle(builder, mask, mask, list(range(i * LANES, (i + 1) * LANES)))
        signature = ir.FunctionType(ir.VoidType(), [FLOATS, place.type, INT32, some.type])
        function = cgutils.get_or_insert_function(builder.module, signature, "llvm.masked.store.v16f32.p0")
        builder.call(function, [value, place, INT32(4), some])


@intrinsic
def round_row(typing_context, sums, sums_at, c, c_at, columns):  # type: ignore[no-untyped-def]
    """32 FP32 sums -> BF16 or FP32 at c.flat[c_at], the first `columns` of them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target = (data_of(context, builder, signature, arguments, i) for i in (0, 2))
        row = builder.gep(source, [arguments[1]])
        values = [load_vector(builder, builder.gep(row, [INT64(at)]), FLOATS) for at in (0, LANES)]
        write(builder, values, builder.gep(target, [arguments[3]]), first_lanes(builder, STEP, arguments[4]))
        return context.get_dummy_value()

    index = types.int64
    return types.none(sums, index, c, index, index), generate
