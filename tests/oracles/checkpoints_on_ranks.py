"""What ranks do in the tests of checkpoints: each saves and loads its own part of one state, in pieces or whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing, nullcontext
from math import prod
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from dovetail.parallel.weights.pieces import Piece, Span
from dovetail.train.run.checkpoint import Checkpointer, CheckpointError, load_checkpoint

Cutting = list[dict[str, Span | None]]  # of each rank: the elements that it holds of a tensor; None for a whole tensor
State = dict[str, Tensor | Piece]

SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "optimizer.master.norm": ((37,), torch.float32),
    "optimizer.master.up": ((9, 11), torch.float32),
    "optimizer.moment1.up": ((9, 11), torch.bfloat16),
    "optimizer.moment1.experts": ((6, 5, 7), torch.bfloat16),
    "buffers.loads": ((8, 4, 3), torch.int64),
    "buffers.bias": ((1, 13), torch.float32),
    "buffers.count": ((), torch.int64),
    "buffers.none": ((0, 3), torch.bfloat16),
}


def size_of(name: str) -> int:
    return prod(SHAPES[name][0])


def whole_state(seed: int) -> dict[str, Tensor]:
    """Every tensor, of random bits, NaN included."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(-(2**63), 2**63 - 1, (prod(shape),), generator=generator)
        .view(dtype)[: prod(shape)]
        .reshape(shape)
        for name, (shape, dtype) in SHAPES.items()
    }


def cut_state(state: Mapping[str, Tensor], cutting: Mapping[str, Span | None]) -> State:
    """One rank's part; copies."""
    return {
        name: state[name].clone()
        if span is None
        else Piece(flat=state[name].flatten()[slice(*span)].clone(), start=span[0], shape=tuple(state[name].shape))
        for name, span in cutting.items()
    }


def bits(state: Mapping[str, Tensor | Piece]) -> dict[str, list[int]]:
    flats = {name: leaf.flat if isinstance(leaf, Piece) else leaf.flatten() for name, leaf in state.items()}
    return {name: flat.view(torch.uint8).tolist() for name, flat in flats.items()}


def save(root: Path, cuttings: Mapping[int, Cutting], fails_on: int | None = None, is_shared: bool = True) -> list[str]:
    """Save each step's state, cut so: what is said of those that are refused. The state is overwritten meanwhile."""
    rank, refused = dist.get_rank(), list[str]()
    full = patch.object(FileSystemWriter, "write_data", side_effect=OSError("the disk is full"))
    with closing(Checkpointer(root if is_shared else root / str(rank))) as checkpointer:
        for step, cutting in cuttings.items():
            state = cut_state(whole_state(step), cutting[rank])
            with full if rank == fails_on else nullcontext():
                work = checkpointer.save(step, state, {"step": step})
                for leaf in state.values():
                    (leaf.flat if isinstance(leaf, Piece) else leaf).zero_()
                try:
                    work.wait()
                except CheckpointError as error:
                    refused.append(str(error))
    return refused


def save_evenly(root: Path, step: int, state: dict[str, Tensor]) -> None:
    """Each rank its part of every tensor."""
    rank, count = dist.get_rank(), dist.get_world_size()
    bounds = {name: [tensor.numel() * each // count for each in range(count + 1)] for name, tensor in state.items()}
    with closing(Checkpointer(root)) as checkpointer:
        checkpointer.save(step, cut_state(state, {name: (each[rank], each[rank + 1]) for name, each in bounds.items()}))


def load(path: Path, cuttings: list[Cutting], partial: bool = False) -> list[str]:
    """Load in each cutting: what is wrong with what was loaded, or why it is refused."""
    rank, wrong = dist.get_rank(), list[str]()
    for cutting in cuttings:
        state, before = (cut_state(whole_state(seed), cutting[rank]) for seed in (99, 99))
        try:
            step = load_checkpoint(path, state, partial)["step"]
        except (CheckpointError, ValueError) as error:
            wrong.append(f"{type(error).__name__}: {error}")
            assert bits(state) == bits(before)  # no tensor was touched
            continue
        expected = bits(cut_state(whole_state(step), cutting[rank]))
        wrong += [name for name, there in bits(state).items() if there != expected[name]]
    return wrong


def refused_for_one(root: Path, path: Path) -> list[str]:
    """What is said to each rank where the last one's state has a plain number, at saving and at loading."""
    state: dict[str, object] = whole_state(10) if dist.get_rank() else {}
    if dist.get_rank() == dist.get_world_size() - 1:
        state["buffers.count"] = 3
    said = list[str]()
    with closing(Checkpointer(root)) as checkpointer:
        for work in (lambda: checkpointer.save(10, state), lambda: load_checkpoint(path, state)):
            try:
                work()
            except CheckpointError as error:
                said.append(str(error))
    return said


def saved(root: Path) -> list[str]:
    return sorted(os.listdir(root))
