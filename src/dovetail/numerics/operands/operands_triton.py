"""`operands` on a GPU: values on the grid of E4M3 or E5M2 as float8, which its Tensor Cores take.

Bit for bit the operands of a CPU. What a product takes is also what is kept. Tiles of columns are written K-major
(`formats.quantize_triton`); weights whose rows are no multiple of 128 begin a new row of blocks with every group, as
rows of tokens do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.numerics.formats.floats import pack_e5m6
from dovetail.numerics.formats.quantize_triton import numbers_of, quantize, quantize_parts
from dovetail.numerics.formats.quantized import BLOCK_TILE, COLUMN_TILE, ROW_TILE, TILE, Quantized, token_tiles
from dovetail.spec.precision import Quantization


def quantize_rows(x: Tensor, quantization: Quantization) -> Quantized:
    return quantize(x, ROW_TILE, *_rule(quantization), check=False)


def keep_e5m6(x: Tensor, quantization: Quantization) -> Quantized:
    result = quantize(x, ROW_TILE, *_rule(quantization), check=False)
    codes = result.data.view(torch.int16)  # torch pads no unsigned integers
    return replace(result, data=pack_e5m6(F.pad(codes, (0, -codes.shape[1] % 8))), columns=x.shape[1])


def quantize_columns(x: Tensor, offsets: Sequence[int], quantization: Quantization) -> Quantized:
    return quantize_parts(x, token_tiles(offsets)[0], COLUMN_TILE, *_rule(quantization))


def retile(kept: Quantized, offsets: Sequence[int], quantization: Quantization) -> Quantized:
    bounds, _ = token_tiles(offsets)
    return quantize_parts(numbers_of(kept), bounds, COLUMN_TILE, *_rule(quantization), kept.scale)


def quantize_blocks(weight: Tensor, quantization: Quantization) -> Quantized:
    groups, rows, columns = weight.shape
    matrix, rule = weight.reshape(groups * rows, columns), _rule(quantization)
    if rows % TILE == 0 or groups == 1:
        result = quantize(matrix, BLOCK_TILE, *rule, check=False)
    else:
        bounds, _ = token_tiles(range(0, (groups + 1) * rows, rows))
        result = quantize_parts(matrix, bounds, BLOCK_TILE, *rule)
    scale = result.scale.view(groups, -(-rows // TILE), -(-columns // TILE))
    return replace(result, data=result.data.view(weight.shape), scale=scale)


def _rule(quantization: Quantization) -> tuple[str, bool]:
    return quantization.format, quantization.power_of_two
