"""Data parallelism under torchrun: this process's rank, and what ranks must agree on.

Without torchrun it does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from dovetail.train.layout.meeting import meet
from dovetail.train.layout.peers import Peers

# Tokenising a large text takes hours. Other ranks need no limit to give up: should rank 0 die, its connection breaks.
PATIENCE = timedelta(days=30)
DEADLINE = 600.0  # seconds

Guard = Callable[[Callable[[], str]], AbstractContextManager[object]]


@contextmanager
def process_group(deadline: float = DEADLINE) -> Iterator[Guard]:
    """The process group of a torchrun launch, for the duration. Without torchrun it does nothing.

    `deadline` is what an exchange may take, in seconds. What it gives is `Peers.guard`.
    """
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        yield nullcontext
        return
    patience = timedelta(seconds=deadline)
    store, rank, world = next(dist.rendezvous("env://", timeout=patience))
    store = dist.PrefixStore(meet(store, rank, world, patience), store)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    peers = Peers(dist.PrefixStore("peers", store), rank, world, patience)
    try:
        yield peers.guard
    finally:
        peers.close()
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def local_device() -> torch.device:
    """This process's GPU where there are any, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # set by torchrun
    torch.cuda.set_device(device)
    return device


@contextmanager
def first_rank_first() -> Iterator[None]:
    """Rank 0 runs the block while the others wait, then they run it. Where rank 0 fails, the others exit, and say
    nothing: its message is the one.

    They wait as long as it takes: NCCL gives up after ten minutes and gloo after thirty, so a group is made for this.
    """
    rank, world = rank_and_world()
    if world == 1:
        yield
        return
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    if rank > 0 and not all_ranks(True, group):
        with suppress(RuntimeError):  # until its connection breaks: torchrun ends all once one has ended
            all_ranks(True, group)
        raise SystemExit(1)
    is_well = False
    try:
        yield
        is_well = True
    finally:
        if rank == 0:
            all_ranks(is_well, group)


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank; all call it together."""
    return not all_ranks(not flag)


def all_ranks(flag: bool, group: dist.ProcessGroup | None = None) -> bool:
    if not dist.is_initialized():
        return flag
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    votes = torch.tensor(int(flag), device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MIN, group=group)
    return bool(votes)
