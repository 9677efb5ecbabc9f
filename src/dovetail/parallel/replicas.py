"""Finds weights that should be the same on several ranks and are not: a bit that has flipped in one of them.

Ranks that hold the same weights tell each other a hash of each, 8 bytes a weight, and nothing else. Of three or more
the one that differs from most is named; of two, nobody knows which is right.

The hash of a tensor whose bytes are the words w of 8 bytes, in rows r of some 64 KB:

    sum over r of (2 r + 1) c (sum of w in r)   modulo 2^64, with an odd c

So one flipped bit always changes it, and so do two in different rows but for one case in billions. It reads the weights
once, at the speed of memory, on whichever device they are.

With ZeRO-1 a rank has the masters and moments of its own pieces alone, and copies of all other weights that live for
one step. So weights are compared after the backward pass that read them, before its gradients are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dovetail.parallel.mesh import Group

ROW = 8192  # words
ODD = 0x1E3779B97F4A7C15  # c: as irregular as the golden ratio


class ReplicaError(RuntimeError):
    """Ranks that should hold the same weights do not. All ranks raise it together, with the same message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """What this rank holds that others hold too."""

    tensors: Mapping[str, Tensor]
    groups: Mapping[str, Group]  # by name: who holds it

    def compare(self, step: int) -> None:
        """Raise ReplicaError, on all ranks, if a replica differs; all ranks call it together."""
        found = [self._differing(group, names) for group, names in self._by_group()]
        said = [each for names in found for each in names]
        device = next((each.device for each in self.tensors.values()), None)
        votes = torch.tensor(int(bool(said)), device=device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        if votes:
            everyone: list[list[str]] = [[]] * dist.get_world_size()
            dist.all_gather_object(everyone, said)
            told = sorted({each for some in everyone for each in some})
            more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
            raise ReplicaError(
                f"step {step}: replicas of weights differ: {'; '.join(told[:3])}{more}. Memory or a link has changed "
                "bits: test that machine; the same command goes on from the newest checkpoint"
            )

    def _by_group(self) -> list[tuple[Group, list[str]]]:
        """In the same order on all ranks of a group, and without a circle of ranks that wait for each other."""
        found: dict[tuple[int, ...], tuple[Group, list[str]]] = {}
        for name, group in self.groups.items():
            found.setdefault(group.ranks, (group, []))[1].append(name)
        return [found[ranks] for ranks in sorted(found)]

    def _differing(self, group: Group, names: Sequence[str]) -> list[str]:
        own = torch.stack([hash_of(self.tensors[name]) for name in names])
        hashes = own.new_empty(group.size, len(names))
        dist.all_gather(list(hashes), own, group=group.handle)
        same = (hashes[:, None] == hashes[None]).sum(1)  # [ranks, names]: how many have the same hash
        found = []
        for column in (same < group.size).any(0).nonzero().flatten().tolist():
            counts = same[:, column].tolist()
            is_most = 2 * max(counts) > group.size
            odd = [rank for rank, count in zip(group.ranks, counts, strict=True) if not is_most or count < max(counts)]
            found.append(f"{names[column]} on {_ranks(odd)}" + ("" if is_most else ", nobody knows on which"))
        return found


def replicas_of(models: Sequence[nn.Module], groups: Mapping[str, Group]) -> Replicas:
    """Of a rank's models: the weights that `groups` has, and the buffers of modules that have such weights."""
    owners = {name.rpartition(".")[0]: group for name, group in groups.items()}
    held: dict[str, Tensor] = {}
    for model in models:
        held |= {name: each for name, each in model.named_parameters() if name in groups}
        held |= {name: each for name, each in model.named_buffers() if name.rpartition(".")[0] in owners}
    return Replicas(tensors=held, groups={name: owners[name.rpartition(".")[0]] for name in held})


def hash_of(tensor: Tensor) -> Tensor:
    """int64 [] of the bytes of a contiguous tensor."""
    held = tensor.detach().reshape(-1).view(torch.uint8)
    whole = len(held) // 8 * 8
    rest = torch.zeros(8, dtype=torch.uint8, device=held.device)
    rest[: len(held) - whole] = held[whole:]
    words = (held[:whole] if held.storage_offset() % 8 == 0 else held[:whole].clone()).view(torch.int64)
    full = len(words) // ROW * ROW
    sums = torch.cat([words[:full].view(-1, ROW).sum(1), words[full:].sum()[None], rest.view(torch.int64)])
    factors = (2 * torch.arange(len(sums), device=held.device) + 1) * ODD
    return (sums * factors).sum()


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"
