"""Block-wise quantisation: a matrix in a small format, with one FP32 scale per tile [V3 §3.3, V3repo kernel.py].

    amax_t  = max |x| over tile t, at least 1e-4
    scale_t = amax_t / max of the format (448 for E4M3)     the dequantisation multiplier
    data    = round(clamp(x / scale_t, -max, max))
    x       ~ data * scale_t

Tiles: 1x128 for activations and their gradients (a token's 128 channels), 128x1 for the weight gradient's operand
(128 tokens of a channel), 128x128 for weights, whose scales are published as weight_scale_inv. Ragged edges are
zero-padded to whole tiles for the amax and cut afterwards: 576 rows have 5 rows of 128x128 scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.numerics import capability
from dovetail.numerics.formats.floats import E4M3, FloatFormat, decode, decode_ue8m0, encode, encode_ue8m0, float_format
from dovetail.spec.tensors import WEIGHT_TILE, scale_shape

E4M3_MAX = E4M3.max
AMAX_FLOOR = 1e-4  # keeps the scale of an all-zero tile away from 0 [DeepGEMM per_block_cast_to_fp8]
TORCH_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}  # the rest is kept as integer codes


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A matrix in tiles: `data` times its tile's `scale`."""

    data: Tensor  # [rows, columns]: float8 where torch has the format, else the codes of `formats.encode`
    scale: Tensor  # FP32 [ceil(rows / tile[0]), ceil(columns / tile[1])], a multiplier
    tile: tuple[int, int]
    format: str = "e4m3"


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
    scale = scale_of(tiles.abs().amax(dim=(1, 3)), fmt, power_of_two)
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
    """`data * scale` per tile, computed in FP32 and rounded once to `dtype`."""
    data, scale, tile = quantized.data, quantized.scale, quantized.tile
    values = grid_values(quantized)
    expected = scale_shape(tuple(data.shape), tile)
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"scale has shape {list(scale.shape)}, not {list(expected)}: data is {list(data.shape)},"
            f" blocks are {list(tile)}"
        )
    tiles = _split(values, tile)
    return _join((tiles * scale.to(torch.float32)[:, None, :, None]).to(dtype), data.shape)


def grid_values(quantized: Quantized) -> Tensor:
    """`data` as FP32 numbers on the format's grid, unscaled [rows, columns]. ValueError where it is no matrix of
    floats or of the format's codes."""
    data = quantized.data
    fmt = float_format(quantized.format)
    is_codes = data.dtype in (torch.uint8, torch.uint16, torch.int32) and fmt.name not in TORCH_DTYPES
    if data.ndim != 2 or not (is_codes or data.is_floating_point()):
        raise ValueError(f"{fmt.name} data is a matrix of floats or codes, not {data.dtype} {list(data.shape)}")
    return decode(data, fmt) if is_codes else data.to(torch.float32)


def retile(
    quantized: Quantized, tile: tuple[int, int] = (128, 1), format: str | None = None, power_of_two: bool = True
) -> Quantized:
    """The same matrix in other tiles, and another `format` if named: 1x128 -> 128x1 for the weight gradient.

    Old and new scales that are powers of two shift exponents only: what does not sink below the new tile's smallest
    subnormal keeps its value exactly, and no second rounding error arises [V3 §3.3].
    """
    return quantize(dequantize(quantized), tile, format or quantized.format, power_of_two, check=False)


def refuse_non_finite(x: Tensor, name: str) -> None:
    """ValueError where `x` holds inf or NaN: how many of each, and what to do about it."""
    nans, infinities = int(torch.isnan(x).sum()), int(torch.isinf(x).sum())
    if nans or infinities:
        raise ValueError(
            f"{name}, shape {list(x.shape)}, holds {nans} NaN and {infinities} infinite values, which no scale can"
            " carry; find the step that made them (a lower learning rate or gradient clipping often is the remedy), or"
            " take a checkpoint from before it"
        )


def _round(scaled: Tensor, fmt: FloatFormat) -> Tensor:
    """Clamped `scaled` as the format's float8, or as codes."""
    dtype = TORCH_DTYPES.get(fmt.name)
    return encode(scaled, fmt) if dtype is None else scaled.to(dtype)


def _split(matrix: Tensor, tile: tuple[int, int]) -> Tensor:
    """Zero-pad to whole tiles and view as [tile rows, tile[0], tile columns, tile[1]]."""
    if min(tile) < 1:
        raise ValueError(f"tile {list(tile)} of a {list(matrix.shape)} matrix: both sides must be at least 1")
    rows, columns = matrix.shape
    row_tiles, column_tiles = scale_shape((rows, columns), tile)
    below, right = row_tiles * tile[0] - rows, column_tiles * tile[1] - columns
    padded = F.pad(matrix, (0, right, 0, below)) if below or right else matrix
    return padded.reshape(row_tiles, tile[0], column_tiles, tile[1])


def _join(tiles: Tensor, shape: torch.Size) -> Tensor:
    """Undo `_split`: drop the padding."""
    padded = tiles.reshape(tiles.shape[0] * tiles.shape[1], tiles.shape[2] * tiles.shape[3])
    return padded[: shape[0], : shape[1]].contiguous()
