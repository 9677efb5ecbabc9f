"""The products of `scaled` in torch, tile by tile, for operands that no kernel takes.

Sums within a tile of 128 of k are torch's own, those over tiles FP32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dovetail.numerics.formats.quantized import TILE, Quantized, spread, token_tiles, transposed
from dovetail.numerics.products.accumulators import Accumulator, Fp32Accumulator


def fprop(rows: Quantized, weight: Quantized, offsets: Sequence[int], accumulator: Accumulator) -> Tensor:
    assert isinstance(accumulator, Fp32Accumulator)
    width = weight.data.shape[1]
    output = rows.data.new_empty(len(rows.data), width, dtype=torch.bfloat16)
    for (start, stop), values, scale in zip(pairwise(offsets), weight.data, weight.scale, strict=True):
        here = slice(start, stop)
        output[here] = _product(rows.data[here], values, rows.scale[here], spread(scale, 0, TILE, width))
    return output


def dgrad(grad: Quantized, weight: Quantized, offsets: Sequence[int], accumulator: Accumulator) -> Tensor:
    return fprop(grad, transposed(weight), offsets, accumulator)


def wgrad(grad: Quantized, rows: Quantized, offsets: Sequence[int], accumulator: Accumulator) -> Tensor:
    assert isinstance(accumulator, Fp32Accumulator)
    (height, width), groups = (grad.data.shape[1], rows.data.shape[1]), len(offsets) - 1
    output = grad.data.new_empty(groups, height, width, dtype=torch.bfloat16)
    bounds, firsts = token_tiles(offsets)
    for group, (start, stop) in enumerate(pairwise(offsets)):
        tiles = slice(*[*firsts, len(bounds)][group : group + 2])
        left, right = (each.data[start:stop].t() for each in (grad, rows))
        output[group] = _product(left, right, grad.scale[tiles].t(), rows.scale[tiles].t())
    return output


def _product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    """a [M, K] times b [N, K] transposed, with scales [M, tiles] and [N, tiles]: one product per tile."""
    total = torch.zeros(len(a), len(b), dtype=torch.float32, device=a.device)
    for tile in range(a_scale.shape[1]):
        terms = slice(tile * TILE, (tile + 1) * TILE)
        part = a[:, terms].float() @ b[:, terms].float().t()
        total += part * (a_scale[:, tile, None] * b_scale[None, :, tile])
    return total.to(torch.bfloat16)
