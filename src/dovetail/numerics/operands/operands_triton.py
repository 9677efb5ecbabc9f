"""`numerics.operands.operands` on a GPU: values on the grid of E4M3 or E5M2 as float8, which its Tensor Cores take.

Bit for bit the operands of a CPU. Tiles of columns are written K-major (`quantize_triton`); weights whose rows are no
multiple of 128 begin a new row of blocks with every group, as rows of tokens do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.numerics.formats.floats import pack_e5m6, unpack_e5m6
from dovetail.numerics.formats.quantize import TORCH_DTYPES, Quantized
from dovetail.numerics.formats.quantize_triton import dequantize_rows, quantize, quantize_parts
from dovetail.numerics.operands.operands import TILE, Kept, Operand, token_tiles
from dovetail.spec.precision import Quantization

ROW, COLUMN, BLOCK = (1, TILE), (TILE, 1), (TILE, TILE)


def row_operand(x: Tensor, quantization: Quantization) -> Operand:
    return _operand(quantize(x, ROW, quantization.format, quantization.power_of_two, check=False))


def keep_rows(x: Tensor, quantization: Quantization) -> tuple[Operand, Kept]:
    operand = row_operand(x, quantization)
    return operand, Kept(operand.grid.view(torch.uint8), operand.scale, quantization, x.shape[1])


def keep_e5m6(x: Tensor, quantization: Quantization) -> Kept:
    quantized = quantize(x, ROW, "e5m6", quantization.power_of_two, check=False)
    codes = quantized.data.view(torch.int16)  # torch pads no unsigned integers
    return Kept(pack_e5m6(F.pad(codes, (0, -codes.shape[1] % 8))), quantized.scale, quantization, x.shape[1])


def restore(kept: Kept, dtype: torch.dtype) -> Tensor:
    return dequantize_rows(_values(kept), kept.scale, dtype)


def column_operand(x: Tensor, bounds: Tensor, quantization: Quantization) -> Operand:
    return _operand(quantize_parts(x, bounds, COLUMN, quantization.format, quantization.power_of_two))


def retiled_operand(kept: Kept, bounds: Tensor, quantization: Quantization) -> Operand:
    rule = quantization.format, quantization.power_of_two
    return _operand(quantize_parts(_values(kept), bounds, COLUMN, *rule, kept.scale))


def block_operand(weight: Tensor, quantization: Quantization) -> Operand:
    groups, rows, columns = weight.shape
    matrix = weight.reshape(groups * rows, columns)
    if rows % TILE == 0 or groups == 1:
        found = quantize(matrix, BLOCK, quantization.format, quantization.power_of_two, check=False)
    else:
        bounds, _ = token_tiles(range(0, (groups + 1) * rows, rows))
        found = quantize_parts(matrix, bounds, BLOCK, quantization.format, quantization.power_of_two)
    return Operand(found.data.view(weight.shape), found.scale.view(groups, -(-rows // TILE), -(-columns // TILE)))


def _operand(quantized: Quantized) -> Operand:
    return Operand(quantized.data, quantized.scale)


def _values(kept: Kept) -> Tensor:
    """What is kept as numbers that a kernel reads, without their scales; E5M6 is FP16 with four bits less."""
    if kept.quantization.format != "e5m6":
        return kept.codes.view(TORCH_DTYPES[kept.quantization.format])
    codes = unpack_e5m6(kept.codes)[:, : kept.width].to(torch.int32)
    return (codes << 4).to(torch.int16).view(torch.float16)
