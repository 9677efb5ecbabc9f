"""Operands of quantised products: values on a format's grid and their scales, laid out as the products take them.

    row tiles      x [R, C] -> scale [R, tiles of C]             1x128
    column tiles   x [R, C] -> scale [tiles of R, C]             128x1; every expert's rows begin a new tile
    block tiles    w [G, N, K] -> scale [G, tiles of N, tiles of K]   128x128

Values of up to 8 significant bits are exact in BF16, whatever their format's name, and are held as that; a GPU that
multiplies FP8 gets E4M3 and E5M2 as float8, in the recipes' usual tiles. What a layer keeps for the backward pass is
`Kept`: the format's own codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.numerics import capability
from dovetail.numerics.cpu.kernels import array
from dovetail.numerics.formats.floats import decode, encode, float_format, pack_e5m6, round_to, unpack_e5m6
from dovetail.numerics.formats.quantize import scale_of
from dovetail.numerics.operands import operands_numba
from dovetail.spec.precision import Quantization

TILE = 128
KEPT_BY_KERNELS = (*capability.FP8, "e5m6")
_NO_CODES = torch.empty(0, 0, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class Operand:
    grid: Tensor  # values before scaling, BF16; float8 where `operands_triton` made them
    scale: Tensor  # FP32 multipliers


@dataclass(frozen=True, slots=True)
class Kept:
    """A matrix [R, C] in row tiles as its format's codes; E5M6 packed, eight values in twelve bytes."""

    codes: Tensor  # uint8
    scale: Tensor  # FP32 [R, tiles]
    quantization: Quantization
    width: int  # C

    def restore(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """[R, C], rounded once to `dtype`."""
        if (
            self.quantization.tile == "row"
            and capability.on_gpu(self.scale)
            and self.quantization.format in KEPT_BY_KERNELS
        ):
            from dovetail.numerics.operands import operands_triton  # Triton comes with torch's CUDA builds only

            return operands_triton.restore(self, dtype)
        fmt, form = float_format(self.quantization.format), operands_numba.form_of(self.quantization.format)
        if form is not None and (fmt.bits <= 8 or fmt.name == "e5m6") and capability.on_cpu(self.scale):
            out = torch.empty(len(self.codes), self.width, dtype=dtype)
            kernel = operands_numba.decode_e5m6 if fmt.name == "e5m6" else operands_numba.decode
            kernel(array(self.codes), array(self.scale), form, array(out))
            return out
        codes = unpack_e5m6(self.codes)[:, : self.width] if fmt.name == "e5m6" else self.codes
        return (decode(codes, fmt) * spread(self.scale, 1, self.width)).to(dtype)


def row_operand(x: Tensor, quantization: Quantization) -> Operand:
    """x [R, C] BF16, tiles along its rows (or one scale, or blocks, repeated for each row)."""
    if _is_on_gpu(x, quantization, "row"):
        from dovetail.numerics.operands import operands_triton

        return operands_triton.row_operand(x, quantization)
    if quantization.tile == "block":
        operand = block_operand(x[None], quantization)
        return Operand(operand.grid[0], spread(operand.scale[0], 0, len(x)))
    if _is_fast(x, quantization):
        return _rows(x, quantization, _row_scale(x, quantization), _NO_CODES)
    return _row_reference(x.float(), quantization)


def keep_rows(x: Tensor, quantization: Quantization) -> tuple[Operand, Kept]:
    """As `row_operand`, and its codes."""
    if _is_on_gpu(x, quantization, "row"):
        from dovetail.numerics.operands import operands_triton

        return operands_triton.keep_rows(x, quantization)
    fmt = float_format(quantization.format)
    if _is_fast(x, quantization) and quantization.tile != "block" and fmt.bits <= 8:
        codes = torch.empty(x.shape, dtype=torch.uint8)
        operand = _rows(x, quantization, _row_scale(x, quantization), codes)
    else:
        operand = row_operand(x, quantization)
        codes = encode(operand.grid.float(), fmt)
        if fmt.name == "e5m6":
            codes = pack_e5m6(F.pad(codes, (0, -codes.shape[1] % 8)))
    return operand, Kept(codes, operand.scale, quantization, x.shape[1])


def keep(x: Tensor, quantization: Quantization) -> Kept:
    """x [R, C] BF16 for the backward pass alone."""
    if capability.on_gpu(x) and (quantization.format, quantization.tile) == ("e5m6", "row"):
        from dovetail.numerics.operands import operands_triton

        return operands_triton.keep_e5m6(x, quantization)
    if _is_fast(x, quantization) and quantization.format == "e5m6" and quantization.tile != "block":
        codes = torch.empty(len(x), 12 * ((x.shape[1] + 7) // 8), dtype=torch.uint8)
        scale = _row_scale(x, quantization)
        arguments = quantization.power_of_two, quantization.tile == "tensor", array(codes), array(scale)
        operands_numba.keep_e5m6(array(x), operands_numba.form_of("e5m6"), *arguments)
        return Kept(codes, scale, quantization, x.shape[1])
    return keep_rows(x, quantization)[1]


def column_operand(x: Tensor, bounds: Tensor, quantization: Quantization) -> Operand:
    """x [R, C] BF16 or FP32, tiles along its columns: rows bounds[t, 0] : bounds[t, 1] each, at most TILE of them."""
    if _is_on_gpu(x, quantization, "column"):
        from dovetail.numerics.operands import operands_triton

        return operands_triton.column_operand(x, bounds, quantization)
    if not _is_fast(x, quantization) or quantization.tile == "block":
        return _column_reference(x.float(), bounds, quantization)
    if quantization.tile == "tensor":
        operand = row_operand(x, quantization)
        return Operand(operand.grid, operand.scale[: len(bounds), :1].expand(len(bounds), x.shape[1]).contiguous())
    operand = _empty(x.shape, (len(bounds), x.shape[1]))
    form = operands_numba.form_of(quantization.format)
    arrays = array(operand.grid), array(operand.scale)
    operands_numba.columns(array(x), bounds.numpy(), form, quantization.power_of_two, *arrays)
    return operand


def retiled_operand(kept: Kept, bounds: Tensor, quantization: Quantization) -> Operand:
    """Column tiles of what was kept in row tiles, by way of FP32."""
    is_in_rows = kept.quantization.tile == "row" and kept.quantization.format in KEPT_BY_KERNELS
    if is_in_rows and _is_on_gpu(kept.scale, quantization, "column"):
        from dovetail.numerics.operands import operands_triton

        return operands_triton.retiled_operand(kept, bounds, quantization)
    forms = [operands_numba.form_of(each.format) for each in (kept.quantization, quantization)]
    is_bytes = float_format(kept.quantization.format).bits <= 8
    if quantization.tile == "column" and is_bytes and None not in forms and capability.on_cpu(kept.scale):
        operand = _empty((len(kept.codes), kept.width), (len(bounds), kept.width))
        arrays = array(operand.grid), array(operand.scale)
        codes = array(kept.codes), array(kept.scale), forms[0]
        operands_numba.retile(*codes, bounds.numpy(), forms[1], quantization.power_of_two, *arrays)
        return operand
    return column_operand(kept.restore(torch.float32), bounds, quantization)


def block_operand(weight: Tensor, quantization: Quantization) -> Operand:
    """weight [G, N, K] BF16 in tiles of TILE x TILE, or with one scale for each of G."""
    if _is_on_gpu(weight, quantization, "block"):
        from dovetail.numerics.operands import operands_triton

        return operands_triton.block_operand(weight, quantization)
    groups, rows, columns = weight.shape
    tiles = _tiles(rows), _tiles(columns)
    if not _is_fast(weight, quantization):
        return _block_reference(weight.float(), quantization)
    if quantization.tile == "tensor":
        scale = _tensor_scales(weight, quantization)
        each_row = scale.repeat_interleave(rows)[:, None].expand(-1, tiles[1]).contiguous()
        grid = _rows(weight.view(groups * rows, columns), quantization, each_row, _NO_CODES).grid
        return Operand(grid.view_as(weight), scale[:, None, None].expand(-1, *tiles).contiguous())
    operand = _empty(weight.shape, (groups, *tiles))
    form = operands_numba.form_of(quantization.format)
    arrays = array(operand.grid), array(operand.scale)
    operands_numba.blocks(array(weight), form, quantization.power_of_two, *arrays)
    return operand


def token_tiles(offsets: Sequence[int]) -> tuple[Tensor, np.ndarray]:
    """Bounds [tiles, 2] of column tiles where each group of rows begins a new one, and each group's first tile."""
    bounds, firsts = [], []
    for start, stop in zip(offsets, offsets[1:], strict=False):
        firsts.append(len(bounds))
        bounds += [(row, min(row + TILE, stop)) for row in range(start, stop, TILE)]
    return torch.tensor(bounds, dtype=torch.int64).view(-1, 2), np.array(firsts, dtype=np.int64)


def scales_of(amax: Tensor, quantization: Quantization) -> Tensor:
    """amax / largest value of the format; NaN where amax is not finite."""
    amax = torch.where(amax.isfinite(), amax, torch.nan)
    return scale_of(amax, float_format(quantization.format), quantization.power_of_two).contiguous()


def _row_reference(x: Tensor, quantization: Quantization) -> Operand:
    amax = _tiled(x.abs(), 1).amax(2)
    if quantization.tile == "tensor" and amax.numel():
        amax = amax.amax().expand_as(amax)
    scale = scales_of(amax, quantization)
    return Operand(_grid(x / spread(scale, 1, x.shape[1]), quantization), scale)


def _block_reference(weight: Tensor, quantization: Quantization) -> Operand:
    amax = _tiled(_tiled(weight.abs(), 2).amax(3), 1).amax(2)
    if quantization.tile == "tensor" and amax.numel():
        amax = amax.amax((1, 2), keepdim=True).expand_as(amax)
    scale = scales_of(amax, quantization)
    each = spread(spread(scale, 2, weight.shape[2]), 1, weight.shape[1])
    return Operand(_grid(weight / each, quantization), scale)


def _column_reference(x: Tensor, bounds: Tensor, quantization: Quantization) -> Operand:
    tiles = [slice(start, stop) for start, stop in bounds.tolist()]
    amax = torch.stack([x[tile].abs().amax(0) for tile in tiles]) if tiles else x.new_empty(0, x.shape[1])
    if quantization.tile == "block":
        amax = spread(_tiled(amax, 1).amax(2), 1, x.shape[1])
    elif quantization.tile == "tensor":
        amax = amax.amax().expand_as(amax) if amax.numel() else amax
    scale = scales_of(amax, quantization)
    scaled = torch.cat([x[tile] / each for tile, each in zip(tiles, scale, strict=True)]) if tiles else x
    return Operand(_grid(scaled, quantization), scale)


def _grid(scaled: Tensor, quantization: Quantization) -> Tensor:
    return round_to(scaled, float_format(quantization.format)).to(torch.bfloat16)


def _tiles(size: int) -> int:
    return (size + TILE - 1) // TILE


def _tiled(x: Tensor, dim: int) -> Tensor:
    """Dimension `dim` as [tiles, TILE], zeros at the end."""
    padding = [0, 0] * (x.ndim - 1 - dim) + [0, -x.shape[dim] % TILE]
    return F.pad(x, padding).unflatten(dim, (-1, TILE))


def spread(scale: Tensor, dim: int, size: int) -> Tensor:
    """Each tile's value for all `size` elements of dimension `dim`, of TILE each."""
    return scale.repeat_interleave(TILE, dim).narrow(dim, 0, size)


def _is_on_gpu(x: Tensor, quantization: Quantization, tile: str) -> bool:
    """Whether the operand is made for FP8 products; other formats and tiles come from the references, in BF16."""
    return capability.on_fp8_gpu(x) and quantization.format in capability.FP8 and quantization.tile == tile


def _is_fast(x: Tensor, quantization: Quantization) -> bool:
    return capability.on_cpu(x) and x.is_contiguous() and operands_numba.form_of(quantization.format) is not None


def _rows(x: Tensor, quantization: Quantization, scale: Tensor, codes: Tensor) -> Operand:
    """The kernel: `scale` [R, tiles] is filled, unless one for the whole tensor is there already."""
    grid, form = torch.empty(x.shape, dtype=torch.bfloat16), operands_numba.form_of(quantization.format)
    is_given = quantization.tile == "tensor"
    arrays = array(grid), array(codes), array(scale)
    operands_numba.rows(array(x), form, quantization.power_of_two, is_given, *arrays)
    return Operand(grid, scale)


def _row_scale(x: Tensor, quantization: Quantization) -> Tensor:
    """[R, tiles] for the kernel: that of the tensor, or room for the tiles'."""
    shape = len(x), _tiles(x.shape[1])
    if quantization.tile == "tensor":
        return _tensor_scales(x[None], quantization).expand(shape).contiguous()
    return torch.empty(shape, dtype=torch.float32)


def _tensor_scales(x: Tensor, quantization: Quantization) -> Tensor:
    """One for each of x [G, ...]."""
    amax = x.abs().flatten(1).amax(1) if x.numel() else x.new_zeros(len(x))
    return scales_of(amax.float(), quantization)


def _empty(shape: Sequence[int], scales: tuple[int, ...]) -> Operand:
    return Operand(torch.empty(shape, dtype=torch.bfloat16), torch.empty(scales, dtype=torch.float32))
