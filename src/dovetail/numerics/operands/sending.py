"""Rounds a matrix as if it had been sent in a narrow format.

Its gradient is passed back as it is.

This simulates the combine of expert outputs, which V3 leaves in BF16; the ISCA paper's study quantised the outputs of
residual branches so [ISCA §3.2].
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from dovetail.numerics.formats.logfmt import round_to_logfmt
from dovetail.numerics.formats.quantize import dequantize
from dovetail.numerics.formats.quantized import LOGFMT_BITS
from dovetail.numerics.operands.operands import quantize_rows
from dovetail.spec.precision import Quantization

_LOGFMT = re.compile(r"logfmt-([0-9]+)")


def check_sent_format(name: str) -> None:
    """Raises `ValueError` for what is neither logfmt-N nor a format that tiles are scaled to."""
    match = _LOGFMT.fullmatch(name)
    if match is None and name.lower().startswith("logfmt") or match is not None and int(match[1]) not in LOGFMT_BITS:
        first, last = LOGFMT_BITS[0], LOGFMT_BITS[-1]
        raise ValueError(f"expert_output {name!r}: LogFMT has {first} to {last} bits, logfmt-8 for one")
    if match is None:
        Quantization(format=name)


def sent(x: Tensor, name: str) -> Tensor:
    """x [R, C] as it arrives: in tiles of 1x128, `name` being logfmt-4 to logfmt-12, or eXmY with a scale per tile."""
    received: Tensor = _Sent.apply(x, name)
    return received


class _Sent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        match = _LOGFMT.fullmatch(name)
        if match is not None:
            return round_to_logfmt(x, int(match[1]), check=False)
        return dequantize(quantize_rows(x.contiguous(), Quantization(format=name)), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
