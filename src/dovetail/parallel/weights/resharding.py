"""Who writes which elements of a checkpoint, and its reading into pieces of any other cutting.

Ranks hold tensors of the same names, whole or in pieces, some elements more than once:

    rank 0   a a a a a a . . . . . .         writes 0 to 5
    rank 1   . . . . b b b b b . . .         writes 6 to 8
    rank 2   . . . . . . . . . c c c         writes 9 to 11

`Holders` is what all ranks say that they hold. `share` chooses a writer for each element, and `gap` names what nobody
holds. `SavePlanner` and `LoadPlanner` then speak of rectangles to torch.distributed.checkpoint, which stores where each
lies in the whole tensor and cuts them anew at loading. They override what that library offers for it
(`create_local_plan`, `lookup_object`, `lookup_tensor`) and call nothing private of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from dovetail.parallel.weights.pieces import Piece, Place, Span, first_gap, rectangles

Leaf = Tensor | Piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a rank has of a tensor."""

    shape: tuple[int, ...]  # of the whole tensor
    dtype: torch.dtype
    span: Span

    def __str__(self) -> str:
        return _described(self.dtype, self.shape)


Holders = dict[str, dict[int, Held]]  # by the tensor's name and the rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Rectangles of a tensor that lie here."""

    shape: tuple[int, ...]  # of the whole tensor
    views: dict[Place, Tensor]


def held(leaves: Mapping[str, Leaf]) -> dict[str, Held]:
    return {
        name: Held(shape=leaf.shape, dtype=leaf.flat.dtype, span=leaf.span)
        if isinstance(leaf, Piece)
        else Held(shape=tuple(leaf.shape), dtype=leaf.dtype, span=(0, leaf.numel()))
        for name, leaf in leaves.items()
    }


def holders_of(by_rank: Sequence[Mapping[str, Held]]) -> Holders:
    """What all ranks hold, by name. Raises ValueError where a tensor has another shape or dtype on another rank."""
    holders: Holders = {}
    for rank, tensors in enumerate(by_rank):
        for name, here in tensors.items():
            first, there = next(iter(holders.setdefault(name, {rank: here}).items()))
            if (here.shape, here.dtype) != (there.shape, there.dtype):
                raise ValueError(f"{name} is {there} on rank {first} and {here} on rank {rank}")
            holders[name][rank] = here
    return holders


def gap(holders: Holders) -> str | None:
    """What no rank holds of a tensor, in words; None if all tensors are whole on all ranks together."""
    for name, ranks in holders.items():
        whole = next(iter(ranks.values()))
        missing = first_gap((each.span for each in ranks.values()), prod(whole.shape))
        if missing is not None:
            return f"no rank holds {_elements(missing)} of {name}, {whole}"
    return None


def stored_gap(tensors: Mapping[str, TensorStorageMetadata]) -> str | None:
    """What a checkpoint lacks of a tensor that is in it, in words; None if it lacks nothing."""
    for name, tensor in tensors.items():
        starts = [_start(chunk.offsets, tensor.size) for chunk in tensor.chunks]
        lengths = [prod(chunk.sizes) for chunk in tensor.chunks]
        spans = [(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        missing = first_gap(spans, prod(tensor.size))
        if missing is not None:
            return f"{_elements(missing)} of {name}, {_described(tensor.properties.dtype, tensor.size)}, are not in it"
    return None


def misfit(holders: Holders, stored: Mapping[str, TensorStorageMetadata], partial: bool) -> str | None:
    """Why a checkpoint is not for these holders, in words, or None. With `partial` they need not take all of it."""
    surplus = set() if partial else stored.keys() - holders.keys()
    for names, where in ((holders.keys() - stored.keys(), "the checkpoint"), (surplus, "the state")):
        if names:
            some = ", ".join(sorted(names)[:3])
            return f"{len(names)} tensors are not in {where}: {some}; was the model changed?"
    for name, here in summary(holders).items():
        there = _described(stored[name].properties.dtype, stored[name].size)
        if here != there:
            return f"{name} is {there} in the checkpoint and {here} in the state"
    return None if partial else gap(holders)


def summary(holders: Holders) -> dict[str, str]:
    """Dtype and shape of each tensor, such as "float32 [7, 5]"."""
    return {name: str(next(iter(ranks.values()))) for name, ranks in holders.items()}


def _described(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _elements(span: Span) -> str:
    return f"elements {span[0]} to {span[1] - 1}"


def _start(place: Sequence[int], shape: Sequence[int]) -> int:
    """The number of an element, counted row by row."""
    number = 0
    for index, size in zip(place, shape, strict=True):
        number = number * size + index
    return number


def share(holders: Holders, num_ranks: int) -> list[dict[str, Span]]:
    """What each rank writes, so that each element is written once; there must be no `gap`.

    Of those who hold an element, the rank writes it that has the fewest bytes to write so far.
    """
    shares: list[dict[str, Span]] = [{} for _ in range(num_ranks)]
    load = [0] * num_ranks  # bytes
    for name, ranks in holders.items():
        whole = next(iter(ranks.values()))
        waiting = sorted(((*each.span, rank) for rank, each in ranks.items()), reverse=True)
        reached, size, candidates = 0, prod(whole.shape), list[tuple[int, int, int]]()
        if size == 0:
            shares[waiting[-1][2]][name] = (0, 0)
        while reached < size:
            while waiting and waiting[-1][0] <= reached:
                candidates.append(waiting.pop())
            candidates = [each for each in candidates if each[1] > reached]
            _, stop, rank = min(candidates, key=lambda each: load[each[2]])
            shares[rank][name] = (reached, stop)
            load[rank] += (stop - reached) * whole.dtype.itemsize
            reached = stop
    return shares


def cut(leaf: Leaf, span: Span | None = None) -> Cut:
    """The rectangles of a leaf, or of these elements of it; views, but for a part of a tensor that lies in strides."""
    if isinstance(leaf, Tensor):
        if span is None or span == (0, leaf.numel()):
            return Cut(shape=tuple(leaf.shape), views={(0,) * leaf.dim(): leaf})
        leaf = Piece(flat=leaf.reshape(-1), start=0, shape=tuple(leaf.shape))
    return Cut(shape=leaf.shape, views=rectangles(leaf if span is None else leaf.part(span)))


class SavePlanner(DefaultSavePlanner):
    """Of a state dict of `Cut`s."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    index=MetadataIndex(name, place),
                    type=WriteItemType.SHARD,
                    tensor_data=_write_data(each, place),
                )
                for name, each in self.state_dict.items()
                for place in each.views
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return _view(self.state_dict, index)


class LoadPlanner(DefaultLoadPlanner):
    """Of a state dict of `Cut`s, which are filled in place."""

    def set_up_planner(
        self, state_dict: dict[str, Cut], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata = state_dict, metadata

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, each in self.state_dict.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata), name
            chunks = [_chunk(place, view) for place, view in each.views.items()]
            items += create_read_items_for_chunk_list(name, stored, chunks)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return _view(self.state_dict, index)


def _write_data(whole: Cut, place: Place) -> TensorWriteData:
    view = whole.views[place]
    properties = TensorProperties.create_from_tensor(view)
    return TensorWriteData(chunk=_chunk(place, view), properties=properties, size=torch.Size(whole.shape))


def _chunk(place: Place, view: Tensor) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(place), sizes=view.shape)


def _view(cuts: Mapping[str, Cut], index: MetadataIndex) -> Tensor:
    assert index.offset is not None
    return cuts[index.fqn].views[tuple(index.offset)]
