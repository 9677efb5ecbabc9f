"""CPU kernel of `accumulate`: Hopper's Tensor Core, bit for bit, 16 outputs at a time in the loops over columns.

An exponent is an int32, NOTHING that of a zero. Columns of b come in panels of PANEL, and k in whole groups of GROUP,
both filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import prange, types
from numba.extending import intrinsic, register_jitable
from torch import Tensor

from dovetail.numerics.cpu_numba import array, bits_of, exact_kernel, float_of

GROUP, FRACTION_BITS = 32, 13
PANEL = 64  # columns; their sums and scales stay in the first-level cache
ROWS = 16  # that one task takes through a panel
NOTHING = -1000
_LOWEST = -113  # below it 2^(exponent - 13) is no normal number; no product of scaled 8-bit values comes near
_CUT = -1 << (23 - FRACTION_BITS)


@intrinsic
def multiply_add(typing_context: Any, x: Any, y: Any, z: Any) -> Any:
    """x y + z, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@register_jitable(forceinline=True)
def exponent_of(value):  # type: ignore[no-untyped-def]
    field = (bits_of(value) >> np.int32(23)) & np.int32(0xFF)
    return field - np.int32(127) if field else np.int32(NOTHING)


@register_jitable(forceinline=True)
def power(exponent):  # type: ignore[no-untyped-def]
    return float_of((exponent + np.int32(127)) << np.int32(23))


@register_jitable(forceinline=True)
def largest_exponents(left, right, lead):  # type: ignore[no-untyped-def]
    """lead[n] = max over the group's k of left[k] + right[k, n]."""
    lead[:] = NOTHING
    for k in range(0, GROUP, 4):
        p, q, r, s = left[k], left[k + 1], left[k + 2], left[k + 3]
        e, f, g, h = right[k], right[k + 1], right[k + 2], right[k + 3]
        for n in range(len(lead)):
            lead[n] = max(max(max(lead[n], p + e[n]), max(q + f[n], r + g[n])), s + h[n])


@register_jitable(forceinline=True)
def add_products(left, right, scale, sums):  # type: ignore[no-untyped-def]
    """sums[n] += the integer parts of left[k] right[k, n] scale[n]."""
    for k in range(0, GROUP, 4):
        p, q, r, s = left[k], left[k + 1], left[k + 2], left[k + 3]
        e, f, g, h = right[k], right[k + 1], right[k + 2], right[k + 3]
        for n in range(len(sums)):
            sums[n] += (np.int32(p * e[n] * scale[n]) + np.int32(q * f[n] * scale[n])) + (
                np.int32(r * g[n] * scale[n]) + np.int32(s * h[n] * scale[n])
            )


@exact_kernel
def hopper(a, a_exponents, b, b_exponents, a_scales, b_scales, width, step, inside, out):  # type: ignore[no-untyped-def]
    """a [M, K] and b [panels, K, PANEL] with their exponents -> out [M, panels * PANEL], all FP32.

    a_scales [M, tiles] and b_scales [tiles, panels * PANEL] are for `width` of k each. Sums are added to FP32 every
    `step` of k; the scales multiply them there, or, if `inside`, the products before these are aligned.
    """
    panels, count = b.shape[0], b.shape[1]
    chunks = (len(a) + ROWS - 1) // ROWS
    for task in prange(panels * chunks):
        panel, first = task // chunks, task % chunks * ROWS
        begin, end = panel * PANEL, (panel + 1) * PANEL
        lead, sums = np.empty(PANEL, np.int32), np.empty(PANEL, np.int32)
        scale, factor, partial = np.empty(PANEL, np.float32), np.empty(PANEL, np.float32), np.empty(PANEL, np.float32)
        for m in range(first, min(first + ROWS, len(a))):
            total = out[m, begin:end]
            total[:] = 0.0
            partial[:] = 0.0
            for k in range(0, count, GROUP):
                left, right = a[m, k : k + GROUP], b[panel, k : k + GROUP]
                row_scale, column_scales = a_scales[m, k // width], b_scales[k // width, begin:end]
                for n in range(PANEL):
                    factor[n] = row_scale * column_scales[n]
                largest_exponents(a_exponents[m, k : k + GROUP], b_exponents[panel, k : k + GROUP], lead)
                for n in range(PANEL):
                    shift = exponent_of(factor[n]) if inside else np.int32(0)
                    lead[n] = max(max(lead[n] + shift, exponent_of(partial[n])), np.int32(_LOWEST))
                    unit = power(np.int32(FRACTION_BITS) - lead[n])
                    scale[n] = unit * factor[n] if inside else unit
                    sums[n] = np.int32(partial[n] * unit)
                add_products(left, right, scale, sums)
                for n in range(PANEL):
                    value = np.float32(sums[n]) * power(lead[n] - np.int32(FRACTION_BITS))
                    partial[n] = float_of(bits_of(value) & np.int32(_CUT))
                if (k + GROUP) % step == 0 or k + GROUP >= count:
                    for n in range(PANEL):
                        total[n] = multiply_add(partial[n], np.float32(1.0) if inside else factor[n], total[n])
                        partial[n] = 0.0


def matmul(
    a: Tensor,
    b: Tensor,
    least: Sequence[int],
    promotion: int | None,
    scales: tuple[Tensor, Tensor, int],
    inside: bool,
) -> Tensor:
    """a [M, K] times b [N, K] transposed -> FP32 [M, N]; `least` exponents of their normal numbers; scales
    [M, tiles], [N, tiles] and how many of K a tile has."""
    missing, columns = -a.shape[1] % GROUP, -b.shape[0] % PANEL
    left = F.pad(a, (0, missing)).contiguous()
    right = F.pad(b, (0, missing, 0, columns)).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()
    operands = [array(y) for x, e in zip((left, right), least, strict=True) for y in (x, _exponents(x, e))]
    row_scales = scales[0].to(torch.float32).contiguous()
    column_scales = F.pad(scales[1].to(torch.float32), (0, 0, 0, columns)).t().contiguous()
    output = a.new_empty(a.shape[0], b.shape[0] + columns)
    step = promotion or max(left.shape[1], 1)
    hopper(*operands, array(row_scales), array(column_scales), scales[2], step, inside, array(output))
    return output[:, : b.shape[0]]


def _exponents(x: Tensor, least: int) -> Tensor:
    """int32; a subnormal number has the smallest normal one's."""
    exponents = torch.frexp(x).exponent - 1
    return torch.where(x == 0, NOTHING, exponents.clamp_(min=least)).to(torch.int32)
