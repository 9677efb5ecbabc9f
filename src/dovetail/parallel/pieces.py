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
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

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


class SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        found = _at(self.state_dict, index)
        return super().lookup_object(index) if found is None else found

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Raises ValueError, on the first rank and through it on all, for a tensor of which no rank has some part."""
        found = defaultdict[str, dict[torch.Size, int]](dict)
        sizes: dict[str, torch.Size] = {}
        for item in (item for plan in all_plans for item in plan.items):
            assert item.tensor_data is not None
            sizes[item.index.fqn] = item.tensor_data.size
            found[item.index.fqn][item.tensor_data.chunk.offsets] = item.tensor_data.chunk.sizes.numel()
        for name, size in sizes.items():
            if (count := sum(found[name].values())) != size.numel():
                raise ValueError(f"the ranks together have {count} of the {size.numel()} elements of {name}")
        return super().create_global_plan(all_plans)


class LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """As it is: flat already, which the default would see to, and with pieces, which it would not keep."""
        self.state_dict, self.original_state_dict = state_dict, state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        found = _at(self.state_dict, index)
        return super().lookup_tensor(index) if found is None else found


def _at(state: Mapping[str, Any], index: MetadataIndex) -> Tensor | None:
    """The rectangle of a piece that begins there; None of a tensor."""
    leaf = state[index.fqn]
    return leaf.rectangle_at(index.offset or ()) if isinstance(leaf, Piece) else None


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
