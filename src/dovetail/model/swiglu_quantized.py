"""SwiGLU whose results leave quantised, as the products around it take them [V3 §3.3.3].

    forward   gate_up -> output                          the input of the down projection
    backward  grad of the output, gate_up -> grad of gate_up, and the output made again

Values are rounded to the input's dtype before they are quantised: the results are those of `swiglu` and `quantize` in
turn. Where gate_up was kept in FP8 for the backward pass it comes as `Quantized` and is BF16 after dequantisation.
On CUDA both run as one kernel (`swiglu_triton`), which reads and writes every value once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.model.swiglu import swiglu_backward_reference, swiglu_reference
from dovetail.numerics import gpu
from dovetail.numerics.quantize import Quantized, dequantize, quantize_reference

ROW = (1, 128)


def swiglu_quantized(
    gate_up: Tensor | Quantized,
    tile: tuple[int, int] = ROW,
    format: str = "e4m3",
    power_of_two: bool = False,
    check: bool = True,
) -> Quantized:
    """gate_up [R, 2 * width], gate first -> [R, width] in tiles. ValueError if that has NaN or infinity."""
    if gpu.takes(gate_up.data):
        from dovetail.model import swiglu_triton  # Triton comes with torch's CUDA builds only

        return swiglu_triton.swiglu_quantized(gate_up, tile, format, power_of_two, check)
    return swiglu_quantized_reference(gate_up, tile, format, power_of_two, check)


def swiglu_quantized_backward(
    grad: Tensor,
    gate_up: Tensor | Quantized,
    tile: tuple[int, int] = ROW,
    format: str = "e4m3",
    power_of_two: bool = False,
    check: bool = True,
) -> tuple[Quantized, Quantized]:
    """grad [R, width] -> the gradient of gate_up [R, 2 * width], and the output [R, width], both in tiles.

    Tiles may not hold gate and up: ValueError where tile[1] does not divide width.
    """
    check_halves(grad.shape[1], tile)
    if gpu.takes(grad):
        from dovetail.model import swiglu_triton

        return swiglu_triton.swiglu_quantized_backward(grad, gate_up, tile, format, power_of_two, check)
    return swiglu_quantized_backward_reference(grad, gate_up, tile, format, power_of_two, check)


def swiglu_quantized_reference(
    gate_up: Tensor | Quantized,
    tile: tuple[int, int] = ROW,
    format: str = "e4m3",
    power_of_two: bool = False,
    check: bool = True,
) -> Quantized:
    return quantize_reference(
        swiglu_reference(_plain(gate_up)), tile, format, power_of_two, check, "the output of a SwiGLU"
    )


def swiglu_quantized_backward_reference(
    grad: Tensor,
    gate_up: Tensor | Quantized,
    tile: tuple[int, int] = ROW,
    format: str = "e4m3",
    power_of_two: bool = False,
    check: bool = True,
) -> tuple[Quantized, Quantized]:
    gradient, output = swiglu_backward_reference(grad, _plain(gate_up))
    return (
        quantize_reference(gradient, tile, format, power_of_two, check, "the gradient of a SwiGLU"),
        quantize_reference(output, tile, format, power_of_two, check, "the output of a SwiGLU"),
    )


def check_halves(width: int, tile: tuple[int, int]) -> None:
    if width % tile[1]:
        raise ValueError(
            f"a SwiGLU of width {width} in tiles {list(tile)}: a tile would hold gate and up; take a width that"
            f" {tile[1]} divides, or quantise the result of swiglu_backward"
        )


def _plain(gate_up: Tensor | Quantized) -> Tensor:
    return dequantize(gate_up, torch.bfloat16) if isinstance(gate_up, Quantized) else gate_up
