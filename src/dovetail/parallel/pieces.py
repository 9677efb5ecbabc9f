"""A piece of a weight, or of what an optimizer keeps of it: some of its elements, counted row by row.

Where several ranks share a weight out, each has one piece. A checkpoint takes a piece wherever it takes a tensor, and
stores it as rectangles of the whole tensor, under the whole one's name and shape. So no layout is stored, and any
other cutting reads what it needs.

    elements 5 .. 13 of [4, 4]      . . . .
                                    . 1 1 1     1: the rest of a row
                                    2 2 2 2     2: whole rows
                                    3 3 . .     3: the beginning of a row
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Elements start .. start + n - 1 of a tensor of `shape`."""

    flat: Tensor  # [n], contiguous
    start: int
    shape: Sizes  # of the whole tensor

    def rectangles(self) -> list[tuple[Sizes, Sizes]]:
        """Their places in the whole and their sizes, in the order of `flat`."""
        return list(_rectangles(self.shape, self.start, self.start + len(self.flat)))

    def rectangle_at(self, offsets: Sequence[int]) -> Tensor:
        """The one that begins there, as a view."""
        begin = 0
        for place, sizes in self.rectangles():
            end = begin + math.prod(sizes)
            if place == tuple(offsets):
                return self.flat[begin:end].view(sizes)
            begin = end
        raise ValueError(f"no rectangle begins at {offsets}")

    # What torch.distributed.checkpoint asks of a tensor that is not whole. DTensor answers to the same names, which
    # torch does not document (2.11 to 2.13).

    def size(self) -> torch.Size:
        return torch.Size(self.shape)

    def __create_write_items__(self, name: str, piece: Piece) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.flat)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
            for offsets, sizes in self.rectangles()
        ]


def _rectangles(shape: Sizes, start: int, stop: int) -> Iterator[tuple[Sizes, Sizes]]:
    if start >= stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
        yield from _within(shape, first - 1, start, stop)
        return
    yield from _within(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _within(shape, last, last * row, stop)


def _within(shape: Sizes, index: int, start: int, stop: int) -> Iterator[tuple[Sizes, Sizes]]:
    """Those of a part of one row."""
    before = index * math.prod(shape[1:])
    for offsets, sizes in _rectangles(shape[1:], start - before, stop - before):
        yield (index, *offsets), (1, *sizes)
