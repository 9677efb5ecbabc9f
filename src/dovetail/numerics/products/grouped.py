"""The three products of a linear layer in BF16 or FP32, for all groups (experts) at once.

    fprop   rows [R, K], weight [G, N, K]   -> [R, N]        rows weight^T
    dgrad   grad [R, N], weight [G, N, K]   -> [R, K]        grad weight
    wgrad   grad [R, N], rows [R, K]        -> [G, N, K]     grad^T rows

Rows offsets[g] : offsets[g + 1] belong to group g. `scaled` has the same three for quantised operands.

    a CPU with AVX-512 BF16    `grouped_numba.fprop`, `grouped_numba.wgrad`, with AMX tiles where there are any
    BF16 elsewhere             torch's grouped_mm
    the rest                   `fprop_reference`, `wgrad_reference`: product by product

dgrad is fprop with the transposed weight on every path.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.numerics import capability
from dovetail.numerics.products import grouped_numba

# Each new row count costs torch's CPU products 0.6-0.8 ms to set up (measured with torch 2.13): they get multiples
# of this many rows.
TORCH_ROW_MULTIPLE = 32


def row_multiple(rows: Tensor) -> int:
    """The products of such rows are fastest with multiples of this many per expert."""
    return 1 if capability.multiplies_bf16(rows) else TORCH_ROW_MULTIPLE


def fprop(rows: Tensor, weight: Tensor, offsets: Sequence[int]) -> Tensor:
    """Each group's rows by its weight transposed. `weight` may be a transposed view."""
    if capability.multiplies_bf16(rows, weight):
        return grouped_numba.fprop(rows, weight, offsets)
    if _is_aligned(rows.dtype, *weight.shape[1:]):
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=_ends(offsets, rows))
    return fprop_reference(rows, weight, offsets)


def dgrad(grad: Tensor, weight: Tensor, offsets: Sequence[int]) -> Tensor:
    """Each group's rows of the gradient by its weight."""
    return fprop(grad, weight.transpose(1, 2), offsets)


def wgrad(grad: Tensor, rows: Tensor, offsets: Sequence[int]) -> Tensor:
    """Each group's gradient transposed by its rows; zero where a group has none."""
    if capability.multiplies_bf16(grad, rows):
        return grouped_numba.wgrad(grad, rows, offsets)
    if _is_aligned(grad.dtype, grad.shape[1], rows.shape[1]):
        return F.grouped_mm(grad.t(), rows, offs=_ends(offsets, grad))
    return wgrad_reference(grad, rows, offsets)


def fprop_reference(rows: Tensor, weight: Tensor, offsets: Sequence[int]) -> Tensor:
    groups = zip(pairwise(offsets), weight, strict=True)
    return torch.cat([rows[start:stop] @ each.t() for (start, stop), each in groups])


def wgrad_reference(grad: Tensor, rows: Tensor, offsets: Sequence[int]) -> Tensor:
    return torch.stack([grad[start:stop].t() @ rows[start:stop] for start, stop in pairwise(offsets)])


def _is_aligned(dtype: torch.dtype, *widths: int) -> bool:
    """Whether grouped_mm takes BF16 matrices with rows of these widths: it wants whole multiples of 16 bytes."""
    return dtype == torch.bfloat16 and all(width % 8 == 0 for width in widths)


def _ends(offsets: Sequence[int], rows: Tensor) -> Tensor:
    return torch.tensor(offsets[1:], dtype=torch.int32, device=rows.device)
