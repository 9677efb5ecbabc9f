"""Sums gradients over the ranks that hold a weight, and shares out its optimizer state (ZeRO-1).

    backward  ->  give, give, ..., finish  ->  norm  ->  the optimizer on its pieces  ->  gather
                  FP32 sums                             in place                         whole weights again

With `zero = 1` each of the n ranks that hold a block has one piece of it: ceil(length / n) elements, the last ranks
fewer or none. Every rank sends each other one its piece of the gradients, and sums what came in the order of ranks
(reduce-scatter). With `zero = 0` the sums are then gathered as well (all-reduce), and nothing is left to gather after
the update. So sums do not depend on `zero`, and two ranks' sum is a + b bit for bit.

Weights that the same ranks hold travel together, in buckets of some 25 MB of gradients, the last layers first. A bucket
starts when its last gradient was given and all buckets before it have started: the order of buckets is the same on all
ranks, in whichever order backward passes end. `give` never waits for another rank, which may be waiting for rows that
this one has not sent yet. What is hidden behind the backward pass is the wait for links: two ranks with 64 MB of
gradients and 0.32 s of products took 0.45 s on a link of 2 Gbit/s, and 0.60 s where all was given at the end; without
the limit, where copies need the same cores, both took 0.38 s.

`traffic` counts the bytes that a rank sends, of a bucket of S bytes (whose weights are filled up to n equal pieces):

    reduce-scatter   S / n of gradients in FP32 to each of the others, directly
    all-gather       S / n of what is gathered, n - 1 times to the next rank: a ring

gloo's own reduce-scatter is an all-reduce, which is twice the bytes, and sums in an order that varies with the place.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dovetail.parallel.holders import Block, Weight, blocks_of, rank_sets
from dovetail.parallel.mesh import Group, Mesh
from dovetail.parallel.pieces import Piece
from dovetail.parallel.wire import Traffic
from dovetail.spec.layout import Layout

BUCKET = 25_000_000  # bytes of gradients


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Weights whose pieces travel together."""

    group: Group
    names: tuple[str, ...]
    columns: tuple[int, ...]  # elements of the longest piece of each


@dataclass(frozen=True, slots=True, kw_only=True)
class _Exchange:
    """A collective under way. `sent` is kept until it is over."""

    bucket: Bucket
    work: dist.Work
    sent: Tensor
    rows: Tensor  # [ranks, width], a row from each
    widths: Sequence[int]  # of each weight's columns

    def summed(self) -> Tensor:
        """[width], in the order of ranks."""
        self.work.wait()
        total = self.rows[0] + self.rows[1]
        for row in self.rows[2:]:
            total += row
        return total


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
        groups = _form_groups(rank_sets(weights, layout), mesh)
        self._groups = {name: groups[block.ranks] for name, block in self.blocks.items() if len(block.ranks) > 1}
        self._buckets = _fill_buckets(self.blocks, self._groups)
        self._world = _group(dist.group.WORLD, tuple(range(layout.gpus)), mesh)
        self._given: dict[str, Tensor] = {}
        self._sums: list[_Exchange] = []  # of the first buckets

    def groups(self) -> Mapping[str, Group]:
        """By name, the ranks that hold a weight of this rank as well."""
        return self._groups

    def pieces(self) -> dict[str, Piece]:
        """What this rank updates of each weight it holds: views of the parameters."""
        found = {}
        for name, block in self.blocks.items():
            own = self._own(name)
            flat = self._parameters[name][own]
            found[name] = Piece(flat=flat, start=block.start + own.start, shape=block.shape)
        return found

    def reduce(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All gradients, BF16 or FP32, shaped as the parameters -> the sums of the pieces, flat. See `finish`."""
        for name, gradient in gradients.items():
            self.give(name, gradient)
        return self.finish()

    def give(self, name: str, gradient: Tensor) -> None:
        """One gradient that is whole on this rank. It must stay as it is until `finish`."""
        assert name not in self._given, f"{name} was given twice"
        assert gradient.numel() == self.blocks[name].length, (name, gradient.shape)
        self._given[name] = gradient.detach().reshape(-1)
        for bucket in self._buckets[len(self._sums) :]:
            if not self._given.keys() >= set(bucket.names):
                break
            self._sums.append(self._send_pieces(bucket))

    def finish(self) -> dict[str, Tensor]:
        """Wait for all sums: FP32 [n] by name, of each weight's piece. A gradient that no other rank has is what was
        given, in its own format."""
        missing = self.blocks.keys() - self._given.keys()
        assert not missing, f"no gradient was given of {sorted(missing)}"
        given, self._given = self._given, {}
        sums, self._sums = self._sums, []
        if self._is_shared_out:
            found = {
                name: part[: self._length(name)]
                for each in sums
                for name, part in zip(each.bucket.names, each.summed().split(each.widths), strict=True)
            }
        else:
            found = {name: torch.empty_like(given[name], dtype=torch.float32) for name in self._groups}
            self._gather((self._send_row(each.bucket, each.summed(), each.widths) for each in sums), found)
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
        self._count_ring(self._world, total.nbytes)
        dist.all_gather(list(totals), total, group=self._world.handle)
        return math.sqrt(math.fsum(totals.tolist()))  # exact, in any order

    def gather(self) -> None:
        """Make all parameters whole again, after each rank has updated its pieces in place."""
        if self._is_shared_out:
            whole = {name: self._parameters[name].view(torch.uint8) for name in self._groups}
            self._gather((self._send_weights(bucket) for bucket in self._buckets), whole)

    def _own(self, name: str) -> slice:
        """This rank's piece of its block."""
        length, group = self.blocks[name].length, self._groups.get(name)
        if group is None or not self._is_shared_out:
            return slice(0, length)
        columns = _columns(length, group)
        return slice(min(group.index * columns, length), min((group.index + 1) * columns, length))

    def _length(self, name: str) -> int:
        own = self._own(name)
        return own.stop - own.start

    def _send_pieces(self, bucket: Bucket) -> _Exchange:
        group, gradients = bucket.group, [self._given[name] for name in bucket.names]
        sent = gradients[0].new_zeros(group.size, sum(bucket.columns), dtype=torch.float32)
        for gradient, columns in zip(gradients, sent.split(bucket.columns, dim=1), strict=True):
            _spread(gradient, columns)
        for member in range(group.size):
            if member != group.index:
                self._count(group, member, sent[0].nbytes)
        rows = torch.empty_like(sent)
        work = dist.all_to_all_single(rows, sent, group=group.handle, async_op=True)
        return _Exchange(bucket=bucket, work=work, sent=sent, rows=rows, widths=bucket.columns)

    def _send_weights(self, bucket: Bucket) -> _Exchange:
        parameters = [self._parameters[name] for name in bucket.names]
        widths = [each.element_size() * count for each, count in zip(parameters, bucket.columns, strict=True)]
        sent = parameters[0].new_zeros(sum(widths), dtype=torch.uint8)
        for name, parameter, part in zip(bucket.names, parameters, sent.split(widths), strict=True):
            piece = parameter[self._own(name)].view(torch.uint8)
            part[: len(piece)].copy_(piece)
        return self._send_row(bucket, sent, widths)

    def _send_row(self, bucket: Bucket, sent: Tensor, widths: Sequence[int]) -> _Exchange:
        group = bucket.group
        self._count_ring(group, sent.nbytes)
        rows = sent.new_empty(group.size, len(sent))
        work = dist.all_gather(list(rows), sent, group=group.handle, async_op=True)
        return _Exchange(bucket=bucket, work=work, sent=sent, rows=rows, widths=widths)

    def _gather(self, started: Iterator[_Exchange], whole: Mapping[str, Tensor]) -> None:
        """Into `whole`, flat by name, each bucket while the next is under way."""
        for each in _one_ahead(started):
            for name, columns in zip(each.bucket.names, each.rows.split(each.widths, dim=1), strict=True):
                _join(columns, whole[name])

    def _count_ring(self, group: Group, size: int) -> None:
        self._count(group, (group.index + 1) % group.size, (group.size - 1) * size)

    def _count(self, group: Group, member: int, size: int) -> None:
        if group.is_near[member]:
            self.traffic.node += size
        else:
            self.traffic.nic += size


def _form_groups(sets: Sequence[tuple[int, ...]], mesh: Mesh) -> dict[tuple[int, ...], Group]:
    """Those of this rank; all ranks form all of them, in the same order."""
    found = {}
    for ranks in sets:
        if len(ranks) > 1:
            handle = dist.new_group(list(ranks), timeout=mesh.deadline, group_desc="shares")
            if mesh.rank in ranks:
                found[ranks] = _group(handle, ranks, mesh)
    return found


def _group(handle: dist.ProcessGroup, ranks: tuple[int, ...], mesh: Mesh) -> Group:
    is_near = tuple(other // mesh.ranks_per_node == mesh.rank // mesh.ranks_per_node for other in ranks)
    return Group(handle=handle, ranks=ranks, index=ranks.index(mesh.rank), is_near=is_near, turns=mesh.turns)


def _fill_buckets(blocks: Mapping[str, Block], groups: Mapping[str, Group]) -> list[Bucket]:
    """From the last layers to the first, in the order in which their last weights come there."""
    filled: list[tuple[str, ...]] = []
    open_: defaultdict[tuple[int, ...], list[str]] = defaultdict(list)
    for name in reversed([name for name in blocks if name in groups]):
        names = open_[blocks[name].ranks]
        names.append(name)
        if 4 * sum(blocks[each].length for each in names) >= BUCKET:
            filled.append(tuple(open_.pop(blocks[name].ranks)))
    filled += map(tuple, open_.values())
    order = {name: place for place, name in enumerate(blocks)}
    return [
        Bucket(
            group=groups[names[0]],
            names=names,
            columns=tuple(_columns(blocks[name].length, groups[name]) for name in names),
        )
        for names in sorted(filled, key=lambda names: order[names[-1]], reverse=True)
    ]


def _columns(length: int, group: Group) -> int:
    """Elements of the longest piece."""
    return -(-length // group.size)


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


def _one_ahead(started: Iterator[_Exchange]) -> Iterator[_Exchange]:
    """Each once it is over, when the next has started."""
    before = next(started, None)
    while before is not None:
        after = next(started, None)
        before.work.wait()
        yield before
        before = after
