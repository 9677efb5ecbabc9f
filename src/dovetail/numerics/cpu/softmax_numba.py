"""Softmax of a row of scores and its backward pass, in AVX-512 vector code.

It is for kernels that hold the row in cache.

A row is FP32, a whole number of PANEL columns; only columns lo .. hi - 1 count, the others give zeros. Results are
BF16. The exponential reduces x to n ln 2 + r, takes a polynomial of degree 6 in r, and scales by 2^n with VSCALEFPS,
which underflows to zero and passes NaN on; its relative error is below 2e-7 for x in [-87, 0].
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from dovetail.numerics.cpu.tiles_numba import (
    FLOATS,
    INT32,
    INT64,
    LANES,
    PANEL,
    data_of,
    load_vector,
    shuffle,
    spread,
    store_vector,
    sum_lanes,
    to_bf16,
)

COEFFICIENTS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
VECTORS = PANEL // LANES
INDICES = ir.VectorType(INT64, LANES)
NEGATIVE = ir.Constant(FLOATS, [float("-inf")] * LANES)


def _all(value: float) -> Any:
    return ir.Constant(FLOATS, [value] * LANES)


def _call(builder: Any, name: str, *arguments: Any) -> Any:
    signature = ir.FunctionType(FLOATS, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    """The larger of each lane, b where one is NaN: VMAXPS."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _exp(builder: Any, x: Any) -> Any:
    x = _larger(builder, _all(-104.0), x)  # e**-104 is zero in FP32
    n = _call(builder, "llvm.roundeven.v16f32", builder.fmul(x, _all(1.4426950408889634)))
    r = _call(builder, "llvm.fma.v16f32", n, _all(-0.693359375), x)
    r = _call(builder, "llvm.fma.v16f32", n, _all(2.12194440e-4), r)
    p = _all(COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        p = _call(builder, "llvm.fma.v16f32", p, r, _all(coefficient))
    p = _call(builder, "llvm.fma.v16f32", builder.fmul(p, r), r, r)
    p = builder.fadd(p, _all(1.0))
    everything, current_rounding = ir.Constant(ir.IntType(16), -1), INT32(4)
    return _call(builder, "llvm.x86.avx512.mask.scalef.ps.512", p, n, _all(0.0), everything, current_rounding)


def _counts(builder: Any, column: Any, lo: Any, hi: Any) -> Any:
    """Which lanes from `column` on lie in lo .. hi - 1."""
    here = builder.add(spread(builder, column), ir.Constant(INDICES, list(range(LANES))))
    above = builder.icmp_signed(">=", here, spread(builder, lo))
    return builder.and_(above, builder.icmp_signed("<", here, spread(builder, hi)))


def _slots(builder: Any, value: Any) -> list[Any]:
    """A variable for each vector of a panel, so that the vectors' chains of dependence are apart."""
    slots = [cgutils.alloca_once(builder, FLOATS) for _ in range(VECTORS)]
    for slot in slots:
        builder.store(value, slot)
    return slots


def _panels(builder: Any, width: Any, pointers: list[Any]) -> Any:
    """For each panel: (column, pointers there) of each of its vectors."""
    with cgutils.for_range_slice(builder, INT64(0), width, INT64(PANEL), inc=True) as (column, _):
        places = [builder.add(column, INT64(v * LANES)) for v in range(VECTORS)]
        yield [(place, [builder.gep(pointer, [place]) for pointer in pointers]) for place in places]


@intrinsic
def softmax_row(typing_context, scores, at, width, scale, lo, hi, out, out_at):  # type: ignore[no-untyped-def]
    """out.flat[out_at : + width] = softmax(scale * scores.flat[at : + width]), which becomes exponentials on the way.

    Returns (top, total): the largest scaled score and the sum of exponentials of the differences from it.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, at, width, scale, lo, hi, _, out_at = arguments
        row = builder.gep(data_of(context, builder, signature, arguments, 0), [at])
        out = builder.gep(data_of(context, builder, signature, arguments, 6), [out_at])
        scales, tops, totals = spread(builder, scale), _slots(builder, NEGATIVE), _slots(builder, _all(0.0))
        for panel in _panels(builder, width, [row]):
            for (column, (here,)), slot in zip(panel, tops, strict=True):
                scaled = builder.fmul(load_vector(builder, here, FLOATS), scales)
                seen = builder.select(_counts(builder, column, lo, hi), scaled, NEGATIVE)
                store_vector(builder, seen, here)
                builder.store(_larger(builder, builder.load(slot), seen), slot)
        top = _larger(builder, *(builder.load(slot) for slot in tops))
        lanes = LANES
        while lanes > 1:
            lanes //= 2
            low, high = (shuffle(builder, top, top, list(range(first, first + lanes))) for first in (0, lanes))
            top = builder.select(builder.fcmp_ordered(">", low, high), low, high)
        top = builder.extract_element(top, INT32(0))
        shift = spread(builder, top)
        for panel in _panels(builder, width, [row]):
            for (_, (here,)), slot in zip(panel, totals, strict=True):
                value = _exp(builder, builder.fsub(load_vector(builder, here, FLOATS), shift))
                store_vector(builder, value, here)
                builder.store(builder.fadd(builder.load(slot), value), slot)
        total = sum_lanes(builder, builder.fadd(*(builder.load(slot) for slot in totals)))
        inverse = spread(builder, builder.fdiv(ir.Constant(ir.FloatType(), 1.0), total))
        for panel in _panels(builder, width, [row]):
            values = [builder.fmul(load_vector(builder, here, FLOATS), inverse) for _, (here,) in panel]
            store_vector(builder, to_bf16(builder, values), builder.gep(out, [panel[0][0]]))
        return context.make_tuple(builder, signature.return_type, [top, total])

    index, real = types.int64, types.float32
    return types.UniTuple(real, 2)(scores, index, index, real, index, index, out, index), generate


@intrinsic
def softmax_backward_row(typing_context, scores, grad, at, width, scale, shift, lo, hi, out, grad_out, out_at):  # type: ignore[no-untyped-def]
    """out = p = exp(scale * scores - shift) and grad_out = scale * p (grad - sum(p grad)), rows as in `softmax_row`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, at, width, scale, shift, lo, hi, _, _, out_at = arguments
        row, grad_row = (builder.gep(data_of(context, builder, signature, arguments, i), [at]) for i in (0, 1))
        out, grad_out = (builder.gep(data_of(context, builder, signature, arguments, i), [out_at]) for i in (8, 9))
        scales, shifts, dots = spread(builder, scale), spread(builder, shift), _slots(builder, _all(0.0))
        zero = _all(0.0)
        for panel in _panels(builder, width, [row, grad_row]):
            for (column, (here, grad_here)), slot in zip(panel, dots, strict=True):
                counts = _counts(builder, column, lo, hi)
                scaled = builder.fmul(load_vector(builder, here, FLOATS), scales)
                value = builder.select(counts, _exp(builder, builder.fsub(scaled, shifts)), zero)
                grad_value = builder.select(counts, load_vector(builder, grad_here, FLOATS), zero)
                store_vector(builder, value, here)
                store_vector(builder, grad_value, grad_here)
                builder.store(_call(builder, "llvm.fma.v16f32", value, grad_value, builder.load(slot)), slot)
        dot = spread(builder, sum_lanes(builder, builder.fadd(*(builder.load(slot) for slot in dots))))
        for panel in _panels(builder, width, [row, grad_row]):
            values, grads = [], []
            for _, (here, grad_here) in panel:
                values.append(load_vector(builder, here, FLOATS))
                difference = builder.fsub(load_vector(builder, grad_here, FLOATS), dot)
                grads.append(builder.fmul(builder.fmul(values[-1], difference), scales))
            store_vector(builder, to_bf16(builder, values), builder.gep(out, [panel[0][0]]))
            store_vector(builder, to_bf16(builder, grads), builder.gep(grad_out, [panel[0][0]]))
        return context.get_dummy_value()

    index, real = types.int64, types.float32
    arguments = (scores, grad, index, index, real, real, index, index, out, grad_out, index)
    return types.none(*arguments), generate
