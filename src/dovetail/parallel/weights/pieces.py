"""A piece of a tensor: a range of its elements, counted row by row.

    a tensor [4, 5] and its elements 3 .. 17, as rectangles:

    .  .  .  a  a      the end of row 0       at (0, 3), [1, 2]
    b  b  b  b  b      whole rows 1 and 2     at (1, 0), [2, 5]
    b  b  b  b  b
    c  c  .  .  .      the start of row 3     at (3, 0), [1, 2]

Of a tensor with N dims a range is at most 2 N - 1 rectangles: the row in which it begins and the one in which it ends
are ranges of tensors with N - 1 dims.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor

Span = tuple[int, int]  # the first element, and the one behind the last
Place = tuple[int, ...]  # of a rectangle's first element, along each dim of the whole tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Elements start .. start + len(flat) of a tensor of `shape`."""

    flat: Tensor  # [n], contiguous
    start: int
    shape: tuple[int, ...]  # of the whole tensor

    def __post_init__(self) -> None:
        assert self.flat.dim() == 1 and self.flat.is_contiguous(), (self.flat.shape, self.flat.stride())
        assert 0 <= self.start <= self.stop <= prod(self.shape), (self.span, self.shape)

    @property
    def stop(self) -> int:
        return self.start + self.flat.numel()

    @property
    def span(self) -> Span:
        return self.start, self.stop

    def part(self, span: Span) -> Piece:
        """These elements of the piece, which has them; a view of it."""
        return replace(self, flat=self.flat[span[0] - self.start : span[1] - self.start], start=span[0])


def rectangles(piece: Piece) -> dict[Place, Tensor]:
    """The rectangles that the piece consists of: views of `flat`, shaped, by their places.

    Of a tensor without elements it is the whole tensor, and of an empty piece of another one there is none.
    """
    if prod(piece.shape) == 0:
        return {(0,) * len(piece.shape): piece.flat.view(piece.shape)}
    found, at = dict[Place, Tensor](), 0
    for place, sizes in _cut(piece.span, piece.shape):
        found[place] = piece.flat[at : at + prod(sizes)].view(sizes)
        at += prod(sizes)
    return found


def _cut(span: Span, shape: tuple[int, ...]) -> Iterator[tuple[Place, tuple[int, ...]]]:
    """Places and sizes of the rectangles of a range, in the order of elements."""
    start, stop = span
    if start == stop:
        return
    if len(shape) < 2:
        yield (start,) * len(shape), (stop - start,) * len(shape)
        return
    row = prod(shape[1:])
    whole_from = min(stop, -(-start // row) * row)  # where the first whole row begins
    whole_to = max(whole_from, stop // row * row)
    for place, sizes in _cut((start % row, start % row + whole_from - start), shape[1:]):
        yield (start // row, *place), (1, *sizes)
    if whole_from < whole_to:
        yield (whole_from // row, *(0 for _ in shape[1:])), ((whole_to - whole_from) // row, *shape[1:])
    for place, sizes in _cut((0, stop - whole_to), shape[1:]):
        yield (whole_to // row, *place), (1, *sizes)


def first_gap(spans: Iterable[Span], size: int) -> Span | None:
    """The first of `size` elements that are in none of the spans, up to the next that is in one; None if all are."""
    reached = 0
    for start, stop in sorted(span for span in spans if span[0] < span[1]):
        if start > reached:
            return reached, start
        reached = max(reached, stop)
    return (reached, size) if reached < size else None
