"""Finds weights that should be the same on several ranks and are not: one has a bit that flipped.

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

from dovetail.parallel.traffic import Traffic
from dovetail.parallel.weights.legs import Gather, Legs
from dovetail.parallel.weights.shard import Shares

ROW = 8192  # words
ODD = 0x1E3779B97F4A7C15  # c: as irregular as the golden ratio


class ReplicaError(RuntimeError):
    """Ranks that should hold the same weights do not. All ranks raise it together, with the same message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """What this rank holds that others hold too."""

    tensors: Mapping[str, Tensor]
    holders: Mapping[str, Legs]  # by name
    traffic: Traffic

    def compare(self, step: int) -> None:
        """Raise ReplicaError, on all ranks, if a replica differs; all ranks call it together."""
        said = [each for legs, names in self._by_holders() for each in self._differing(legs, names)]
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

    def _by_holders(self) -> list[tuple[Legs, list[str]]]:
        """In the same order on all ranks that hold the same, and without a circle of ranks that wait for each other."""
        found: dict[tuple[int, ...], tuple[Legs, list[str]]] = {}
        for name, legs in self.holders.items():
            found.setdefault(legs.ranks, (legs, []))[1].append(name)
        return [found[ranks] for ranks in sorted(found)]

    def _differing(self, legs: Legs, names: Sequence[str]) -> list[str]:
        own = torch.stack([hash_of(self.tensors[name]) for name in names])
        hashes = Gather(own, legs, self.traffic, "hashes of weights").wait()  # [ranks, names]
        same = (hashes[:, None] == hashes[None]).sum(1)  # [ranks, names]: how many have the same hash
        found = []
        for column in (same < legs.size).any(0).nonzero().flatten().tolist():
            counts = dict(zip(legs.ranks, same[:, column].tolist(), strict=True))
            most = max(counts.values())
            is_most = 2 * most > legs.size
            odd = sorted(rank for rank, count in counts.items() if not is_most or count < most)
            found.append(f"{names[column]} on {_ranks(odd)}" + ("" if is_most else ", nobody knows on which"))
        return found


def replicas_of(models: Sequence[nn.Module], shares: Shares) -> Replicas:
    """Of a rank's models: the weights that others hold too, and the buffers of modules that have such weights."""
    legs = shares.legs()
    owners = {name.rpartition(".")[0]: each for name, each in legs.items()}
    held: dict[str, Tensor] = {}
    for model in models:
        held |= {name: each for name, each in model.named_parameters() if name in legs}
        held |= {name: each for name, each in model.named_buffers() if name.rpartition(".")[0] in owners}
    holders = {name: owners[name.rpartition(".")[0]] for name in held}
    return Replicas(tensors=held, holders=holders, traffic=shares.traffic)


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
