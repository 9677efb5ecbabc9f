"""Pieces of tensors: the rectangles that they are, and checkpoints that are read in other pieces."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.parallel.pieces import Piece
from dovetail.train.run.checkpoint import Checkpointer, CheckpointError, load_checkpoint

Ranges = st.lists(st.integers(1, 5), max_size=4).flatmap(
    lambda shape: st.tuples(
        st.just(tuple(shape)),
        st.lists(st.integers(0, math.prod(shape)), min_size=2, max_size=2).map(sorted),
    )
)


def piece_of(whole: torch.Tensor, start: int, stop: int) -> Piece:
    return Piece(flat=whole.flatten()[start:stop].clone(), start=start, shape=tuple(whole.shape))


@given(Ranges)
@settings(deadline=None)
def test_rectangles_are_the_elements_of_the_range_in_order(drawn: tuple[tuple[int, ...], list[int]]) -> None:
    shape, (start, stop) = drawn
    whole = torch.arange(math.prod(shape)).view(shape)
    piece = piece_of(whole, start, stop)
    found = []
    for offsets, sizes in piece.rectangles():
        place = whole[tuple(slice(first, first + size) for first, size in zip(offsets, sizes, strict=True))]
        assert torch.equal(piece.rectangle_at(offsets), place)
        found += place.flatten().tolist()
    assert found == list(range(start, stop))
    assert len(piece.rectangles()) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_checkpoint_is_read_in_any_pieces(dtype: torch.dtype, tmp_path: Path) -> None:
    shapes = {"matrix": (7, 5), "experts": (4, 3, 5), "norm": (6,), "number": ()}
    state = {name: torch.randint(99, shape).to(dtype) for name, shape in shapes.items()}
    checkpointer = Checkpointer(tmp_path)
    path = checkpointer.save(1, {"all": state}).wait()
    checkpointer.close()
    for cut in (0.0, 0.3, 0.5, 1.0):
        wanted = {}
        for name, whole in state.items():
            middle = round(cut * whole.numel())
            empty = torch.zeros_like(whole)
            wanted[name] = [piece_of(empty, 0, middle), piece_of(empty, middle, whole.numel())]
        for side in (0, 1):
            load_checkpoint(path, {"all": {name: both[side] for name, both in wanted.items()}})
        for name, whole in state.items():
            assert torch.equal(torch.cat([each.flat for each in wanted[name]]), whole.flatten())


def test_a_gap_is_refused_by_name_and_leaves_nothing(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {"weight": piece_of(torch.ones(4, 4), 0, 15)})
    with pytest.raises(CheckpointError, match="15 of the 16 elements of weight"):
        checkpointer.wait()
    checkpointer.close()
    assert not list(tmp_path.iterdir())


def test_a_piece_of_another_shape_is_refused(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    path = checkpointer.save(1, {"weight": torch.ones(4, 4)}).wait()
    checkpointer.close()
    with pytest.raises(ValueError, match=r"weight is \[4, 4\] .* in the checkpoint and \[2, 8\]"):
        load_checkpoint(path, {"weight": piece_of(torch.ones(2, 8), 3, 9)})
