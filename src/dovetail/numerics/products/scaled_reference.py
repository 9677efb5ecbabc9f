"""The three products of a linear layer on quantised operands, dense and grouped by expert [V3 §3.3.1, §3.3.2].

    fprop  y  [M, N] = x  [M, K] W^T     x: tiles 1x128, W [N, K]: tiles 128x128
    dgrad  dx [M, K] = dy [M, N] W       dy: tiles 1x128, W transposed: tiles 128x128 still
    wgrad  dW [N, K] = dy^T x            over tokens: dy and x in tiles 128x1

Each output is a sum over tiles of the inner dimension: (scale of a times scale of b) times the tile's sum of products,
which an accumulator of `accumulate` makes. It is rounded once, to `dtype`. These are references: exact to the bit,
written to be read, and slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dovetail.numerics.formats.quantize import Quantized, grid_values
from dovetail.numerics.products.accumulate import Accumulator, Fp32Accumulator, Scales, matmul
from dovetail.spec.tensors import scale_shape

FP32 = Fp32Accumulator()


def scaled_matmul(
    a: Quantized, b: Quantized, accumulator: Accumulator = FP32, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """a [M, K] times b [N, K] transposed -> [M, N]: fprop, and dgrad with `transposed(weight)`.

    Tiles may have any height. Their width is what shares a scale along K; of two widths one must divide the other or
    hold all of K.
    """
    left, right = _values(a), _values(b)
    if left.shape[1] != right.shape[1]:
        raise ValueError(f"a is {list(left.shape)} and b {list(right.shape)}; expected [M, K] and [N, K]")
    width, scales = _width(a, b), []
    for operand in (a, b):
        rows = operand.scale.to(torch.float32).repeat_interleave(operand.tile[0], 0)[: operand.data.shape[0]]
        starts = torch.arange(0, left.shape[1], width, device=rows.device)
        scales.append(rows[:, starts // operand.tile[1]])
    both = Scales(a=scales[0], b=scales[1], width=width)
    return matmul(left, right, accumulator, both, (a.format, b.format)).to(dtype)


def grouped_scaled_matmul(
    a: Quantized,
    b: Sequence[Quantized],
    offsets: Sequence[int],
    accumulator: Accumulator = FP32,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Rows offsets[e] : offsets[e + 1] of a [R, K] (tiles of height 1) times b[e] [N, K] transposed -> [R, N]."""
    _check_groups(offsets, a.data.shape[0], len(b))
    if a.tile[0] != 1:
        raise ValueError(f"rows are split by expert, so a needs tiles of height 1, not {list(a.tile)}")
    groups = zip(pairwise(offsets), b, strict=True)
    return torch.cat([scaled_matmul(_rows(a, start, stop), each, accumulator, dtype) for (start, stop), each in groups])


def masked_scaled_matmul(
    a: Quantized,
    b: Sequence[Quantized],
    counts: Tensor,
    accumulator: Accumulator = FP32,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """a [E * capacity, K] (tiles of height 1): `capacity` rows of each expert, of which the first counts[e] (int32 [E])
    are multiplied by b[e] [N, K] transposed -> [E * capacity, N]. The others are not read and stay zero here; in the
    kernel they may be anything [DeepGEMM's masked layout]."""
    rows, experts = a.data.shape[0], len(b)
    if a.tile[0] != 1 or not experts:
        raise ValueError(f"rows of {experts} experts, in tiles of height {a.tile[0]}; expected experts, and height 1")
    if rows % experts or counts.shape != (experts,) or counts.dtype != torch.int32:
        raise ValueError(
            f"{rows} rows for {experts} experts with counts {counts.dtype} {list(counts.shape)}: rows must be as many"
            f" for each expert, and counts int32 [{experts}]"
        )
    capacity = rows // experts
    out = torch.zeros(rows, b[0].data.shape[0], dtype=dtype, device=a.data.device)
    for first, count, each in zip(range(0, rows, max(capacity, 1)), counts.tolist(), b, strict=False):
        stop = first + min(count, capacity)
        out[first:stop] = scaled_matmul(_rows(a, first, stop), each, accumulator, dtype)
    return out


def scaled_outer(
    left: Quantized, right: Quantized, accumulator: Accumulator = FP32, dtype: torch.dtype = torch.float32
) -> Tensor:
    """left [R, N] transposed times right [R, M] -> [N, M]: wgrad. Both in tiles of width 1, such as 128x1."""
    return scaled_matmul(transposed(left), transposed(right), accumulator, dtype)


def grouped_scaled_outer(
    left: Quantized,
    right: Quantized,
    offsets: Sequence[int],
    accumulator: Accumulator = FP32,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`scaled_outer` of each expert's rows -> [E, N, M]; zero where an expert has none.

    Tiles may not hold rows of two experts. Either each expert's rows begin at a multiple of the tile's height, as in
    DeepGEMM's contiguous layout, or they were tiled expert by expert and the rows of scales come one after another:
    ceil(rows / height) for each.
    """
    _check_groups(offsets, left.data.shape[0], len(offsets) - 1)
    groups = [(_tiled_rows(left, offsets, e), _tiled_rows(right, offsets, e)) for e in range(len(offsets) - 1)]
    return torch.stack([scaled_outer(x, y, accumulator, dtype) for x, y in groups])


def transposed(quantized: Quantized) -> Quantized:
    """The transposed matrix: nothing is rounded, tiles lie on their side. 128x128 stay what they are [V3 §3.3.2]."""
    return Quantized(
        data=quantized.data.t(),
        scale=quantized.scale.t(),
        tile=(quantized.tile[1], quantized.tile[0]),
        format=quantized.format,
    )


def _values(quantized: Quantized) -> Tensor:
    """FP32 values on the format's grid, without their scales."""
    shape, expected = list(quantized.data.shape), scale_shape(tuple(quantized.data.shape), quantized.tile)
    if tuple(quantized.scale.shape) != expected:
        raise ValueError(
            f"scale has shape {list(quantized.scale.shape)}, not {list(expected)}: data is {shape}, tiles are"
            f" {list(quantized.tile)}"
        )
    return grid_values(quantized)


def _width(a: Quantized, b: Quantized) -> int:
    narrow, wide = sorted((a.tile[1], b.tile[1]))
    if wide % narrow and wide < a.data.shape[1]:
        raise ValueError(
            f"tiles {list(a.tile)} of a and {list(b.tile)} of b share no grid along K: quantise one of them anew, or"
            " re-tile it"
        )
    return narrow


def _rows(quantized: Quantized, start: int, stop: int) -> Quantized:
    return Quantized(
        data=quantized.data[start:stop],
        scale=quantized.scale[start:stop],
        tile=quantized.tile,
        format=quantized.format,
    )


def _tiled_rows(quantized: Quantized, offsets: Sequence[int], expert: int) -> Quantized:
    """The expert's rows, with the rows of scales that belong to them."""
    height = quantized.tile[0]
    counts = [-(-(stop - start) // height) for start, stop in pairwise(offsets)]
    if quantized.scale.shape[0] != sum(counts):
        raise ValueError(
            f"{quantized.scale.shape[0]} rows of scales, not {sum(counts)}: experts with rows {list(offsets)} were not"
            f" tiled one by one, and {height} rows of a tile would be shared; quantise them with these offsets"
        )
    first = sum(counts[:expert])
    return Quantized(
        data=quantized.data[offsets[expert] : offsets[expert + 1]],
        scale=quantized.scale[first : first + counts[expert]],
        tile=quantized.tile,
        format=quantized.format,
    )


def _check_groups(offsets: Sequence[int], rows: int, experts: int) -> None:
    ordered = all(start <= stop for start, stop in pairwise(offsets))
    if len(offsets) != experts + 1 or offsets[0] != 0 or offsets[-1] != rows or not ordered:
        raise ValueError(f"offsets {list(offsets)} do not divide {rows} rows among {experts} experts")
