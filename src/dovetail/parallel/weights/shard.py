"""Sums gradients over the ranks that hold a weight, and shares out its optimizer state (ZeRO-1).

    backward  ->  give, give, ..., finish  ->  norm  ->  the optimizer on its pieces  ->  gather
                  FP32 sums                             in place                         whole weights again

With `zero = 1` each of the n ranks that hold a block has one piece of it: ceil(length / n) elements, some ranks fewer
or none. Gradients are summed where their piece is (reduce-scatter), first inside nodes and then across them
(`parallel.weights.legs`). With `zero = 0` the sums are then gathered as well (all-reduce), and nothing is left to
gather after the update. So sums do not depend on `zero`, and two ranks' sum is a + b bit for bit.

Weights that the same ranks hold travel together, in buckets of some 25 MB of gradients, the last layers first. A bucket
starts when its last gradient was given and all buckets before it have started: the order of buckets is the same on all
ranks, in whichever order backward passes end. `give` never waits for another rank, which may be waiting for rows that
this one has not sent yet; where a bucket has a second leg, it starts when somebody gives or finishes after the first.
What is hidden behind the backward pass is the wait for links: two ranks with 64 MB of gradients and 0.32 s of products
took 0.45 s on a link of 2 Gbit/s, and 0.60 s where all was given at the end. Without the limit copies need the same
cores, and nothing is gained: both took 0.38 s.

`traffic` counts the bytes that a rank sends. Weights are filled up to n equal pieces.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dovetail.parallel.mesh import Mesh, make_group
from dovetail.parallel.traffic import Traffic
from dovetail.parallel.weights.holders import Block, Weight, blocks_of, rank_sets
from dovetail.parallel.weights.legs import Gather, Legs, Sum, count_ring, form_legs
from dovetail.parallel.weights.pieces import Piece
from dovetail.spec.layout import Layout

BUCKET = 25_000_000  # bytes of gradients


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Weights whose pieces travel together."""

    legs: Legs
    names: tuple[str, ...]
    columns: tuple[int, ...]  # elements of the longest piece of each

    def __str__(self) -> str:
        return f"{self.names[0]} to {self.names[-1]}"


class Shares:
    """This rank's shares of the weights that it holds, and the exchanges that keep them right."""

    def __init__(
        self, parameters: Mapping[str, Tensor], weights: Mapping[str, Weight], layout: Layout, mesh: Mesh
    ) -> None:
        """Form groups; all ranks call it together. `parameters` are this rank's, contiguous, as `blocks_of` says."""
        self.traffic = Traffic()
        self._rank, self._is_shared_out = mesh.rank, layout.zero == 1
        self.blocks = blocks_of(weights, layout, self._rank)
        held = {name: parameter.numel() for name, parameter in parameters.items()}
        assert held == {name: block.length for name, block in self.blocks.items()}, "another model than the layout's"
        self._parameters = {name: parameters[name].detach().view(-1) for name in self.blocks}
        formed = {ranks: form_legs(ranks, mesh) for ranks in rank_sets(weights, layout) if len(ranks) > 1}
        known = {ranks: legs for ranks, legs in formed.items() if legs is not None}
        self._legs = {name: known[block.ranks] for name, block in self.blocks.items() if len(block.ranks) > 1}
        self._buckets = _fill_buckets(self.blocks, self._legs)
        self._world = make_group(dist.group.WORLD, range(layout.gpus), mesh)
        self._given: dict[str, Tensor] = {}
        self._sums: list[Sum] = []  # of the first buckets

    def legs(self) -> Mapping[str, Legs]:
        """By name, the ranks that hold a weight of this rank as well."""
        return self._legs

    def pieces(self) -> dict[str, Piece]:
        """What this rank updates of each weight it holds: views of the parameters."""
        found = {}
        for name, block in self.blocks.items():
            own = self._own(name)
            flat = self._parameters[name][own]
            found[name] = Piece(flat=flat, start=block.start + own.start, shape=block.shape)
        return found

    def give(self, name: str, gradient: Tensor) -> None:
        """One gradient that is whole on this rank, BF16 or FP32. It must stay as it is until `finish`."""
        assert name not in self._given, f"{name} was given twice"
        assert gradient.numel() == self.blocks[name].length, (name, gradient.shape)
        self._given[name] = gradient.detach().reshape(-1)
        for bucket in self._buckets[len(self._sums) :]:
            if not self._given.keys() >= set(bucket.names):
                break
            self._sums.append(self._send_pieces(bucket))
        for each in self._sums:  # in their order, which is the same on all ranks
            if not each.go_on():
                break

    def finish(self) -> dict[str, Tensor]:
        """Wait for all sums: FP32 [n] by name, of each weight's piece. A gradient that no other rank has is what was
        given, in its own format."""
        missing = self.blocks.keys() - self._given.keys()
        assert not missing, f"no gradient was given of {sorted(missing)}"
        given, self._given = self._given, {}
        sums, self._sums = self._sums, []
        for each in sums:
            each.start_last()
        found = dict[str, Tensor]()
        if self._is_shared_out:
            for bucket, each in zip(self._buckets, sums, strict=True):
                parts = zip(bucket.names, each.wait().split(bucket.columns), strict=True)
                found |= {name: part[: self._length(name)] for name, part in parts}
        else:
            found = {name: torch.empty_like(given[name], dtype=torch.float32) for name in self._legs}
            self._gather((each.wait() for each in sums), found)
        return {name: found.get(name, given[name]) for name in self.blocks}

    def norm(self, squares: Mapping[str, Tensor]) -> float:
        """Euclidean norm of all gradients of all ranks, the same bits on each.

        `squares` are the sums of squares of what `finish` returned, FP64 []. Each weight counts once: its pieces, or
        the whole on the first rank that has it.
        """
        counted = [
            squares[name] for name, block in self.blocks.items() if self._is_shared_out or block.ranks[0] == self._rank
        ]
        total = torch.stack(counted).sum() if counted else next(iter(squares.values())).new_zeros(())
        totals = total.new_empty(self._world.size)
        count_ring(self.traffic, self._world, total.nbytes)
        dist.all_gather(list(totals), total, group=self._world.handle)
        return math.sqrt(math.fsum(totals.tolist()))  # exact, in any order

    def gather(self) -> None:
        """Make all parameters whole again, after each rank has updated its pieces in place."""
        if self._is_shared_out:
            whole = {name: self._parameters[name].view(torch.uint8) for name in self._legs}
            self._gather(map(self._own_bytes, self._buckets), whole)

    def _own(self, name: str) -> slice:
        """This rank's piece of its block."""
        length, legs = self.blocks[name].length, self._legs.get(name)
        if legs is None or not self._is_shared_out:
            return slice(0, length)
        columns = _columns(length, legs)
        return slice(min(legs.place * columns, length), min((legs.place + 1) * columns, length))

    def _length(self, name: str) -> int:
        own = self._own(name)
        return own.stop - own.start

    def _send_pieces(self, bucket: Bucket) -> Sum:
        gradients = [self._given[name] for name in bucket.names]
        sent = gradients[0].new_zeros(bucket.legs.size, sum(bucket.columns), dtype=torch.float32)
        for gradient, columns in zip(gradients, sent.split(bucket.columns, dim=1), strict=True):
            _spread(gradient, columns)
        return Sum(sent, bucket.legs, self.traffic, f"gradients of {bucket}")

    def _own_bytes(self, bucket: Bucket) -> Tensor:
        """This rank's pieces of the parameters, filled up."""
        parameters = [self._parameters[name] for name in bucket.names]
        widths = [each.element_size() * count for each, count in zip(parameters, bucket.columns, strict=True)]
        row = parameters[0].new_zeros(sum(widths), dtype=torch.uint8)
        for name, parameter, part in zip(bucket.names, parameters, row.split(widths), strict=True):
            piece = parameter[self._own(name)].view(torch.uint8)
            part[: len(piece)].copy_(piece)
        return row

    def _gather(self, rows: Iterable[Tensor], whole: Mapping[str, Tensor]) -> None:
        """This rank's row of each bucket -> all of `whole`, flat by name, each bucket while the next is under way."""
        started = (
            Gather(row, bucket.legs, self.traffic, f"gathering {bucket}")
            for bucket, row in zip(self._buckets, rows, strict=True)
        )
        for bucket, came in zip(self._buckets, _one_ahead(started), strict=True):
            widths = [
                len(whole[name]) // self.blocks[name].length * columns
                for name, columns in zip(bucket.names, bucket.columns, strict=True)
            ]
            for name, columns in zip(bucket.names, came.split(widths, dim=1), strict=True):
                _join(columns, whole[name])


def _fill_buckets(blocks: Mapping[str, Block], legs: Mapping[str, Legs]) -> list[Bucket]:
    """From the last layers to the first, in the order in which their last weights come there."""
    filled: list[tuple[str, ...]] = []
    open_: defaultdict[tuple[int, ...], list[str]] = defaultdict(list)
    for name in reversed([name for name in blocks if name in legs]):
        names = open_[blocks[name].ranks]
        names.append(name)
        if 4 * sum(blocks[each].length for each in names) >= BUCKET:
            filled.append(tuple(open_.pop(blocks[name].ranks)))
    filled += map(tuple, open_.values())
    order = {name: place for place, name in enumerate(blocks)}
    return [
        Bucket(
            legs=legs[names[0]],
            names=names,
            columns=tuple(_columns(blocks[name].length, legs[name]) for name in names),
        )
        for names in sorted(filled, key=lambda names: order[names[-1]], reverse=True)
    ]


def _columns(length: int, legs: Legs) -> int:
    """Elements of the longest piece."""
    return -(-length // legs.size)


def _spread(flat: Tensor, columns: Tensor) -> None:
    """flat [N] -> columns [ranks, N / ranks, rounded up], a row for each rank's piece; what is left stays."""
    width = columns.shape[1]
    full, rest = divmod(len(flat), width)
    columns[:full].copy_(flat[: full * width].view(full, width))
    if rest:
        columns[full, :rest].copy_(flat[full * width :])


def _join(columns: Tensor, flat: Tensor) -> None:
    """The way back of `_spread`."""
    width = columns.shape[1]
    full, rest = divmod(len(flat), width)
    flat[: full * width].view(full, width).copy_(columns[:full])
    if rest:
        flat[full * width :].copy_(columns[full, :rest])


def _one_ahead(started: Iterator[Gather]) -> Iterator[Tensor]:
    """What each has gathered, when the next has started."""
    before = next(started, None)
    while before is not None:
        after = next(started, None)
        yield before.wait()
        before = after
