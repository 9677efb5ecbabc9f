"""CPU kernel of `accumulate`: the sums of Hopper's Tensor Core, bit for bit.

One call computes all groups of a product.

A task is up to ROWS x PANEL outputs of one group. It goes through k in whole groups of GROUP, filled up with zeros,
whose values are widened to FP32 once per task beside their exponents: int8, NOTHING that of a zero. A row's PANEL
sums stay in registers while its GROUP products are added.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic, register_jitable
from torch import Tensor

from dovetail.numerics.cpu.kernels import array, exact_kernel
from dovetail.numerics.cpu.scalars_numba import bits_of, load, store
from dovetail.numerics.cpu.tiles_numba import (
    FLOATS,
    INT32,
    INT64,
    LANES,
    data_of,
    load_vector,
    shuffle,
    spread,
    store_vector,
    take_next,
)
from dovetail.numerics.products.accumulators import FRACTION_BITS, GROUP

PANEL = 4 * LANES  # columns
ROWS = 128  # that one task takes through a panel
LEAST = -14  # exponent of a format's smallest normal number, down to which int8 holds the exponents of products
NOTHING, FAINT = -64, -40  # exponents: of a zero; between its products' and those of any others
_LOWEST = -113  # below it 2^(exponent - 13) is no normal number; no product of scaled 8-bit values comes near
_CUT = -1 << (23 - FRACTION_BITS)
INT8, INTS = ir.IntType(8), ir.VectorType(INT32, LANES)
CODES = ir.VectorType(INT8, PANEL)


@intrinsic
def multiply_add(typing_context: Any, x: Any, y: Any, z: Any) -> Any:
    """x y + z, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


def _constant(value: int) -> Any:
    return ir.Constant(INTS, [value] * LANES)


def _larger(builder: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.icmp_signed(">", x, y), x, y)


def _exponents(builder: Any, x: Any) -> Any:
    """Of normal FP32 numbers; -127 of zero."""
    field = builder.and_(builder.lshr(builder.bitcast(x, INTS), _constant(23)), _constant(0xFF))
    return builder.sub(field, _constant(127))


def _powers(builder: Any, exponents: Any) -> Any:
    return builder.bitcast(builder.shl(builder.add(exponents, _constant(127)), _constant(23)), FLOATS)


def _largest_exponents(builder: Any, left: list[Any], right: Any) -> list[Any]:
    """Over the products of left[k] and right [GROUP, PANEL]; LANES each."""
    lead = None
    for k, pointer in enumerate(left):
        codes = load_vector(builder, builder.gep(right, [INT64(k * PANEL)]), CODES)
        codes.align = 1
        terms = builder.add(spread(builder, builder.load(pointer), PANEL), codes)
        lead = terms if lead is None else _larger(builder, lead, terms)
    parts = (list(range(first, first + LANES)) for first in range(0, PANEL, LANES))
    return [builder.sext(shuffle(builder, lead, lead, part), INTS) for part in parts]


@intrinsic
def _add_group(  # type: ignore[no-untyped-def]
    typing_context, a, a_exponents, first, stride, b, b_exponents, a_scale, b_scales, sums, at
):
    """sums[at : at + PANEL] and GROUP products each, a[first + k stride] b[k, n], times their two scales: the step of
    `accumulate`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, left_exponents, right, right_exponents, scales, total = (
            data_of(context, builder, signature, arguments, i) for i in (0, 1, 4, 5, 7, 8)
        )
        places = [builder.add(arguments[2], builder.mul(arguments[3], INT64(k))) for k in range(GROUP)]
        leads = _largest_exponents(builder, [builder.gep(left_exponents, [place]) for place in places], right_exponents)
        units, factors, counts = [], [], []
        slots = [builder.gep(total, [builder.add(arguments[9], INT64(v * LANES))]) for v in range(len(leads))]
        for v, (slot, products) in enumerate(zip(slots, leads, strict=True)):
            before = load_vector(builder, slot, FLOATS)
            scale = load_vector(builder, builder.gep(scales, [INT64(v * LANES)]), FLOATS)
            factor = builder.fmul(spread(builder, arguments[6]), scale)
            scaled = builder.add(products, _exponents(builder, factor))
            is_any = builder.icmp_signed(">", products, _constant(FAINT))
            lead = builder.select(is_any, scaled, _constant(_LOWEST))
            lead = _larger(builder, _larger(builder, lead, _exponents(builder, before)), _constant(_LOWEST))
            unit = _powers(builder, builder.sub(_constant(FRACTION_BITS), lead))
            units.append(_powers(builder, builder.sub(lead, _constant(FRACTION_BITS))))
            factors.append(builder.fmul(unit, factor))
            counts.append(builder.fptosi(builder.fmul(before, unit), INTS))
        for k, place in enumerate(places):
            value = spread(builder, builder.load(builder.gep(left, [place])))
            for v, factor in enumerate(factors):
                here = load_vector(builder, builder.gep(right, [INT64(k * PANEL + v * LANES)]), FLOATS)
                product = builder.fmul(builder.fmul(value, here), factor)
                counts[v] = builder.add(counts[v], builder.fptosi(product, INTS))
        for slot, count, unit in zip(slots, counts, units, strict=True):
            bits = builder.bitcast(builder.fmul(builder.sitofp(count, FLOATS), unit), INTS)
            store_vector(builder, builder.bitcast(builder.and_(bits, _constant(_CUT)), FLOATS), slot)
        return context.get_dummy_value()

    index = types.int64
    return types.none(a, a_exponents, index, index, b, b_exponents, types.float32, b_scales, sums, index), generate


@register_jitable(forceinline=True)
def _exponent_of(value, least):  # type: ignore[no-untyped-def]
    """Of a value of a format; a subnormal number has the smallest normal one's."""
    field = (bits_of(value) >> np.int32(23)) & np.int32(0xFF)
    return np.int8(max(field - np.int32(127), least)) if field else np.int8(NOTHING)


@register_jitable(forceinline=True)
def _widen(x, start, stride, is_inner, rows, count, least, values, exponents, row_step, step):  # type: ignore[no-untyped-def]
    """values[i row_step + k step] = element k of row i, beside its exponent; k beyond `count` are zero."""
    if count < GROUP or rows < PANEL:
        values[:] = 0.0
        exponents[:] = NOTHING
    if is_inner:
        for i in range(rows):
            for k in range(count):
                value = load(x, start + i * stride + k)
                values[i * row_step + k * step] = value
                exponents[i * row_step + k * step] = _exponent_of(value, least)
    else:
        for k in range(count):
            for i in range(rows):
                value = load(x, start + k * stride + i)
                values[i * row_step + k * step] = value
                exponents[i * row_step + k * step] = _exponent_of(value, least)


@exact_kernel
def grouped_hopper(  # type: ignore[no-untyped-def]
    a, b, c, starts, sizes, strides, a_inner, b_inner, a_scales, b_scales, scale_starts, scale_strides, b_block,
    threads, least, width, step,
):  # fmt: skip
    """As `scaled_numba.grouped_scaled_gemm`, with scales for every `width` of k and sums that are added to FP32
    every `step` of k (0: never); `least` exponents of a's and b's smallest normal numbers."""
    firsts = np.zeros(len(sizes) + 1, np.int64)
    for g in range(len(sizes)):
        chunks = (sizes[g, 0] + ROWS - 1) // ROWS
        firsts[g + 1] = firsts[g] + chunks * ((sizes[g, 1] + PANEL - 1) // PANEL)
    counter = np.zeros(1, np.int64)
    for _ in prange(threads):
        left, left_exponents = np.empty(ROWS * GROUP, np.float32), np.empty(ROWS * GROUP, np.int8)
        right, right_exponents = np.empty(GROUP * PANEL, np.float32), np.empty(GROUP * PANEL, np.int8)
        sums, totals = np.empty(ROWS * PANEL, np.float32), np.empty(ROWS * PANEL, np.float32)
        scales, ones = np.ones(PANEL, np.float32), np.ones(PANEL, np.float32)
        row_step, k_step = (GROUP, 1) if a_inner else (1, ROWS)
        while True:
            task = take_next(counter)
            if task >= firsts[-1]:
                break
            g = np.searchsorted(firsts, task, side="right") - 1
            m, n, k = sizes[g, 0], sizes[g, 1], sizes[g, 2]
            chunks = (m + ROWS - 1) // ROWS
            first, column = (task - firsts[g]) % chunks * ROWS, (task - firsts[g]) // chunks * PANEL
            rows, columns = min(ROWS, m - first), min(PANEL, n - column)
            # One run of the Tensor Core meets several scales: they multiply the products.
            inside = k > width and (step == 0 or width % step != 0)
            sums[:] = 0.0
            totals[:] = 0.0
            for start in range(0, k, GROUP):
                count, tile = min(GROUP, k - start), start // width
                at = starts[g, 0] + (first * strides[0] + start if a_inner else start * strides[0] + first)
                _widen(a, at, strides[0], a_inner, rows, count, least[0], left, left_exponents, row_step, k_step)
                at = starts[g, 1] + (column * strides[1] + start if b_inner else start * strides[1] + column)
                _widen(b, at, strides[1], b_inner, columns, count, least[1], right, right_exponents, 1, PANEL)
                for i in range(columns):
                    block = (column + i) // b_block
                    scales[i] = b_scales[scale_starts[g, 1] + block * scale_strides[2] + tile * scale_strides[3]]
                ends = start + GROUP >= k or (step > 0 and (start + GROUP) % step == 0)
                for row in range(rows):
                    at = scale_starts[g, 0] + (first + row) * scale_strides[0] + tile * scale_strides[1]
                    scale, place = a_scales[at], row * row_step
                    within, columns_within = (scale, scales) if inside else (np.float32(1.0), ones)
                    _add_group(
                        left, left_exponents, place, k_step, right, right_exponents, within, columns_within, sums,
                        row * PANEL,
                    )  # fmt: skip
                    if ends:
                        for i in range(PANEL):
                            factor = np.float32(1.0) if inside else scale * scales[i]
                            totals[row * PANEL + i] = multiply_add(
                                sums[row * PANEL + i], factor, totals[row * PANEL + i]
                            )
                            sums[row * PANEL + i] = 0.0
            for row in range(rows):
                at = starts[g, 2] + (first + row) * strides[2] + column
                for i in range(columns):
                    store(c, at + i, totals[row * PANEL + i])


def matmul(
    a: Tensor,
    b: Tensor,
    least: tuple[int, int],
    promotion: int | None,
    scales: tuple[Tensor, Tensor, int],
) -> Tensor:
    """a [M, K] times b [N, K] transposed -> FP32 [M, N]; `least` exponents of their normal numbers; scales
    [M, tiles], [N, tiles] and how many of K a tile has."""
    (rows, inner), columns, tiles = a.shape, len(b), scales[0].shape[1]
    output = a.new_empty(rows, columns)
    grouped_hopper(
        *(array(x.contiguous().view(-1)) for x in (a, b, output)),
        np.zeros((1, 3), np.int64),
        np.array([[rows, columns, inner]]),
        np.array([inner, inner, columns]),
        True,
        True,
        *(array(x.to(torch.float32).contiguous().view(-1)) for x in scales[:2]),
        np.zeros((1, 2), np.int64),
        np.array([tiles, 1, tiles, 1]),
        1,
        numba.get_num_threads(),
        least,
        scales[2],
        promotion or 0,
    )
    return output
