"""The path of rows from their token's rank to where they are needed, and home again.

It is a list of legs. Outwards a leg copies rows (`Sort`) or sends them to other ranks (`Wire`); homewards it sums the
copies in FP32, rounded once, or sends them back. So each direction is the other's gradient:

    backward of dispatch  = the way home of the gradients, as combine
    backward of combine   = the way out of the gradients, as dispatch
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.model.experts.moe import Places, gather, summed
from dovetail.parallel.wire import Wire, decode, encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Sort:
    """Copies on this rank: each row to its places."""

    places: Places

    def out(self, rows: Tensor) -> Tensor:
        """Bytes of rows [N, width] -> those of all copies [M, width]."""
        return gather(rows, self.places.token_ids)

    def home(self, rows: Tensor) -> Tensor:
        """A row for each copy [M, columns] -> their sums [N, columns]."""
        return summed(rows, self.places.row_ids)


Path = Sequence[Sort | Wire]


def carried(path: Path, rows: Tensor) -> Tensor:
    """Bytes of rows [N, width] at the other end of the path [M, width]."""
    for leg in path:
        rows = leg.out(rows)
    return rows


def out(path: Path, rows: Tensor) -> Tensor:
    """Rows [N, columns] -> [M, columns]; the gradient comes home."""
    return _Out.apply(rows, path)


def home(path: Path, rows: Tensor) -> Tensor:
    """Rows [M, columns] -> sums [N, columns]; the gradient goes out."""
    return _Home.apply(rows, path)


def arrived(path: Path, start: Tensor, end: Tensor) -> Tensor:
    """`end`, which is what came of `start` by the path before: its gradient comes home to `start`."""
    return _Arrived.apply(start, end, path)


def _out(path: Path, rows: Tensor) -> Tensor:
    return decode(carried(path, encode(rows)), rows.dtype)


def _home(path: Path, rows: Tensor) -> Tensor:
    for leg in reversed(path):
        rows = leg.home(rows)
    return rows


class _Out(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, path: Path) -> Tensor:
        ctx.path = path
        return _out(path, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _home(ctx.path, grad), None


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, path: Path) -> Tensor:
        ctx.path = path
        return _home(path, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _out(ctx.path, grad), None


class _Arrived(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, start: Tensor, end: Tensor, path: Path) -> Tensor:
        ctx.path = path
        return end.view_as(end)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _home(ctx.path, grad), None, None
