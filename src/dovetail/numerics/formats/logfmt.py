"""LogFMT-nBit, a format whose codes are equal steps of a logarithm [ISCA §3.2].

A code is a sign and n - 1 bits, which count steps of log2 |x| within each 1x128 tile.

    top      = log2 of the tile's largest |x|
    minimum  = log2 of its smallest |x| that is not zero, at least top - 32 (about the range of five exponent bits)
    step     = (top - minimum) / (2^(n-1) - 2)
    value    = 0 for K = 0,  +-2^(minimum + step (K - 1)) for K = 1 .. 2^(n-1) - 1

Rounding is to the nearest *value*, not to the nearest logarithm. With r = 2^step two neighbours a and r a meet at
a (1 + r) / 2, which is why K can be had in closed form [DeepEP logfmt_encode]:

    K = floor((log2 |x| - minimum) / step + 2 - log2((1 + r) / 2) / step)

Below code 1, where only the limit to 32 octaves can have left anything, the neighbour is zero and the border half of
the smallest value: there the formula alone would flush too much. Ties go away from zero.

Arithmetic is FP64, so that the closed form and a search for the nearest value agree; `minimum` and `step` are FP32, as
sent. Values are packed as a little-endian stream of n bits each, sign on top.

    operation          reference            CPU kernel                  GPU kernel
    encode             encode_reference     -                           logfmt_triton.encode
    decode             decode_reference     -                           logfmt_triton.decode
    round_to_logfmt    round_reference      logfmt_numba.round_tiles    -
    extremes           extremes_reference   logfmt_numba.extremes       -
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.numerics import capability
from dovetail.numerics.cpu.kernels import array
from dovetail.numerics.formats import logfmt_numba
from dovetail.numerics.formats.quantized import LOG_RANGE, LOGFMT_BITS, TILE, LogFmt, refuse_non_finite

KERNEL_DTYPES = (torch.float32, torch.bfloat16)  # of what the GPU's kernels read and write


def encode(x: Tensor, bits: int, check: bool = True, name: str = "the tensor to encode") -> LogFmt:
    """`x` [rows, columns] as LogFMT with `bits` per value, in tiles of 128 columns; the last may be shorter.

    Raises ValueError, which calls x `name`, for what is no float matrix, for bits outside 4..12, and for inf or NaN;
    with `check` off (it makes the host wait for a GPU) a tile that holds these comes back as NaN.
    """
    if capability.on_gpu(x) and x.ndim == 2 and x.dtype in KERNEL_DTYPES:
        from dovetail.numerics.formats import logfmt_triton  # Triton comes with torch's CUDA builds only

        return logfmt_triton.encode(x.detach(), bits, check, name)
    return encode_reference(x, bits, check, name)


def encode_reference(x: Tensor, bits: int, check: bool = True, name: str = "the tensor to encode") -> LogFmt:
    codes, minimum, step = _encoded(x, bits, check, name)
    return LogFmt(data=pack_bits(codes, bits), minimum=minimum, step=step, bits=bits, columns=x.shape[1])


def decode(encoded: LogFmt, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values [rows, columns]. ValueError where the shapes of codes and metadata do not fit."""
    if capability.on_gpu(encoded.data) and dtype in KERNEL_DTYPES:
        from dovetail.numerics.formats import logfmt_triton

        return logfmt_triton.decode(encoded, dtype)
    return decode_reference(encoded, dtype)


def decode_reference(encoded: LogFmt, dtype: torch.dtype = torch.float32) -> Tensor:
    rows, tiles = encoded.data.shape[0], -(-encoded.columns // TILE)
    if not encoded.minimum.shape == encoded.step.shape == (rows, tiles):
        raise ValueError(
            f"{rows} rows of {encoded.columns} columns need metadata {[rows, tiles]}, not"
            f" {list(encoded.minimum.shape)} and {list(encoded.step.shape)}"
        )
    codes = unpack_bits(encoded.data, encoded.bits, encoded.columns)
    return from_codes(codes, encoded.minimum, encoded.step, encoded.bits, dtype)


def round_to_logfmt(x: Tensor, bits: int, check: bool = True) -> Tensor:
    """`decode(encode(x))` in x's dtype, without the packing: what the far end of a wire sees."""
    minimum, step = _grid(x, bits, check, "the tensor to round")
    if not capability.on_cpu(x):
        return round_reference(x.detach(), minimum, step, bits)
    x, wide = x.detach().contiguous(), step.to(torch.float64)
    rounded, is_doubtful = torch.empty_like(x), torch.empty(len(x), dtype=torch.bool)
    low = minimum.to(torch.float64)
    grid = (array(each) for each in (low, torch.exp2(low), wide, _middle(wide)))
    limits = float(_top_code(bits)), torch.finfo(x.dtype).max
    logfmt_numba.round_tiles(array(x), *grid, *limits, array(rounded), array(is_doubtful))
    if bool(is_doubtful.any()):
        doubtful = (each[is_doubtful] for each in (x, minimum, step))
        rounded[is_doubtful] = round_reference(*doubtful, bits)
    return rounded


def round_reference(x: Tensor, minimum: Tensor, step: Tensor, bits: int) -> Tensor:
    """x [rows, columns] on given grids [rows, tiles]."""
    return from_codes(to_codes(x, minimum, step, bits), minimum, step, bits, x.dtype)


def tile_grid(largest: Tensor, smallest: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(minimum, step), FP32, of tiles with these extremes of |x| other than zero; (0, 0) where `largest` is zero, NaN
    where it is not finite."""
    top = torch.log2(largest.to(torch.float64).masked_fill(largest == torch.inf, torch.nan))
    bottom = torch.maximum(torch.log2(smallest.to(torch.float64)), top - LOG_RANGE)
    minimum = bottom.to(torch.float32)
    # rounding may have put `minimum` above `top` where they are nearly equal
    step = ((top - minimum.to(torch.float64)) / (_top_code(bits) - 1)).clamp(min=0).to(torch.float32)
    is_zero = largest == 0
    return minimum.masked_fill(is_zero, 0), step.masked_fill(is_zero, 0)


def to_codes(x: Tensor, minimum: Tensor, step: Tensor, bits: int) -> Tensor:
    """int16 codes of x [rows, columns] on given grids [rows, tiles]: the sign in bit n - 1, K below it."""
    tiles = _tiled(x).to(torch.float64)
    magnitude, least = tiles.abs(), torch.exp2(minimum.to(torch.float64))[..., None]
    width = step.to(torch.float64)[..., None]
    middle, width = _middle(width), torch.where(width == 0, 1, width)  # all codes are one number: any step does
    code = torch.floor(torch.log2(magnitude / least) / width + 2 - middle / width).clamp(1, _top_code(bits))
    code = code.masked_fill(magnitude < least / 2, 0).nan_to_num(nan=1).to(torch.int16)
    code |= torch.signbit(tiles).to(torch.int16) << bits - 1
    return code.flatten(1)[:, : x.shape[1]]


def from_codes(codes: Tensor, minimum: Tensor, step: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values [rows, columns] of `to_codes`, computed in FP64 and limited to what `dtype` holds."""
    tiles = _tiled(codes)
    steps = (tiles & _top_code(bits)).to(torch.float64) - 1
    scale, least = step.to(torch.float64)[..., None], torch.exp2(minimum.to(torch.float64))[..., None]
    magnitude = (least * torch.exp2(scale * steps)).masked_fill(steps < 0, 0).clamp(max=torch.finfo(dtype).max)
    values = torch.where((tiles >> bits - 1) & 1 == 1, -magnitude, magnitude).to(dtype)
    return values.flatten(1)[:, : codes.shape[1]]


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., m] of `bits` bits -> uint8 [..., ceil(m * bits / 8)]: code i begins at bit i * bits, and bit b is
    bit b % 8 of byte b // 8."""
    count = codes.shape[-1]
    groups = -(-count // 8)  # eight codes are `bits` whole bytes
    grouped = F.pad(codes.to(torch.int32), (0, 8 * groups - count)).unflatten(-1, (groups, 8))
    stored = []
    for byte in range(bits):
        parts = [_shifted(grouped[..., i], 8 * byte - bits * i) for i in _overlapping(byte, bits)]
        stored.append(sum(parts[1:], parts[0]) & 0xFF)  # they share no bit
    packed = torch.stack(stored, dim=-1).to(torch.uint8).flatten(-2)
    return packed[..., : -(-count * bits // 8)].contiguous()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The int16 codes [..., count] that `pack_bits` packed. ValueError where the number of bytes is another."""
    expected = -(-count * bits // 8)
    if packed.dtype != torch.uint8 or packed.shape[-1] != expected:
        raise ValueError(
            f"{count} codes of {bits} bits are uint8 [..., {expected}], not {packed.dtype} {list(packed.shape)}"
        )
    groups = -(-count // 8)
    grouped = F.pad(packed.to(torch.int32), (0, bits * groups - expected)).unflatten(-1, (groups, bits))
    codes = []
    for i in range(8):
        touched = [byte for byte in range(bits) if i in _overlapping(byte, bits)]
        parts = [_shifted(grouped[..., byte], bits * i - 8 * byte) for byte in touched]
        codes.append(sum(parts[1:], parts[0]) & (1 << bits) - 1)
    return torch.stack(codes, dim=-1).to(torch.int16).flatten(-2)[..., :count].contiguous()


def _encoded(x: Tensor, bits: int, check: bool, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, minimum and step of x."""
    minimum, step = _grid(x, bits, check, name)
    return to_codes(x.detach(), minimum, step, bits), minimum, step


def _grid(x: Tensor, bits: int, check: bool, name: str) -> tuple[Tensor, Tensor]:
    """Minimum and step of x."""
    if bits not in LOGFMT_BITS:
        raise ValueError(f"LogFMT has {LOGFMT_BITS[0]} to {LOGFMT_BITS[-1]} bits, not {bits}")
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"tiles are of a float matrix; {name} is {x.dtype} with shape {list(x.shape)}")
    minimum, step = tile_grid(*extremes(x.detach()), bits)
    if check and not bool(torch.isfinite(minimum).all()):
        refuse_non_finite(x, name)
    return minimum, step


def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and smallest |x| that is not zero per tile of x [rows, columns] -> [rows, tiles]; 0 and 0 without one."""
    if not capability.on_cpu(x):
        return extremes_reference(x)
    largest, smallest = torch.empty(2, len(x), -(-x.shape[1] // TILE)).unbind()
    logfmt_numba.extremes(array(x.contiguous()), array(largest), array(smallest))
    return largest.to(x.dtype), smallest.to(x.dtype)


def extremes_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    magnitude = _tiled(x).abs()
    largest, smallest = magnitude.amax(-1), magnitude.masked_fill(magnitude == 0, torch.inf).amin(-1)
    return largest, smallest.masked_fill(largest == 0, 0)


def _tiled(matrix: Tensor) -> Tensor:
    """[rows, tiles, 128], zeros behind the last column."""
    tiles = -(-matrix.shape[1] // TILE)
    return F.pad(matrix, (0, tiles * TILE - matrix.shape[1])).unflatten(1, (tiles, TILE))


def _middle(step: Tensor) -> Tensor:
    """log2((1 + 2^step) / 2), from a form that keeps its digits for small steps; that of a step of 1 for none."""
    return torch.log1p(torch.expm1(torch.where(step == 0, 1, step) * math.log(2)) / 2) / math.log(2)


def _top_code(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def _overlapping(byte: int, bits: int) -> range:
    """Which of eight codes have bits in a byte of their group."""
    return range(8 * byte // bits, (8 * byte + 7) // bits + 1)


def _shifted(values: Tensor, right: int) -> Tensor:
    return values >> right if right >= 0 else values << -right
