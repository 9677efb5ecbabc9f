"""The path of rows from their token's rank to where they are needed, and home again.

It is a list of legs. Outwards a leg copies rows (`Sort`) or sends them to other ranks (`Wire`); homewards it sums the
copies in FP32, rounded once, or sends them back. So each direction is the other's gradient:

    backward of dispatch  = the way home of the gradients, as combine
    backward of combine   = the way out of the gradients, as dispatch

Each of these four ways has its format on the wires (`parallel.experts.formats`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.model.experts.moe import Places, gather, summed
from dovetail.parallel.experts.formats import PLAIN, Format, Formats
from dovetail.parallel.experts.wire import Wire


@dataclass(frozen=True, slots=True, kw_only=True)
class Sort:
    """Copies on this rank: each row to its places."""

    places: Places

    def out(self, rows: Tensor, operation: str) -> Tensor:
        """Bytes of rows [N, width] -> those of all copies [M, width]."""
        return gather(rows, self.places.token_ids)

    def home(self, rows: Tensor, format: Format, operation: str) -> Tensor:
        """A row for each copy [M, columns] -> their sums [N, columns]."""
        return summed(rows, self.places.row_ids)


Path = Sequence[Sort | Wire]


def carried(path: Path, rows: Tensor, operation: str = "dispatch") -> Tensor:
    """Bytes of rows [N, width] at the other end of the path [M, width]."""
    for leg in path:
        rows = leg.out(rows, operation)
    return rows


def home(path: Path, rows: Tensor, formats: Formats) -> Tensor:
    """Rows [M, columns] -> sums [N, columns]; the gradient goes out."""
    return _Home.apply(rows, path, formats)


def arrived(path: Path, start: Tensor, end: Tensor) -> Tensor:
    """`end`, which is what came of `start` by the path before: its gradient comes home to `start`."""
    return _Arrived.apply(start, end, path)


def _home(path: Path, rows: Tensor, format: Format, operation: str) -> Tensor:
    for leg in reversed(path):
        rows = leg.home(rows, format, operation)
    return rows


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, path: Path, formats: Formats) -> Tensor:
        ctx.path, ctx.format = path, formats.out_gradient
        return _home(path, rows, formats.back, "combine")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        sent = carried(ctx.path, ctx.format.encode(grad), "gradients of combine")
        return ctx.format.decode(sent, grad.shape[1], grad.dtype), None, None


class _Arrived(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, start: Tensor, end: Tensor, path: Path) -> Tensor:
        ctx.path = path
        return end.view_as(end)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _home(ctx.path, grad, PLAIN, "gradients of dispatch"), None, None
