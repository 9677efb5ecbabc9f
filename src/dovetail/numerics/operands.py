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

from dovetail.numerics import gpu, quantize_numba
from dovetail.numerics.cpu_numba import array, takes
from dovetail.numerics.formats import decode, encode, float_format, pack_e5m6, round_to, unpack_e5m6
from dovetail.numerics.quantize import scale_of
from dovetail.spec.precision import Quantization

TILE = 128
KEPT_BY_KERNELS = (*gpu.FP8, "e5m6")


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
        if self.quantization.tile == "row" and gpu.takes(self.scale) and self.quantization.format in KEPT_BY_KERNELS:
            from dovetail.numerics import operands_triton  # Triton comes with torch's CUDA builds only

            return operands_triton.restore(self, dtype)
        kernels = {"e4m3": quantize_numba.decode, "e5m6": quantize_numba.decode_e5m6}
        if self.quantization.format in kernels and takes(self.scale):
            out = torch.empty(len(self.codes), self.width, dtype=dtype)
            kernels[self.quantization.format](array(self.codes), array(self.scale), array(out))
            return out
        codes = self.codes
        if self.quantization.format == "e5m6":
            codes = unpack_e5m6(codes)[:, : self.width]
        values = decode(codes, float_format(self.quantization.format))
        return (values * spread(self.scale, 1, self.width)).to(dtype)


def row_operand(x: Tensor, quantization: Quantization) -> Operand:
    """x [R, C] BF16, tiles along its rows (or one scale, or blocks, repeated for each row)."""
    if _is_on_gpu(x, quantization, "row"):
        from dovetail.numerics import operands_triton

        return operands_triton.row_operand(x, quantization)
    if _is_fast(x, quantization, "row"):
        operand, no_codes = _empty(x, (x.shape[0], _tiles(x.shape[1]))), torch.empty(0, 0, dtype=torch.uint8)
        arrays = (array(each) for each in (operand.grid, no_codes, operand.scale))
        quantize_numba.rows(array(x), quantization.power_of_two, *arrays)
        return operand
    return _row_reference(x.float(), quantization)


def keep_rows(x: Tensor, quantization: Quantization) -> tuple[Operand, Kept]:
    """As `row_operand`, and its codes."""
    if _is_on_gpu(x, quantization, "row"):
        from dovetail.numerics import operands_triton

        return operands_triton.keep_rows(x, quantization)
    if _is_fast(x, quantization, "row"):
        operand, codes = _empty(x, (x.shape[0], _tiles(x.shape[1]))), torch.empty(x.shape, dtype=torch.uint8)
        quantize_numba.rows(
            array(x), quantization.power_of_two, array(operand.grid), array(codes), array(operand.scale)
        )
    else:
        operand = _row_reference(x.float(), quantization)
        codes = encode(operand.grid.float(), float_format(quantization.format))
        if quantization.format == "e5m6":
            codes = pack_e5m6(F.pad(codes, (0, -codes.shape[1] % 8)))
    return operand, Kept(codes, operand.scale, quantization, x.shape[1])


def keep(x: Tensor, quantization: Quantization) -> Kept:
    """x [R, C] BF16 for the backward pass alone."""
    if gpu.takes(x) and (quantization.format, quantization.tile) == ("e5m6", "row"):
        from dovetail.numerics import operands_triton

        return operands_triton.keep_e5m6(x, quantization)
    if takes(x) and x.is_contiguous() and quantization.format == "e5m6" and quantization.tile == "row":
        codes = torch.empty(len(x), 12 * ((x.shape[1] + 7) // 8), dtype=torch.uint8)
        scale = torch.empty(len(x), _tiles(x.shape[1]), dtype=torch.float32)
        quantize_numba.keep_e5m6(array(x), quantization.power_of_two, array(codes), array(scale))
        return Kept(codes, scale, quantization, x.shape[1])
    return keep_rows(x, quantization)[1]


def column_operand(x: Tensor, bounds: Tensor, quantization: Quantization) -> Operand:
    """x [R, C] BF16 or FP32, tiles along its columns: rows bounds[t, 0] : bounds[t, 1] each, at most TILE of them."""
    if _is_on_gpu(x, quantization, "column"):
        from dovetail.numerics import operands_triton

        return operands_triton.column_operand(x, bounds, quantization)
    if takes(x) and x.is_contiguous() and (quantization.format, quantization.tile) == ("e4m3", "column"):
        operand = _empty(x.to(torch.bfloat16), (len(bounds), x.shape[1]))
        arrays = array(operand.grid), array(operand.scale)
        quantize_numba.columns(array(x), bounds.numpy(), quantization.power_of_two, *arrays)
        return operand
    return _column_reference(x.float(), bounds, quantization)


def retiled_operand(kept: Kept, bounds: Tensor, quantization: Quantization) -> Operand:
    """Column tiles of what was kept in row tiles, by way of FP32."""
    is_in_rows = kept.quantization.tile == "row" and kept.quantization.format in KEPT_BY_KERNELS
    if is_in_rows and _is_on_gpu(kept.scale, quantization, "column"):
        from dovetail.numerics import operands_triton

        return operands_triton.retiled_operand(kept, bounds, quantization)
    is_fast = takes(kept.scale) and (quantization.format, quantization.tile) == ("e4m3", "column")
    if kept.quantization.format == "e4m3" and is_fast:
        grid = torch.empty(len(kept.codes), kept.width, dtype=torch.bfloat16)
        operand = _empty(grid, (len(bounds), kept.width))
        arrays = array(operand.grid), array(operand.scale)
        codes = array(kept.codes), array(kept.scale)
        quantize_numba.retile(*codes, bounds.numpy(), quantization.power_of_two, *arrays)
        return operand
    return column_operand(kept.restore(torch.float32), bounds, quantization)


def block_operand(weight: Tensor, quantization: Quantization) -> Operand:
    """weight [G, N, K] BF16 in tiles of TILE x TILE."""
    if _is_on_gpu(weight, quantization, "block"):
        from dovetail.numerics import operands_triton

        return operands_triton.block_operand(weight, quantization)
    groups, rows, columns = weight.shape
    if _is_fast(weight, quantization, "block"):
        operand = _empty(weight, (groups, _tiles(rows), _tiles(columns)))
        arrays = array(operand.grid), array(operand.scale)
        quantize_numba.blocks(array(weight), quantization.power_of_two, *arrays)
        return operand
    wide = weight.float()
    amax = _tiled(_tiled(wide.abs(), 2).amax(3), 1).amax(2)
    if quantization.tile == "tensor" and amax.numel():
        amax = amax.amax((1, 2), keepdim=True).expand_as(amax)
    scale = scales_of(amax, quantization)
    return Operand(_grid(wide / spread(spread(scale, 2, columns), 1, rows), quantization), scale)


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
    if quantization.tile == "block":
        amax = spread(_tiled(amax, 0).amax(1), 0, len(x))
    elif quantization.tile == "tensor":
        amax = amax.amax().expand_as(amax) if amax.numel() else amax
    scale = scales_of(amax, quantization)
    return Operand(_grid(x / spread(scale, 1, x.shape[1]), quantization), scale)


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
    return gpu.multiplies_fp8(x) and quantization.format in gpu.FP8 and quantization.tile == tile


def _is_fast(x: Tensor, quantization: Quantization, tile: str) -> bool:
    return takes(x) and x.is_contiguous() and quantization.format == "e4m3" and quantization.tile == tile


def _empty(x: Tensor, scales: tuple[int, ...]) -> Operand:
    return Operand(torch.empty_like(x), torch.empty(scales, dtype=torch.float32))
