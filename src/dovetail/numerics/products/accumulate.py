"""Models how a Tensor Core sums a long product of 8-bit values.

`matmul(a, b, accumulator)` multiplies values that are already on a narrow grid, so every product is exact, and the
accumulator says how they are added:

    Fp32Accumulator    FP32, each addition rounded to nearest, one chain per output
    HopperAccumulator  Hopper's FP8 Tensor Core, whose sums are moved to FP32 every `promotion` elements of K (N_C)

Hopper's step, from the accumulator c and 32 products a_k b_k of consecutive k to the next accumulator:

    E   = largest exponent among the products that are not zero, and c
    sum = trunc(c / 2^(E - 13)) + sum over k of trunc(a_k b_k / 2^(E - 13))       exact, in integers
    c'  = sum * 2^(E - 13), cut to 13 fraction bits                               FP22: 1 sign, 8 exponent, 13 mantissa

Published by DeepSeek [V3 §3.3.2, §3.5.2; ISCA §3.1.1]: 32 products aligned to the largest exponent, 13 fraction bits
kept and the rest truncated, FP22 registers, promotion to FP32 with N_C = 128. Measured on the device by others, with
results equal bit for bit [arXiv:2511.10909]: c is aligned with the products; all cuts are towards zero; the exponent of
a product is the sum of its factors' exponents, not that of its leading bit, and a subnormal factor has the exponent of
the smallest normal one. Assumptions of ours: the sum that is promoted is added in one fused multiply-add with the
FP32 product of its two scales, as the compiler makes of DeepGEMM's source; and, for what no hardware does, where one
interval of promotion spans several scales these multiply the products inside the Tensor Core, before alignment.

`dot_by_integers` is the same step for one output, in Python integers and read off the text above; tests hold the two
together bit for bit.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dovetail.numerics.products import accumulate_numba
from dovetail.numerics.products.accumulators import (
    FRACTION_BITS,
    GROUP,
    PROMOTION,
    Accumulator,
    Fp32Accumulator,
    HopperAccumulator,
    Scales,
    least_exponents,
)

_EXPONENT = 0x7F800000  # of an FP32 number's bits
_CUT = -1 << (23 - FRACTION_BITS)  # leaves FP22 of them
_MOST_PRODUCTS = 1 << 19  # at once in memory; 2 MB stay in the second-level cache


def matmul(
    a: Tensor,
    b: Tensor,
    accumulator: Accumulator,
    scales: Scales | None = None,
    formats: tuple[str, str] = ("e4m3", "e4m3"),
) -> Tensor:
    """a [M, K] times b [N, K] transposed -> FP32 [M, N]; FP32 tensors of values on the grids of `formats`.

    Where a value is NaN or infinite, so are the outputs that it enters. A CPU kernel makes Hopper's sums, bit for bit.
    """
    _check(a, b, accumulator, scales)
    if isinstance(accumulator, HopperAccumulator) and _has_kernel(a, b, scales, formats):
        if scales is None:
            scales = Scales(a=a.new_ones(a.shape[0], 1), b=a.new_ones(b.shape[0], 1), width=max(a.shape[1], 1))
        tiles = (scales.a, scales.b, scales.width)
        return accumulate_numba.matmul(a, b, least_exponents(formats), accumulator.promotion, tiles)
    return matmul_reference(a, b, accumulator, scales, formats)


def matmul_reference(
    a: Tensor,
    b: Tensor,
    accumulator: Accumulator,
    scales: Scales | None = None,
    formats: tuple[str, str] = ("e4m3", "e4m3"),
) -> Tensor:
    """`matmul` on any device, in torch."""
    inside = scales is not None and _spans(accumulator, scales, a.shape[1])
    rows = max(1, _MOST_PRODUCTS // (GROUP * max(1, b.shape[0])))
    output = a.new_zeros(a.shape[0], b.shape[0])
    for first in range(0, a.shape[0], rows):
        part, total = a[first : first + rows], output[first : first + rows]
        for start, stop in _runs(a.shape[1], accumulator, scales, inside):
            left, right = part[:, start:stop], b[:, start:stop]
            here = slice(first, first + rows)
            factors = None if scales is None else _factors(scales, here, start, stop if inside else start + 1)
            if isinstance(accumulator, Fp32Accumulator):
                partial = _sum_fp32(left, right)
            else:
                partial = _sum_hopper(left, right, least_exponents(formats), factors if inside else None)
            total.copy_(total + partial if inside or factors is None else multiply_add(partial, factors[0], total))
    return output


def _check(a: Tensor, b: Tensor, accumulator: Accumulator, scales: Scales | None) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a is {list(a.shape)} and b {list(b.shape)}; expected [M, K] and [N, K]")
    if a.dtype != torch.float32 or b.dtype != torch.float32:
        raise ValueError(f"values are taken as float32, not {a.dtype} and {b.dtype}")
    if scales is None:
        return
    tiles = math.ceil(a.shape[1] / scales.width)
    if tuple(scales.a.shape) != (a.shape[0], tiles) or tuple(scales.b.shape) != (b.shape[0], tiles):
        raise ValueError(
            f"scales are {list(scales.a.shape)} and {list(scales.b.shape)}; values of {list(a.shape)} and"
            f" {list(b.shape)} need one per row and {scales.width} of K"
        )
    if scales.width % GROUP and _spans(accumulator, scales, a.shape[1]):
        raise ValueError(f"one scale per {scales.width} of K cuts through the {GROUP} products added at once")


def _spans(accumulator: Accumulator, scales: Scales, k: int) -> bool:
    """Whether one run of the Tensor Core meets several scales."""
    if isinstance(accumulator, Fp32Accumulator) or k <= scales.width:
        return False
    return accumulator.promotion is None or scales.width % accumulator.promotion != 0


def _runs(k: int, accumulator: Accumulator, scales: Scales | None, inside: bool) -> Iterator[tuple[int, int]]:
    """Parts of K that are summed on their own and then added to the FP32 total."""
    step = accumulator.promotion if isinstance(accumulator, HopperAccumulator) else None
    if step is None:
        step = scales.width if scales is not None and not inside else max(k, 1)
    return ((start, min(start + step, k)) for start in range(0, k, step))


def _factors(scales: Scales, rows: slice, start: int, stop: int) -> list[Tensor]:
    """The FP32 product of its two scales, [M, N], for each group of products in start : stop."""
    tiles = (k // scales.width for k in range(start, stop, GROUP))
    return [scales.a[rows, tile, None] * scales.b[:, tile] for tile in tiles]


def _sum_fp32(a: Tensor, b: Tensor) -> Tensor:
    """One addition per product, k = 1, 0, 3, 2, 5, 4, ..."""
    total = a.new_zeros(a.shape[0], b.shape[0])
    left, right = a.t().contiguous(), b.t().contiguous()
    last = a.shape[1] - 1
    for k in (k ^ 1 if k ^ 1 <= last else k for k in range(last + 1)):
        total.addcmul_(left[k, :, None], right[k, None, :])
    return total


def _sum_hopper(a: Tensor, b: Tensor, least: Sequence[int], factors: Sequence[Tensor] | None) -> Tensor:
    """One run of the Tensor Core from an accumulator of zero."""
    total = a.new_zeros(a.shape[0], b.shape[0])
    finite = bool(a.isfinite().all() and b.isfinite().all())
    left, right = (x if finite else x.nan_to_num(0.0, 0.0, 0.0) for x in (a, b))
    for index, start in enumerate(range(0, a.shape[1], GROUP)):
        group = slice(start, start + GROUP)
        factor = None if factors is None else factors[index]
        total = _step(total, left[:, group], right[:, group], least, factor)
    if finite:
        return total
    return torch.where((plain := a @ b.t()).isfinite(), total, plain)


def _step(c: Tensor, a: Tensor, b: Tensor, least: Sequence[int], factor: Tensor | None) -> Tensor:
    """Add up to 32 products to c [M, N]. Exponents are kept as powers of two, whose products are exact."""
    lead = (_leading(a, least[0])[:, None] * _leading(b, least[1])).amax(dim=-1)
    products = a[:, None] * b  # [M, N, k], exact
    if factor is not None:
        products *= factor[..., None]
        lead *= _power(factor)
    lead = torch.maximum(lead, _power(c))
    scale = torch.where(lead > 0, 2.0**FRACTION_BITS / lead, 0.0)
    # Below 2^16 each and in integers, so that their sum is exact in FP32.
    units = products.mul_(scale[..., None]).trunc_().sum(dim=-1) + (c * scale).trunc_()
    return _cut(units * (lead * 2.0**-FRACTION_BITS))


def _leading(x: Tensor, least: int) -> Tensor:
    """2^exponent of values of a format whose smallest normal exponent is `least`; 0 of zero."""
    return torch.where(x == 0, 0.0, _power(x).clamp_(min=2.0**least))


def _power(x: Tensor) -> Tensor:
    """The power of two at or below |x|; 0 of zero."""
    return (x.view(torch.int32) & _EXPONENT).view(torch.float32)


def _cut(x: Tensor) -> Tensor:
    """FP32 to FP22, towards zero."""
    return (x.view(torch.int32) & _CUT).view(torch.float32)


def _has_kernel(a: Tensor, b: Tensor, scales: Scales | None, formats: tuple[str, str]) -> bool:
    sizes = () if scales is None else (scales.a, scales.b)
    is_finite = a.device.type == "cpu" and bool(a.isfinite().all() and b.isfinite().all())
    return is_finite and takes_scales(*sizes, formats=formats)


def takes_scales(*scales: Tensor, formats: tuple[str, str]) -> bool:
    """Whether the kernel multiplies finite values under these: on a CPU, products among the normal FP32 numbers."""
    if min(least_exponents(formats)) < accumulate_numba.LEAST or any(x.device.type != "cpu" for x in scales):
        return False
    return all(bool(((x > 2.0**-30) & (x < 2.0**30)).all()) for x in scales)


def multiply_add(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x y + z of FP32 tensors, rounded once, as a fused multiply-add does.

    The product is exact in FP64; the sum's rounding error is found [Knuth's TwoSum] and left in its last bit (rounding
    to odd), after which rounding to FP32 is the same as from the exact sum.
    """
    product, addend = x.double() * y.double(), z.double()
    total = product + addend
    shadow = total - product
    error = (product - (total - shadow)) + (addend - shadow)
    bits = total.view(torch.int64)
    inexact = (error != 0) & total.isfinite() & error.isfinite()
    # Towards the error: away from zero is one more in the bits of a number, towards zero one less.
    odd = torch.where((error > 0) == (total > 0), bits, bits - 1) | 1
    return torch.where(inexact, odd, bits).view(torch.float64).to(torch.float32)


def dot_by_integers(
    a: Sequence[float],
    b: Sequence[float],
    promotion: int | None = PROMOTION,
    formats: tuple[str, str] = ("e4m3", "e4m3"),
) -> float:
    """One output of `matmul` with `HopperAccumulator(promotion)`, without scales: finite values, Python integers."""
    least = least_exponents(formats)
    total, run = 0.0, promotion or max(len(a), 1)
    for start in range(0, len(a), run):
        c = (0, 0)
        for first in range(start, min(start + run, len(a)), GROUP):
            last = min(first + GROUP, start + run)
            pairs = zip(a[first:last], b[first:last], strict=True)
            c = _add_group([_multiply(_split(x, least[0]), _split(y, least[1])) for x, y in pairs], c)
        total = struct.unpack("f", struct.pack("f", total + math.ldexp(c[0], c[1] - FRACTION_BITS)))[0]
    return float(total)


def _split(x: float, least: int) -> tuple[int, int]:
    """x = significand / 2^13 * 2^exponent, with the significand's leading bit at 2^13 unless x is subnormal."""
    exponent = max(math.frexp(x)[1] - 1, least)
    significand = math.ldexp(x, FRACTION_BITS - exponent)
    assert significand == int(significand), f"{x} has more than {FRACTION_BITS} fraction bits"
    return int(significand), exponent


def _multiply(x: tuple[int, int], y: tuple[int, int]) -> tuple[int, int]:
    """Significand in units of 2^-26, and exponent: exact, not normalised."""
    return x[0] * y[0], x[1] + y[1]


def _add_group(products: Sequence[tuple[int, int]], c: tuple[int, int]) -> tuple[int, int]:
    """Products in units of 2^-26 and c in units of 2^-13 -> the next c."""
    terms = [(s, e) for s, e in (*products, (c[0] << FRACTION_BITS, c[1])) if s]
    if not terms:
        return 0, 0
    largest = max(e for _, e in terms)
    kept = [(abs(s) >> (largest - e + FRACTION_BITS)) * (1 if s > 0 else -1) for s, e in terms]
    total = sum(kept)
    shift = abs(total).bit_length() - 1 - FRACTION_BITS  # so that the leading bit is at 2^13
    magnitude = abs(total) >> shift if shift > 0 else abs(total) << -shift
    return (magnitude if total > 0 else -magnitude), largest + shift
