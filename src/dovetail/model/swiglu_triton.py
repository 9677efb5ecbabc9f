"""`model.swiglu_quantized` as Triton kernels: SwiGLU forward and backward, quantised in registers.

    s         = 1 / (1 + e^-gate)
    output    = gate s up
    grad up   = grad gate s
    grad gate = grad up s (1 + gate (1 - s))

FP32 inside; each result is rounded to the input's dtype, and then to its tile's codes, as in the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail.model.swiglu_quantized import (
    ROW,
    check_halves,
    swiglu_quantized_backward_reference,
    swiglu_quantized_reference,
)
from dovetail.numerics.formats import float_format
from dovetail.numerics.quantize import Quantized
from dovetail.numerics.quantize_triton import codes_of, empty_quantized, tiles_per_program
from dovetail.numerics.rounding_triton import narrow, quantize_tiles, rounding, widen

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
ELEMENTS = 2048  # of the output in one program; the backward pass holds seven values for each


@triton.jit
def _load(  # type: ignore[no-untyped-def]
    x, scale, row, column, row_stride, column_stride, scale_row, inside, TILE: tl.constexpr
):
    """FP32 values of x; those of FP8 with scales of 1 x TILE as the BF16 they dequantise to."""
    values = widen(tl.load(x + row * row_stride + column * column_stride, mask=inside, other=0.0))
    if scale is not None:
        factor = tl.load(scale + row * scale_row + column // TILE, mask=inside, other=0.0)
        values = widen(narrow(values * factor, tl.bfloat16))
    return values


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    data,
    scale,
    values,
    row,
    column,
    row_stride,
    column_stride,
    inside,
    tile_row,
    tile_column,
    tiles_across,
    has_tile,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """Quantise values of DOWN x ACROSS tiles, and store them."""
    codes, factor = quantize_tiles(values, TILE_ROWS, TILE_COLUMNS, DOWN, ACROSS, ROUNDING)
    tl.store(data + row * row_stride + column * column_stride, codes, mask=inside)
    tl.store(scale + tile_row * tiles_across + tile_column, factor, mask=has_tile)


@triton.jit
def _swiglu(  # type: ignore[no-untyped-def]
    grad,
    gate_up,
    gate_up_scale,
    output,
    output_scale,
    gradient,
    gradient_scale,
    rows,
    width,
    grad_row,
    grad_column,
    gate_up_row,
    gate_up_column,
    gate_up_scale_row,
    output_row,
    output_column,
    gradient_row,
    gradient_column,
    GATE_UP_TILE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    DTYPE: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """DOWN x ACROSS tiles of the output, and where there is `grad` those of both halves of the gradient."""
    down, across = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = (down * (DOWN * TILE_ROWS) + tl.arange(0, DOWN * TILE_ROWS))[:, None]
    column = (across * (ACROSS * TILE_COLUMNS) + tl.arange(0, ACROSS * TILE_COLUMNS))[None, :]
    inside = (row < rows) & (column < width)
    tile_row = (down * DOWN + tl.arange(0, DOWN))[:, None]
    tile_column = (across * ACROSS + tl.arange(0, ACROSS))[None, :]
    tiles = tl.cdiv(width, TILE_COLUMNS)
    has_tile = (tile_row < tl.cdiv(rows, TILE_ROWS)) & (tile_column < tiles)
    strides = gate_up_row, gate_up_column, gate_up_scale_row
    gate = _load(gate_up, gate_up_scale, row, column, strides[0], strides[1], strides[2], inside, GATE_UP_TILE)
    up = _load(gate_up, gate_up_scale, row, column + width, strides[0], strides[1], strides[2], inside, GATE_UP_TILE)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    value = widen(narrow(silu * up, DTYPE))
    _store(
        output, output_scale, value, row, column, output_row, output_column, inside, tile_row, tile_column, tiles,
        has_tile, TILE_ROWS, TILE_COLUMNS, DOWN, ACROSS, ROUNDING,
    )  # fmt: skip
    if grad is not None:
        slope = widen(tl.load(grad + row * grad_row + column * grad_column, mask=inside, other=0.0))
        if grad.dtype.element_ty != DTYPE:
            slope = widen(narrow(slope, DTYPE))
        value = widen(narrow(slope * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), DTYPE))
        _store(
            gradient, gradient_scale, value, row, column, gradient_row, gradient_column, inside, tile_row, tile_column,
            2 * tiles, has_tile, TILE_ROWS, TILE_COLUMNS, DOWN, ACROSS, ROUNDING,
        )  # fmt: skip
        value = widen(narrow(slope * silu, DTYPE))
        _store(
            gradient, gradient_scale, value, row, column + width, gradient_row, gradient_column, inside, tile_row,
            tile_column + tiles, 2 * tiles, has_tile, TILE_ROWS, TILE_COLUMNS, DOWN, ACROSS, ROUNDING,
        )  # fmt: skip


def swiglu_quantized(
    gate_up: Tensor | Quantized,
    tile: tuple[int, int] = ROW,
    format: str = "e4m3",
    power_of_two: bool = False,
    check: bool = True,
) -> Quantized:
    output, _ = _run(None, gate_up, tile, format, power_of_two)
    if check and not bool(output.scale.isfinite().all()):
        swiglu_quantized_reference(gate_up, tile, format, power_of_two)  # says what is wrong
    return output


def swiglu_quantized_backward(
    grad: Tensor,
    gate_up: Tensor | Quantized,
    tile: tuple[int, int] = ROW,
    format: str = "e4m3",
    power_of_two: bool = False,
    check: bool = True,
) -> tuple[Quantized, Quantized]:
    check_halves(grad.shape[1], tile)
    output, gradient = _run(grad, gate_up, tile, format, power_of_two)
    if check and not all(bool(each.scale.isfinite().all()) for each in (output, gradient)):
        swiglu_quantized_backward_reference(grad, gate_up, tile, format, power_of_two)
    return gradient, output


def _run(
    grad: Tensor | None, gate_up: Tensor | Quantized, tile: tuple[int, int], format: str, power_of_two: bool
) -> tuple[Quantized, Quantized]:
    """The output, and the gradient (without rows where there is no `grad`)."""
    is_kept = isinstance(gate_up, Quantized)
    x = gate_up.data if isinstance(gate_up, Quantized) else gate_up
    dtype = torch.bfloat16 if is_kept else x.dtype
    rows, width = x.shape[0], x.shape[-1] // 2
    if x.shape != (rows, 2 * width) or dtype not in DTYPES or grad is not None and grad.shape != (rows, width):
        raise ValueError(
            f"the kernel takes [rows, 2 * width] in FP32, BF16 or FP16 and a gradient [rows, width], not {dtype}"
            f" {list(x.shape)} and {None if grad is None else list(grad.shape)}"
        )
    if isinstance(gate_up, Quantized) and (x.dtype not in FP8 or gate_up.tile[0] != 1):
        raise ValueError(f"the kernel takes what was kept as FP8 in tiles 1xN, not {x.dtype} in {list(gate_up.tile)}")
    output = empty_quantized((rows, width), tile, format, x.device)
    gradient = empty_quantized((rows if grad is not None else 0, 2 * width), tile, format, x.device)
    if not output.data.numel():
        return output, gradient
    kept_scale = gate_up.scale.contiguous() if isinstance(gate_up, Quantized) else None
    block = tiles_per_program(tile, ELEMENTS)
    grid = (triton.cdiv(output.scale.shape[0], block[0]), triton.cdiv(output.scale.shape[1], block[1]))
    _swiglu[grid](
        grad, x, kept_scale, codes_of(output), output.scale, codes_of(gradient), gradient.scale, rows, width,
        *((0, 0) if grad is None else grad.stride()), *x.stride(), 0 if kept_scale is None else kept_scale.shape[1],
        *output.data.stride(), *gradient.data.stride(), gate_up.tile[1] if isinstance(gate_up, Quantized) else 0,
        *tile, *block, DTYPES[dtype], rounding(float_format(format), power_of_two, x.device),
        num_warps=4 if tile[0] == 1 else 8,
    )  # fmt: skip
    return output, gradient
