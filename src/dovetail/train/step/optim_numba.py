"""CPU kernels of `optim`: AdamW's update, and the sums of squares, of all parameters in one pass each.

One pass, because a model has dozens of parameters and most are small: threads that met once for each would wait for
each other longer than they work. A pass takes the addresses of tensors that have the same formats, and shares out
blocks of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numba import carray, prange, types
from numba.extending import intrinsic
from torch import Tensor

from dovetail.numerics.cpu.kernels import array, kernel
from dovetail.numerics.cpu.scalars_numba import load, store

BLOCK = 4096  # elements per piece of work; fixed, so that sums do not depend on the thread count
_ELEMENT = {torch.bfloat16: np.dtype(np.uint16), torch.float32: np.dtype(np.float32)}


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@kernel
def _update(formats, addresses, sizes, first_blocks, decays, scalars):  # type: ignore[no-untyped-def]
    """addresses [P, 5]: parameter, master, both moments, gradient of each; `formats`: their dtypes as empty arrays."""
    lr, inverse2, scale = scalars[0], scalars[1], scalars[2]
    beta1, beta2, eps, rest1, rest2 = scalars[3], scalars[4], scalars[5], scalars[6], scalars[7]
    for block in prange(first_blocks[-1]):
        at = np.searchsorted(first_blocks, block, side="right") - 1
        start = (block - first_blocks[at]) * BLOCK
        count = min(BLOCK, sizes[at] - start)
        where, decay = addresses[at], decays[at]
        p = carray(_pointer(where[0] + start * formats[0].itemsize), (count,), formats[0].dtype)
        w = carray(_pointer(where[1] + start * formats[1].itemsize), (count,), formats[1].dtype)
        m = carray(_pointer(where[2] + start * formats[2].itemsize), (count,), formats[2].dtype)
        v = carray(_pointer(where[3] + start * formats[3].itemsize), (count,), formats[3].dtype)
        g = carray(_pointer(where[4] + start * formats[4].itemsize), (count,), formats[4].dtype)
        for i in range(count):
            x = load(g, i) * scale
            a = beta1 * load(m, i) + rest1 * x
            b = beta2 * load(v, i) + rest2 * x * x
            value = w[i] - w[i] * decay - lr * a / (np.sqrt(b * inverse2) + eps)
            store(m, i, a)
            store(v, i, b)
            w[i] = value
            store(p, i, value)


@kernel
def _sums_of_squares(format, addresses, sizes, first_blocks, partial):  # type: ignore[no-untyped-def]
    for block in prange(first_blocks[-1]):
        at = np.searchsorted(first_blocks, block, side="right") - 1
        start = (block - first_blocks[at]) * BLOCK
        count = min(BLOCK, sizes[at] - start)
        values = carray(_pointer(addresses[at] + start * format.itemsize), (count,), format.dtype)
        total = np.float32(0.0)
        for i in range(count):
            x = load(values, i)
            total += x * x
        partial[block] = total


def update(
    written: Sequence[Sequence[Tensor]], gradients: Sequence[Tensor], decays: Sequence[float], factors: Sequence[float]
) -> None:
    """Update parameters that have the same formats.

    written: parameter, master, both moments of each, contiguous. decays: learning rate * weight decay of each.
    factors: learning rate / (1 - b1^t), 1 / (1 - b2^t), gradient scale; beta1, beta2, eps.
    """
    beta1, beta2 = factors[3:5]
    rest = 1.0 - beta1, 1.0 - beta2  # in FP64: in FP32, 1 - 0.999 is wrong by 5e-5 of itself
    gradients = [gradient.contiguous() for gradient in gradients]  # named, so that copies live as long as the pass
    rows = [(*tensors, gradient) for tensors, gradient in zip(written, gradients, strict=True)]
    _update(
        tuple(_format(tensor) for tensor in rows[0]),
        np.array([[tensor.data_ptr() for tensor in row] for row in rows]),
        *_shares(gradients),
        np.array(decays, dtype=np.float32),
        np.array([*factors, *rest], dtype=np.float32),
    )


def sums_of_squares(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of tensors of one format, each FP32 within a block and FP64 across."""
    tensors = [tensor.contiguous() for tensor in tensors]
    sizes, first_blocks = _shares(tensors)
    partial = torch.empty(int(first_blocks[-1]), dtype=torch.float32)
    addresses = np.array([tensor.data_ptr() for tensor in tensors])
    _sums_of_squares(_format(tensors[0]), addresses, sizes, first_blocks, array(partial))
    return [part.double().sum() for part in partial.split(np.diff(first_blocks).tolist())]


def _shares(tensors: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Elements of each, and the number of its first block; one more entry has the number of all blocks."""
    sizes = [tensor.numel() for tensor in tensors]
    return np.array(sizes), np.array([0, *accumulate(-(-size // BLOCK) for size in sizes)])


def _format(tensor: Tensor) -> np.ndarray:
    return np.empty(0, _ELEMENT[tensor.dtype])
