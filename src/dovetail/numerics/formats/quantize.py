"""Quantises a matrix in tiles, with one FP32 scale per tile [V3 §3.3, V3repo kernel.py].

    amax_t  = max |x| over tile t, at least 1e-4
    scale_t = amax_t / max of the format (448 for E4M3)     the dequantisation multiplier
    data    = round(clamp(x / scale_t, -max, max))
    x       ~ data * scale_t

Any tile will do; those in use are told in `quantized`. The scales of 128x128 blocks are published as weight_scale_inv.
Ragged edges are zero-padded to whole tiles for the amax and cut afterwards: 576 rows have 5 rows of 128x128 scales.

    operation    reference              CPU kernel                   GPU kernel
    quantize     quantize_reference     -                            quantize_triton.quantize
    dequantize   dequantize_reference   quantize_numba.dequantize    quantize_triton.dequantize

Operands of products are quantised by `numerics.operands`, which has kernels on both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.numerics import capability
from dovetail.numerics.formats import quantize_numba
from dovetail.numerics.formats.floats import FloatFormat, decode_ue8m0, encode, encode_ue8m0, float_format
from dovetail.numerics.formats.quantized import (
    AMAX_FLOOR,
    TORCH_DTYPES,
    Quantized,
    check_scale,
    grid_values,
    refuse_non_finite,
)
from dovetail.spec.tensors import WEIGHT_TILE, scale_shape


def quantize(
    x: Tensor,
    tile: tuple[int, int],
    format: str = "e4m3",
    power_of_two: bool = False,
    check: bool = True,
    name: str = "the tensor to quantise",
) -> Quantized:
    """Quantise `x` [rows, columns] by tiles, computing in FP32; not differentiable.

    `power_of_two` rounds every scale up to a power of two (UE8M0), so that multiplying by it is exact. Raises
    ValueError, which calls x `name`, for what is no float matrix, for a format with FP32's range, and for inf or NaN
    in x; with `check` off (it makes the host wait for a GPU) a tile that holds these gets NaN on the way back.
    """
    if capability.on_gpu(x) and x.ndim == 2 and x.is_floating_point():
        from dovetail.numerics.formats import quantize_triton  # Triton comes with torch's CUDA builds only

        if quantize_triton.fits(x, tile, float_format(format)):
            return quantize_triton.quantize(x.detach(), tile, format, power_of_two, check, name)
    return quantize_reference(x, tile, format, power_of_two, check, name)


def quantize_reference(
    x: Tensor,
    tile: tuple[int, int],
    format: str = "e4m3",
    power_of_two: bool = False,
    check: bool = True,
    name: str = "the tensor to quantise",
) -> Quantized:
    fmt = float_format(format)
    if fmt.exponent_bits == 8:
        raise ValueError(f"{name}: format {fmt.name!r} has FP32's range and takes no scales; convert to it instead")
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"tiles are of a float matrix; {name} is {x.dtype} with shape {list(x.shape)}")
    tiles = _split(x.detach().to(torch.float32), tile)
    scale = scale_of(tiles.abs().amax(dim=(-3, -1)), fmt, power_of_two)
    if check and not bool(torch.isfinite(scale).all()):
        refuse_non_finite(x, name)
    data = _round((tiles / scale[:, None, :, None]).clamp_(-fmt.max, fmt.max), fmt)
    return Quantized(data=_join(data, x.shape), scale=scale, tile=tile, format=fmt.name)


def scale_of(amax: Tensor, fmt: FloatFormat, power_of_two: bool) -> Tensor:
    """The multiplier of tiles with these largest magnitudes; not finite where they are not."""
    scale = amax.clamp(min=AMAX_FLOOR) / fmt.max
    if not power_of_two:
        return scale
    return torch.where(torch.isfinite(scale), decode_ue8m0(encode_ue8m0(scale)), scale)


def quantize_weight(weight: Tensor, tile: tuple[int, int] = WEIGHT_TILE, power_of_two: bool = False) -> Quantized:
    """`weight` as published: E4M3 in blocks. One that holds inf or NaN gets NaN on the way back, never a finite
    value."""
    return quantize(weight, tile, power_of_two=power_of_two, check=False)


def dequantize(quantized: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """`data * scale` per tile, computed in FP32 and rounded once to `dtype`: the one way back. ValueError where tiles
    and scales are not equally many."""
    check_scale(quantized)
    if capability.on_gpu(quantized.scale):
        from dovetail.numerics.formats import quantize_triton

        if quantize_triton.reads(quantized):
            return quantize_triton.dequantize(quantized, dtype)
    if capability.on_cpu(quantized.scale) and quantize_numba.reads(quantized, dtype):
        return quantize_numba.dequantize(quantized, dtype)
    return dequantize_reference(quantized, dtype)


def dequantize_reference(quantized: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    tiles = _split(grid_values(quantized), quantized.tile)
    return _join((tiles * quantized.scale.to(torch.float32)[..., :, None, :, None]).to(dtype), quantized.shape)


def _round(scaled: Tensor, fmt: FloatFormat) -> Tensor:
    """Clamped `scaled` as the format's float8, or as codes."""
    dtype = TORCH_DTYPES.get(fmt.name)
    return encode(scaled, fmt) if dtype is None else scaled.to(dtype)


def _split(matrix: Tensor, tile: tuple[int, int]) -> Tensor:
    """Zero-pad to whole tiles and view as [..., tile rows, tile[0], tile columns, tile[1]]."""
    if min(tile) < 1:
        raise ValueError(f"tile {list(tile)} of a {list(matrix.shape)} matrix: both sides must be at least 1")
    rows, columns = matrix.shape[-2:]
    row_tiles, column_tiles = scale_shape((rows, columns), tile)
    below, right = row_tiles * tile[0] - rows, column_tiles * tile[1] - columns
    padded = F.pad(matrix, (0, right, 0, below)) if below or right else matrix
    return padded.reshape(*matrix.shape[:-2], row_tiles, tile[0], column_tiles, tile[1])


def _join(tiles: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `_split`: drop the padding."""
    down, height, across, width = tiles.shape[-4:]
    padded = tiles.reshape(*tiles.shape[:-4], down * height, across * width)
    return padded[..., : shape[-2], : shape[-1]].contiguous()
