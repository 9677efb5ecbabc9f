"""Runs the model on the rows of a pass, in whichever way fits the machine and the model.

A row is one (slot, position) of the cache with the token that stands there. All rows are written to the cache before
any is attended to, so each sees those of its slot up to itself. Short rows (a token and the drafts after it) take the
absorbed form of attention, chunks of prompts the expanded one.

On a CPU what a row computes is bit for bit the same whatever rows are beside it, and however a prompt is cut into
chunks. Three sets of layers keep that promise:

    `tiled`     BF16, on a CPU that multiplies it
    `fused`     FP32, and BF16 on other CPUs; chunks are rows like others
    reference   plain torch, for a model with a recipe or a gate that the kernels lack. The bits of torch's products
                depend on the number of rows, so that it computes row by row, and prompts whole: `cuts_prompts` is
                False.

On a GPU plain torch computes rows together, which is many times faster: there a row depends on those beside it within
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dovetail.engine.steps.cache import PagedCache, SelectedSlots
from dovetail.engine.steps.fused import FusedSteps
from dovetail.engine.steps.rows import NONE, Chunk, Short
from dovetail.engine.steps.tiled import TiledSteps
from dovetail.engine.steps.weights import takes
from dovetail.model.transformer import Transformer
from dovetail.numerics import capability

Chosen = list[Tensor]  # of each MoE layer: the experts [R, K] of each row


class Runner:
    """One model and the cache of the sequences it is working on."""

    def __init__(self, model: Transformer, cache: PagedCache, kernels: bool = True) -> None:
        """`kernels`: use the CPU kernels where they take the model."""
        self.model = model
        self.cache = cache
        on_cpu = capability.on_cpu(model.embed_tokens.weight)
        self.kernels: TiledSteps | FusedSteps | None = None
        if kernels and on_cpu and takes(model):
            is_bf16 = capability.on_bf16_cpu(model.embed_tokens.weight)
            self.kernels = (TiledSteps if is_bf16 else FusedSteps)(model, cache)
        if cache.is_fp8 and not isinstance(self.kernels, TiledSteps):
            raise ValueError(
                "cache_format = fp8 needs BF16 weights on a CPU with AVX-512 BF16, and a model without a precision "
                "recipe: set cache_format = bf16"
            )
        self.one_by_one = self.device.type == "cpu"
        self.cuts_prompts = self.kernels is not None or not self.one_by_one

    @property
    def device(self) -> torch.device:
        return self.cache.data.device

    @torch.no_grad()
    def run(
        self, short: Short, chunks: list[Chunk], wanted: list[int] | None = None, chosen: Chosen | None = None
    ) -> Tensor:
        """Rows -> hidden [R, dim] after the final norm, or [W, dim] of the rows `wanted`, ascending, which is less
        work. `chosen` gets the experts of all rows (in the last block of those wanted alone)."""
        if self.kernels is not None:
            return self.kernels.run(short, chunks, wanted, chosen)
        hidden, routed = [], []
        if short.tokens:
            rows, output = self._main(short)
            hidden.append(rows)
            routed.append(output)
        for chunk in chunks:
            tokens, positions = self._tensor(chunk.tokens)[None], self._tensor(chunk.range)[None]
            output = self.model(tokens, positions, cache=self.cache.select([chunk.slot]))
            hidden.append(output.hidden[0])
            routed.append([routing.expert_ids for routing in output.routings])
        if chosen is not None:
            chosen += [torch.cat(layer) for layer in zip(*routed, strict=True)]
        return torch.cat(hidden) if wanted is None else torch.cat(hidden)[wanted]

    def prompt(self, chunks: list[Chunk], wanted: list[int] | None = None, chosen: Chosen | None = None) -> Tensor:
        """`run` of chunks alone."""
        return self.run(NONE, chunks, wanted, chosen)

    def step(self, tokens: Tensor, slots: Tensor, positions: Tensor, chosen: Chosen | None = None) -> Tensor:
        """`run` of short rows alone."""
        return self.run(Short(tokens.tolist(), slots.tolist(), positions.tolist()), [], None, chosen)

    @torch.no_grad()
    def draft(self, depth: int, short: Short, chunks: list[Chunk], hidden: Tensor, next_tokens: list[int]) -> Tensor:
        """Rows through MTP module `depth`: hidden [R, dim] of each and the token [R] that it is given (`speculative`
        says which) -> hidden [R, dim] after the module's norm."""
        if self.kernels is not None:
            return self.kernels.draft(depth, short, chunks, hidden, next_tokens)
        tokens = self._tensor(next_tokens)
        parts, row = [], len(short.tokens)
        if short.tokens:
            parts.append(self._step(short, lambda cache, rows: self._module(depth, short, hidden, tokens, cache, rows)))
        for chunk in chunks:
            mine = slice(row, row + len(chunk.tokens))
            row = mine.stop
            cache, positions = self.cache.select([chunk.slot]), self._tensor(chunk.range)[None]
            output = self.model.mtp_forward(depth, hidden[None, mine], tokens[None, mine], positions, cache=cache)
            parts.append(output.hidden[0])
        return torch.cat(parts)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[..., dim] -> [..., vocab] FP32."""
        if self.kernels is not None:
            return self.kernels.logits(hidden)
        if not self.one_by_one:
            return self.model.logits(hidden)
        rows = hidden.reshape(-1, 1, hidden.shape[-1])
        return torch.cat([self.model.logits(row) for row in rows]).view(*hidden.shape[:-1], -1)

    def forget(self, slot: int) -> None:
        """The prompt of `slot` is finished, or given up."""
        if self.kernels is not None:
            self.kernels.forget(slot)

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=self.device)

    def _main(self, short: Short) -> tuple[Tensor, Chosen]:
        """Hidden states of short rows, and the experts chosen."""
        tokens, all_positions = self._tensor(short.tokens), self._tensor(short.positions)
        places: list[Tensor] = []
        routed: list[list[Tensor]] = []

        def run(cache: SelectedSlots, rows: Tensor) -> Tensor:
            output = self.model(tokens[rows], all_positions[rows], cache=cache, absorbed=True)
            places.append(rows.flatten())
            routed.append([routing.expert_ids for routing in output.routings])
            return output.hidden

        hidden = self._step(short, run)
        order = torch.cat(places).argsort()
        return hidden, [torch.cat(layer)[order] for layer in zip(*routed, strict=True)]

    def _module(
        self, depth: int, short: Short, hidden: Tensor, tokens: Tensor, cache: SelectedSlots, rows: Tensor
    ) -> Tensor:
        positions = self._tensor(short.positions)[rows]
        output = self.model.mtp_forward(depth, hidden[rows], tokens[rows], positions, cache=cache, absorbed=True)
        return output.hidden

    def _step(self, short: Short, run: Callable[[SelectedSlots, Tensor], Tensor]) -> Tensor:
        """`run` on rows [B, T] for each number T of rows that slots have, or for each row; its results [B, T, dim] as
        [R, dim]."""
        slots = self._tensor(short.slots)
        groups = _single_rows(slots) if self.one_by_one else _groups(slots)
        parts = [(rows, run(self.cache.select(group), rows)) for group, rows in groups]
        if len(parts) == 1:
            return parts[0][1].flatten(0, 1)
        output = parts[0][1].new_empty(len(slots), parts[0][1].shape[-1])
        for rows, hidden in parts:
            output[rows] = hidden
        return output


def _single_rows(slots: Tensor) -> Iterator[tuple[list[int], Tensor]]:
    """Each row alone, as `_groups` has it."""
    return (([slot], torch.tensor([[row]], device=slots.device)) for row, slot in enumerate(slots.tolist()))


def _groups(slots: Tensor) -> Iterator[tuple[list[int], Tensor]]:
    """Slots that have equally many rows, and the indices [B, T] of these rows."""
    unique, counts = torch.unique_consecutive(slots, return_counts=True)
    assert len(unique) == len(set(unique.tolist())), "the rows of a slot are adjacent"
    ends = counts.cumsum(0)
    for count in sorted(set(counts.tolist())):
        chosen = counts == count
        rows = (ends[chosen] - count)[:, None] + torch.arange(count, device=slots.device)
        yield unique[chosen].tolist(), rows
