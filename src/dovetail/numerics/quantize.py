"""Block-wise FP8: weights as E4M3 with one scale per 128x128 block [V3 §3.3, V3repo kernel.py].

    amax_b  = max |w| over block b, at least 1e-4
    scale_b = amax_b / 448                      the dequantisation multiplier (published as weight_scale_inv)
    data    = E4M3(clamp(w / scale_b, -448, 448))
    w       ~ data * scale_b

Ragged edges are zero-padded to whole blocks for the amax and cut afterwards: 576 rows have 5 rows of scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.spec.tensors import WEIGHT_TILE, scale_shape

E4M3_MAX = 448.0  # largest finite E4M3 value
AMAX_FLOOR = 1e-4  # keeps the scale of an all-zero block away from 0 [DeepGEMM per_block_cast_to_fp8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A float matrix in blocks: `data` times its block's `scale`."""

    data: Tensor  # float8_e4m3fn [rows, columns]
    scale: Tensor  # FP32 [ceil(rows / tile[0]), ceil(columns / tile[1])], a multiplier
    tile: tuple[int, int]


def quantize_weight(weight: Tensor, tile: tuple[int, int] = WEIGHT_TILE, power_of_two: bool = False) -> Quantized:
    """Quantise `weight` [rows, columns] by blocks of `tile`, computing in FP32.

    `power_of_two` rounds every scale up to a power of two (UE8M0, the `scale_fmt` of V3.1), so that
    multiplying by it is exact. A block that holds inf or NaN gets NaN on the way back, never a finite value.
    """
    _check_matrix(weight)
    tiles = _split(weight.detach().to(torch.float32), tile)
    scale = tiles.abs().amax(dim=(1, 3)).clamp(min=AMAX_FLOOR) / E4M3_MAX
    if power_of_two:
        scale = _round_up_to_power_of_two(scale)
    # casts of what is beyond the format saturate in torch 2.13 and gave NaN before
    scaled = (tiles / scale[:, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX)
    data = _join(scaled.to(torch.float8_e4m3fn), weight.shape)
    return Quantized(data=data, scale=scale, tile=tile)


def dequantize(quantized: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """`data * scale` per block, computed in FP32 and rounded once to `dtype`."""
    data, scale, tile = quantized.data, quantized.scale, quantized.tile
    _check_matrix(data)
    expected = scale_shape(tuple(data.shape), tile)
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"scale has shape {list(scale.shape)}, not {list(expected)}: data is {list(data.shape)},"
            f" blocks are {list(tile)}"
        )
    tiles = _split(data.to(torch.float32), tile)
    return _join((tiles * scale.to(torch.float32)[:, None, :, None]).to(dtype), data.shape)


def _check_matrix(tensor: Tensor) -> None:
    if tensor.ndim != 2 or not tensor.is_floating_point():
        raise ValueError(f"blocks are of a float matrix, not of {tensor.dtype} with shape {list(tensor.shape)}")


def _split(matrix: Tensor, tile: tuple[int, int]) -> Tensor:
    """Zero-pad to whole blocks and view as [block rows, tile[0], block columns, tile[1]]."""
    rows, columns = matrix.shape
    row_tiles, column_tiles = scale_shape((rows, columns), tile)
    padded = F.pad(matrix, (0, column_tiles * tile[1] - columns, 0, row_tiles * tile[0] - rows))
    return padded.view(row_tiles, tile[0], column_tiles, tile[1])


def _join(tiles: Tensor, shape: torch.Size) -> Tensor:
    """Undo `_split`: drop the padding."""
    padded = tiles.reshape(tiles.shape[0] * tiles.shape[1], tiles.shape[2] * tiles.shape[3])
    return padded[: shape[0], : shape[1]].contiguous()


def _round_up_to_power_of_two(scale: Tensor) -> Tensor:
    """Next power of two by the bits: exponent + 1 where any mantissa bit is set, kept in UE8M0's 1..254."""
    bits = scale.view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    rounded = (exponent.clamp(1, 254) << 23).view(torch.float32)
    return torch.where(torch.isfinite(scale), rounded, scale)
