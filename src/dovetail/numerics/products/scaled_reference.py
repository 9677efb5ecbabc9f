"""The products of `scaled`, exact to the bit, under any accumulator: written to be read, and slow.

    fprop  y  [R, N] = x  [R, K] W^T     x: tiles 1x128, W [N, K]: tiles 128x128
    dgrad  dx [R, K] = dy [R, N] W       dy: tiles 1x128, W transposed: tiles 128x128 still
    wgrad  dW [N, K] = dy^T x            over tokens: dy and x in tiles 128x1

Each output is a sum over tiles of the inner dimension: (scale of a times scale of b) times the tile's sum of products,
which an accumulator of `accumulate` makes. It is rounded once, to `dtype`. Weights are those of all groups, [G, N, K];
other tiles than these will do (`product`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from dovetail.numerics.formats.quantized import (
    Quantized,
    capacity_of,
    check_groups,
    check_height,
    check_scale,
    grid_values,
    token_tiles,
    transposed,
)
from dovetail.numerics.products.accumulate import matmul
from dovetail.numerics.products.accumulators import FP32, Accumulator, Scales


def fprop(
    rows: Quantized,
    weight: Quantized,
    offsets: Sequence[int],
    accumulator: Accumulator = FP32,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Rows offsets[g] : offsets[g + 1] (in tiles of height 1, unless there is one group) by weight g transposed."""
    check_groups(offsets, len(rows.data), len(weight.data))
    if len(weight.data) == 1:
        return product(rows, next(_matrices(weight)), accumulator, dtype)
    check_height(rows, len(weight.data))
    groups = zip(pairwise(offsets), _matrices(weight), strict=True)
    return torch.cat([product(_part(rows, start, stop), each, accumulator, dtype) for (start, stop), each in groups])


def dgrad(
    grad: Quantized,
    weight: Quantized,
    offsets: Sequence[int],
    accumulator: Accumulator = FP32,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Each group's rows of the gradient by its weight."""
    return fprop(grad, transposed(weight), offsets, accumulator, dtype)


def wgrad(
    grad: Quantized,
    rows: Quantized,
    offsets: Sequence[int],
    accumulator: Accumulator = FP32,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Each group's gradient transposed by its rows -> [G, N, K]; zero where a group has none.

    Tiles may not hold rows of two groups. Either each group's rows begin at a multiple of the tile's height, as in
    DeepGEMM's contiguous layout, or they were tiled group by group (`token_tiles`).
    """
    check_groups(offsets, len(grad.data), len(offsets) - 1)
    pairs = zip(_by_group(grad, offsets), _by_group(rows, offsets), strict=True)
    return torch.stack([product(transposed(x), transposed(y), accumulator, dtype) for x, y in pairs])


def masked_fprop(
    rows: Quantized,
    weight: Quantized,
    counts: Tensor,
    accumulator: Accumulator = FP32,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """rows [G * capacity, K] (in tiles of height 1): `capacity` of each group, of which the first counts[g] (int32 [G])
    are multiplied by weight g transposed -> [G * capacity, N]. The others are not read and stay zero here; in the
    kernel they may be anything [DeepGEMM's masked layout]."""
    capacity = capacity_of(rows, counts, len(weight.data))
    out = torch.zeros(len(rows.data), weight.data.shape[1], dtype=dtype, device=rows.data.device)
    for group, (count, each) in enumerate(zip(counts.tolist(), _matrices(weight), strict=True)):
        first = group * capacity
        stop = first + min(count, capacity)
        out[first:stop] = product(_part(rows, first, stop), each, accumulator, dtype)
    return out


def product(a: Quantized, b: Quantized, accumulator: Accumulator = FP32, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """a [M, K] times b [N, K] transposed -> [M, N]: what all of the above are made of.

    Tiles may have any height. Their width is what shares a scale along K; of two widths one must divide the other or
    hold all of K.
    """
    for operand in (a, b):
        check_scale(operand)
    left, right = grid_values(a), grid_values(b)
    if left.shape[1] != right.shape[1]:
        raise ValueError(f"a is {list(left.shape)} and b {list(right.shape)}; expected [M, K] and [N, K]")
    width, scales = _width(a, b), []
    for operand in (a, b):
        rows = operand.scale.to(torch.float32).repeat_interleave(operand.tile[0], 0)[: operand.shape[0]]
        starts = torch.arange(0, left.shape[1], width, device=rows.device)
        scales.append(rows[:, starts // operand.tile[1]])
    both = Scales(a=scales[0], b=scales[1], width=width)
    return matmul(left, right, accumulator, both, (a.format, b.format)).to(dtype)


def _width(a: Quantized, b: Quantized) -> int:
    narrow, wide = sorted((a.tile[1], b.tile[1]))
    if wide % narrow and wide < a.shape[1]:
        raise ValueError(
            f"tiles {list(a.tile)} of a and {list(b.tile)} of b share no grid along K: quantise one of them anew, or"
            " re-tile it"
        )
    return narrow


def _matrices(weight: Quantized) -> Iterator[Quantized]:
    """Each group's."""
    return (replace(weight, data=data, scale=scale) for data, scale in zip(weight.data, weight.scale, strict=True))


def _part(rows: Quantized, start: int, stop: int) -> Quantized:
    """Some of the rows, in tiles of height 1."""
    return replace(rows, data=rows.data[start:stop], scale=rows.scale[start:stop])


def _by_group(rows: Quantized, offsets: Sequence[int]) -> Iterator[Quantized]:
    """Each group's rows, with the rows of scales that belong to them."""
    height = rows.tile[0]
    bounds, firsts = token_tiles(offsets, height)
    if len(rows.scale) != len(bounds):
        raise ValueError(
            f"{len(rows.scale)} rows of scales, not {len(bounds)}: experts with rows {list(offsets)} were not tiled one"
            f" by one, and {height} rows of a tile would be shared; quantise them with these offsets"
        )
    for (start, stop), tiles in zip(pairwise(offsets), pairwise([*firsts, len(bounds)]), strict=True):
        yield replace(rows, data=rows.data[start:stop], scale=rows.scale[slice(*tiles)])
