"""A piece of a tensor: a range of its elements, counted row by row."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Elements start .. start + len(flat) of a tensor of `shape`."""

    flat: Tensor  # [n], contiguous
    start: int
    shape: tuple[int, ...]  # of the whole tensor
