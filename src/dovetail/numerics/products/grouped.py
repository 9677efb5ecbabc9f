"""Many small matrix products at once: experts' rows by experts' weights.

On a CPU with BF16 instructions they run in one call of `grouped_numba.grouped_gemm`; elsewhere as torch's grouped_mm,
or product by product, which is also the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.numerics import capability
from dovetail.numerics.cpu.kernels import array
from dovetail.numerics.products import grouped_numba

# Each new row count costs torch's CPU products 0.6-0.8 ms to set up (measured with torch 2.13): they get multiples
# of this many rows.
TORCH_ROW_MULTIPLE = 32


def row_multiple(rows: Tensor) -> int:
    """The products of such rows are fastest with multiples of this many per expert."""
    return 1 if capability.on_bf16_cpu(rows) else TORCH_ROW_MULTIPLE


def grouped_linear(rows: Tensor, weights: Tensor, offsets: Sequence[int]) -> Tensor:
    """rows [R, n_in] of expert e, offsets[e] : offsets[e + 1], times weights[e] [n_out, n_in] transposed -> [R, n_out].

    `weights` may be a transposed view: the gradient of the rows is grouped_linear(grad, weights.transpose(1, 2)).
    """
    if capability.on_bf16_cpu(rows, weights):
        output = rows.new_empty(rows.shape[0], weights.shape[1])
        starts, counts = bounds_of(offsets)
        experts = np.arange(len(starts))
        _multiply(
            (rows, weights.transpose(1, 2), output),
            (starts * rows.stride(0), experts * weights.stride(0), starts * output.stride(0)),
            (counts, weights.shape[1], weights.shape[2]),
        )
        return output
    if _is_aligned(rows.dtype, *weights.shape[1:]):
        return F.grouped_mm(rows, weights.transpose(1, 2), offs=_ends(offsets, rows))
    return grouped_linear_reference(rows, weights, offsets)


def grouped_outer(left: Tensor, right: Tensor, offsets: Sequence[int]) -> Tensor:
    """left [R, n]^T times right [R, m] for each expert's rows -> [E, n, m]; zero where an expert has none."""
    if capability.on_bf16_cpu(left, right):
        output = left.new_empty(len(offsets) - 1, left.shape[1], right.shape[1])
        starts, counts = bounds_of(offsets)
        _multiply(
            (left.t(), right, output),
            (starts * left.stride(0), starts * right.stride(0), np.arange(len(starts)) * output.stride(0)),
            (left.shape[1], right.shape[1], counts),
        )
        return output
    if _is_aligned(left.dtype, left.shape[1], right.shape[1]):
        return F.grouped_mm(left.t(), right, offs=_ends(offsets, left))
    return grouped_outer_reference(left, right, offsets)


def _multiply(
    operands: tuple[Tensor, Tensor, Tensor], starts: tuple[np.ndarray, ...], sizes: tuple[np.ndarray | int, ...]
) -> None:
    """Groups of a [., m, k], b [., k, n] and c [., m, n]: starts and sizes m, n, k of each, in elements."""
    a, b, out = operands
    (a_row, a_inner), (b_row, k_is_outer) = _row_stride(a), _row_stride(b)
    assert out.stride(-1) == 1
    grouped_numba.grouped_gemm(
        _flat(a),
        _flat(b),
        _flat(out),
        np.stack(starts, axis=1),
        np.stack([np.broadcast_to(size, len(starts[0])) for size in sizes], axis=1),
        np.array([a_row, b_row, out.stride(-2)]),
        a_inner,
        not k_is_outer,
        numba.get_num_threads(),
    )


def _row_stride(x: Tensor) -> tuple[int, bool]:
    """The stride between rows in memory, and whether these are x's rows (else x is a transposed view)."""
    if x.stride(-1) == 1:
        return x.stride(-2), True
    assert x.stride(-2) == 1, f"neither dimension is contiguous: shape {tuple(x.shape)}, strides {x.stride()}"
    return x.stride(-1), False


def _flat(x: Tensor) -> np.ndarray:
    """All memory from x's first element to the end of what it is a view of, as BF16 bits."""
    return array(x.as_strided((x.untyped_storage().nbytes() // 2 - x.storage_offset(),), (1,)))


def bounds_of(offsets: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """First row and number of rows of each group."""
    ends = np.asarray(offsets)
    return ends[:-1], np.diff(ends)


def _is_aligned(dtype: torch.dtype, *widths: int) -> bool:
    """Whether grouped_mm takes BF16 matrices with rows of these widths: it wants whole multiples of 16 bytes."""
    return dtype == torch.bfloat16 and all(width % 8 == 0 for width in widths)


def _ends(offsets: Sequence[int], rows: Tensor) -> Tensor:
    return torch.tensor(offsets[1:], dtype=torch.int32, device=rows.device)


def grouped_linear_reference(rows: Tensor, weights: Tensor, offsets: Sequence[int]) -> Tensor:
    bounds = zip(offsets, offsets[1:], weights, strict=False)
    return torch.cat([rows[start:stop] @ weight.t() for start, stop, weight in bounds])


def grouped_outer_reference(left: Tensor, right: Tensor, offsets: Sequence[int]) -> Tensor:
    bounds = zip(offsets, offsets[1:], strict=False)
    return torch.stack([left[start:stop].t() @ right[start:stop] for start, stop in bounds])
