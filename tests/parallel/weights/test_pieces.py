"""A range of a tensor's elements as rectangles, against marks in the whole tensor."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dovetail.parallel.weights.pieces import Piece, Span, first_gap, rectangles

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def pieces(draw: st.DrawFn) -> Piece:
    shape = draw(SHAPES)
    start, stop = sorted(draw(st.tuples(st.integers(0, prod(shape)), st.integers(0, prod(shape)))))
    return Piece(flat=torch.arange(start, stop), start=start, shape=shape)


def marked(piece: Piece, views: dict[tuple[int, ...], Tensor]) -> Tensor:
    """The whole tensor with the elements of the rectangles in place, and -1 elsewhere; flat."""
    whole = torch.full(piece.shape, -1)
    for place, view in views.items():
        where = whole[tuple(slice(at, at + size) for at, size in zip(place, view.shape, strict=True))]
        assert where.shape == view.shape and bool((where == -1).all())  # inside, and nothing twice
        where.copy_(view)
    return whole.flatten()


def expected(piece: Piece) -> Tensor:
    whole = torch.full((prod(piece.shape),), -1)
    whole[piece.start : piece.stop] = piece.flat
    return whole


@given(pieces())
def test_rectangles_are_the_range(piece: Piece) -> None:
    views = rectangles(piece)
    assert torch.equal(marked(piece, views), expected(piece))
    assert len(views) <= max(1, 2 * len(piece.shape) - 1)
    assert all(each.numel() > 0 for each in views.values()) or prod(piece.shape) == 0
    for view in views.values():
        view.fill_(-5)
    assert bool((piece.flat == -5).all())  # they are views


def test_the_picture() -> None:
    views = rectangles(Piece(flat=torch.arange(3, 17), start=3, shape=(4, 5)))
    assert {place: tuple(view.shape) for place, view in views.items()} == {
        (0, 3): (1, 2),
        (1, 0): (2, 5),
        (3, 0): (1, 2),
    }
    assert {place: tuple(view.shape) for place, view in rectangles(whole_of((4, 5))).items()} == {(0, 0): (4, 5)}
    assert rectangles(Piece(flat=torch.zeros(0), start=7, shape=(4, 5))) == {}
    assert [view.shape for view in rectangles(whole_of(())).values()] == [()]
    assert {place: view.shape for place, view in rectangles(whole_of((0, 3))).items()} == {(0, 0): (0, 3)}


def whole_of(shape: tuple[int, ...]) -> Piece:
    return Piece(flat=torch.zeros(prod(shape)), start=0, shape=shape)


def test_a_wrong_rectangle_is_seen() -> None:
    piece = Piece(flat=torch.arange(3, 17), start=3, shape=(4, 5))
    views = rectangles(piece)
    views[3, 1] = views.pop((3, 0))
    assert not torch.equal(marked(piece, views), expected(piece))


def test_a_part_of_a_piece() -> None:
    piece = Piece(flat=torch.arange(3, 17), start=3, shape=(4, 5))
    part = piece.part((6, 11))
    assert part.span == (6, 11) and part.shape == (4, 5)
    assert part.flat.tolist() == [6, 7, 8, 9, 10]
    assert part.flat.data_ptr() == piece.flat[3:].data_ptr()


@pytest.mark.parametrize(
    ("flat", "start"),
    [(torch.zeros(3), 18), (torch.zeros(3), -1), (torch.zeros(1, 3), 0), (torch.zeros(6)[::2], 0)],
    ids=["behind the end", "before the start", "two dims", "strided"],
)
def test_what_is_no_piece(flat: Tensor, start: int) -> None:
    with pytest.raises(AssertionError):
        Piece(flat=flat, start=start, shape=(4, 5))


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)).map(sorted).map(tuple)), st.integers(0, 12))
def test_the_first_gap(spans: list[Span], size: int) -> None:
    spans = [(start, stop) for start, stop in spans if stop <= size]
    free = [not any(start <= element < stop for start, stop in spans) for element in range(size)]
    found = first_gap(spans, size)
    if not any(free):
        assert found is None
    else:
        assert found is not None
        start, stop = found
        assert start == free.index(True) and all(free[start:stop])
        assert stop == size or not free[stop]
