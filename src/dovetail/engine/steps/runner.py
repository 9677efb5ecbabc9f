"""Runs the model on rows of a batch: prompts in one way, short steps in another.

A row is one (slot, position) of the cache with the token that stands there. Rows of one slot are adjacent and
their positions ascend by one; all rows are written to the cache before any is attended to, so each sees those of its
slot up to itself.

    prompt, prompt_draft   many rows: chunks of prompts; expanded attention
    step, draft            few rows of each slot: a token and the drafts after it; absorbed attention

On a CPU what a row computes is bit for bit the same whatever rows are beside it, and however a prompt is cut into
chunks. Three sets of layers keep that promise:

    `prompts`   prompts in BF16, where the CPU multiplies it
    `fused`     short steps, in BF16 and FP32, and prompts where `prompts` does not run
    reference   plain torch, for a model with a recipe or a gate that the kernels lack. The bits of torch's products
                depend on the number of rows, so that it computes row by row, and prompts whole: `cuts_prompts` is
                False.

On a GPU plain torch computes rows together, which is many times faster: there a row depends on those beside it within
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dovetail.engine.steps.cache import PagedCache, SelectedSlots
from dovetail.engine.steps.fused import FusedSteps, takes
from dovetail.engine.steps.prompts import Chunk, PromptSteps
from dovetail.model.experts.gate import Routing
from dovetail.model.transformer import Transformer
from dovetail.numerics import capability

Chosen = list[Tensor]  # of each MoE layer: the experts [R, K] of each row


class Runner:
    """One model and the cache of the sequences it is working on."""

    def __init__(self, model: Transformer, cache: PagedCache, fused: bool = True) -> None:
        """`fused`: use the CPU kernels where they take the model."""
        self.model = model
        self.cache = cache
        on_cpu = capability.on_cpu(model.embed_tokens.weight, cache.data)
        self.fused = FusedSteps(model, cache) if fused and on_cpu and takes(model) else None
        is_bf16 = capability.on_bf16_cpu(model.embed_tokens.weight, cache.data)
        self.prompts = PromptSteps(model, cache) if self.fused and is_bf16 else None
        self.one_by_one = self.device.type == "cpu"
        self.cuts_prompts = self.fused is not None or not self.one_by_one

    @property
    def device(self) -> torch.device:
        return self.cache.data.device

    @torch.no_grad()
    def prompt(self, chunks: list[Chunk], wanted: list[int] | None = None, chosen: Chosen | None = None) -> Tensor:
        """Chunks of prompts -> hidden [R, dim] after the final norm, or [W, dim] of the rows `wanted`, ascending, which
        is less work. `chosen` gets the experts of these rows (of all rows in blocks before the last)."""
        rows = None if wanted is None else torch.tensor(wanted, dtype=torch.int64, device=self.device)
        tokens = torch.tensor([token for chunk in chunks for token in chunk.tokens], device=self.device)
        if self.prompts is not None:
            return self.prompts.prompt(tokens, self.prompts.rows(chunks), rows, chosen)
        if self.fused is not None:
            hidden = self.fused.step(tokens, *_places(chunks), chosen)
        else:
            parts, routed = [], []
            for chunk in chunks:
                cache = self.cache.select([chunk.slot])
                mine, positions = (torch.tensor(each, device=self.device)[None] for each in (chunk.tokens, chunk.range))
                output = self.model(mine, positions, cache=cache)
                parts.append(output.hidden[0])
                routed.append(output.routings)
            hidden = torch.cat(parts)
            if chosen is not None:
                chosen += _experts(routed)
        return hidden if rows is None else hidden[rows]

    @torch.no_grad()
    def prompt_draft(self, depth: int, chunks: list[Chunk], hidden: Tensor, next_tokens: list[int]) -> Tensor:
        """The same rows through MTP module `depth`: hidden [R, dim] of each and the token [R] that it is given
        (`speculative` says which) -> [R, dim]."""
        tokens = torch.tensor(next_tokens, device=self.device)
        if self.prompts is not None:
            return self.prompts.draft(depth, hidden, tokens, self.prompts.rows(chunks))
        if self.fused is not None:
            return self.fused.draft(depth, hidden, tokens, *_places(chunks))
        parts, row = [], 0
        for chunk in chunks:
            mine = slice(row, row + len(chunk.tokens))
            row = mine.stop
            cache, positions = self.cache.select([chunk.slot]), torch.tensor(chunk.range, device=self.device)[None]
            output = self.model.mtp_forward(depth, hidden[None, mine], tokens[None, mine], positions, cache=cache)
            parts.append(output.hidden[0])
        return torch.cat(parts)

    def forget(self, slot: int) -> None:
        """The prompt of `slot` is finished, or given up."""
        if self.prompts is not None:
            self.prompts.forget(slot)

    @torch.no_grad()
    def step(self, tokens: Tensor, slots: Tensor, positions: Tensor, chosen: Chosen | None = None) -> Tensor:
        """Rows [R] -> hidden [R, dim] after the final norm."""
        if self.fused is not None:
            return self.fused.step(tokens, slots, positions, chosen)

        places, routed = [], []

        def run(cache: SelectedSlots, rows: Tensor) -> Tensor:
            output = self.model(tokens[rows], positions[rows], cache=cache, absorbed=True)
            places.append(rows.flatten())
            routed.append(output.routings)
            return output.hidden

        hidden = self._by_slot(slots, run)
        if chosen is not None:
            order = torch.cat(places).argsort()
            chosen += [ids[order] for ids in _experts(routed)]
        return hidden

    @torch.no_grad()
    def draft(self, depth: int, hidden: Tensor, next_tokens: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """Rows through MTP module `depth`: hidden [R, dim] of each position and the token [R] that it is given
        (`speculative` says which) -> hidden [R, dim] after the module's norm."""
        if self.fused is not None:
            return self.fused.draft(depth, hidden, next_tokens, slots, positions)

        def run(cache: SelectedSlots, rows: Tensor) -> Tensor:
            output = self.model.mtp_forward(
                depth, hidden[rows], next_tokens[rows], positions[rows], cache=cache, absorbed=True
            )
            return output.hidden

        return self._by_slot(slots, run)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[..., dim] -> [..., vocab] FP32."""
        if self.fused is not None:
            return self.fused.logits(hidden)
        if not self.one_by_one:
            return self.model.logits(hidden)
        rows = hidden.reshape(-1, 1, hidden.shape[-1])
        return torch.cat([self.model.logits(row) for row in rows]).view(*hidden.shape[:-1], -1)

    def _by_slot(self, slots: Tensor, run: Callable[[SelectedSlots, Tensor], Tensor]) -> Tensor:
        """`run` on rows [B, T] for each number T of rows that slots have, or for each row; its results [B, T, dim] as
        [R, dim]."""
        groups = _single_rows(slots) if self.one_by_one else _groups(slots)
        parts = [(rows, run(self.cache.select(group), rows)) for group, rows in groups]
        if len(parts) == 1:
            return parts[0][1].flatten(0, 1)
        output = parts[0][1].new_empty(len(slots), parts[0][1].shape[-1])
        for rows, hidden in parts:
            output[rows] = hidden
        return output


def _experts(routed: list[list[Routing]]) -> Chosen:
    """Of what several passes chose, each with a routing per MoE layer."""
    return [torch.cat([routing.expert_ids for routing in layer]) for layer in zip(*routed, strict=True)]


def _places(chunks: list[Chunk]) -> tuple[Tensor, Tensor]:
    """Slots and positions of all rows of chunks."""
    slots = torch.tensor([chunk.slot for chunk in chunks for _ in chunk.tokens])
    return slots, torch.tensor([position for chunk in chunks for position in chunk.range])


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
