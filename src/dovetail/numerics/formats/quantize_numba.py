"""CPU kernels of `quantize.dequantize`, for tiles 1x128.

What layers keep for their backward pass comes back in one pass over it, bit for bit as the reference has it."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from dovetail.numerics.cpu.kernels import array, exact_kernel
from dovetail.numerics.cpu.scalars_numba import store
from dovetail.numerics.formats.quantized import ROW_TILE, TILE, Quantized, codes_of
from dovetail.numerics.formats.rounding_numba import form_of, value_of


@exact_kernel
def _decode(codes, row_scales, form, out):  # type: ignore[no-untyped-def]
    """out [R, C], FP32 or BF16 bits, rounded once, from codes [R, C] uint8."""
    width = codes.shape[1]
    for r in prange(codes.shape[0]):
        for block in range(row_scales.shape[1]):
            begin, end = block * TILE, min((block + 1) * TILE, width)
            source, target, scale = codes[r, begin:end], out[r, begin:end], row_scales[r, block]
            for c in range(len(source)):
                store(target, c, value_of(source[c], form) * scale)


@exact_kernel
def _decode_packed(packed, row_scales, form, out):  # type: ignore[no-untyped-def]
    """The same from E5M6 packed [R, 12 ceil(C / 8)]."""
    width = out.shape[1]
    for r in prange(out.shape[0]):
        for group in range((width + 7) // 8):
            words = np.zeros(3, np.int64)
            for byte in range(12):
                words[byte // 4] |= np.int64(packed[r, group * 12 + byte]) << (8 * (byte % 4))
            high, low = words[0] << 32 | words[1], words[1] << 32 | words[2]
            scale = row_scales[r, group * 8 // TILE]
            target = out[r, group * 8 : min(group * 8 + 8, width)]
            for i in range(len(target)):
                code = high >> (52 - 12 * i) if i < 5 else low >> (84 - 12 * i)
                store(target, i, value_of(np.int32(code & 0xFFF), form) * scale)


def reads(quantized: Quantized, dtype: torch.dtype) -> bool:
    """Whether `dequantize` does: codes of a byte, or E5M6 packed, in tiles 1x128, to FP32 or BF16."""
    parts = quantized.data, quantized.scale
    is_laid_out = quantized.tile == ROW_TILE and all(part.ndim == 2 and part.is_contiguous() for part in parts)
    is_read = form_of(quantized.format) is not None and quantized.data.element_size() == 1
    dtypes = quantized.scale.dtype == torch.float32, dtype in (torch.float32, torch.bfloat16)
    return is_laid_out and is_read and all(dtypes)


def dequantize(quantized: Quantized, dtype: torch.dtype) -> Tensor:
    out = torch.empty(quantized.shape, dtype=dtype)
    kernel = _decode if quantized.columns is None else _decode_packed
    kernel(array(codes_of(quantized)), array(quantized.scale), form_of(quantized.format), array(out))
    return out
