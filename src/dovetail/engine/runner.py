"""Runs the model on rows of a batch: expanded attention for prompts, absorbed for short steps.

A row is one (slot, position) of the cache with the token that stands there. Rows of one slot are adjacent and
their positions ascend by one (a token and the drafts after it, to be verified together); all rows are written
to the cache before any is attended to, so each sees those of its slot up to itself. Rows are [R], slots and
positions int64 on the model's device. Here is the reference, in plain torch; on a CPU `fused` does the short steps,
unless the model has a recipe or a gate that its kernels lack.

On a CPU what a row computes is bit for bit the same whatever rows are beside it. The reference computes row by row
there, for the bits of torch's products depend on the number of rows. On a GPU it computes rows together, which is
many times faster: there a row depends on those beside it within rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dovetail.engine.cache import ContiguousCache, SelectedSlots
from dovetail.engine.fused import FusedSteps, takes
from dovetail.model.transformer import Transformer
from dovetail.numerics import capability


class Runner:
    """One model and the cache of the sequences it is working on."""

    def __init__(self, model: Transformer, cache: ContiguousCache, fused: bool = True) -> None:
        """`fused`: use the CPU kernels where they take the model."""
        self.model = model
        self.cache = cache
        on_cpu = capability.on_cpu(model.embed_tokens.weight, cache.data)
        self.fused = FusedSteps(model, cache) if fused and on_cpu and takes(model) else None
        self.one_by_one = self.device.type == "cpu"

    @property
    def device(self) -> torch.device:
        return self.cache.data.device

    @torch.no_grad()
    def prefill(self, slot: int, tokens: Tensor) -> Tensor:
        """tokens [T] from position 0 on into `slot` -> hidden [T, dim] after the final norm."""
        return self._prefill(slot, tokens, last_only=False)

    @torch.no_grad()
    def prefill_last(self, slot: int, tokens: Tensor) -> Tensor:
        """As `prefill`, but the last token's hidden [1, dim] alone, which is less work. Its bits are the same."""
        return self._prefill(slot, tokens, last_only=True)

    def _prefill(self, slot: int, tokens: Tensor, last_only: bool) -> Tensor:
        if self.fused is not None:
            return self.fused.prefill(slot, tokens, last_only)
        hidden: Tensor = self.model(tokens[None], cache=self.cache.select([slot])).hidden
        return hidden[0, -1:] if last_only else hidden[0]

    @torch.no_grad()
    def prefill_draft(self, depth: int, slot: int, hidden: Tensor, next_tokens: Tensor) -> Tensor:
        """MTP module `depth` over positions 0 .. T-1 of `slot`: hidden [T, dim], next_tokens [T] -> [T, dim]."""
        cache = self.cache.select([slot])
        return self.model.mtp_forward(depth, hidden[None], next_tokens[None], cache=cache).hidden[0]

    @torch.no_grad()
    def step(self, tokens: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """Rows [R] -> hidden [R, dim] after the final norm."""
        if self.fused is not None:
            return self.fused.step(tokens, slots, positions)

        def run(cache: SelectedSlots, rows: Tensor) -> Tensor:
            return self.model(tokens[rows], positions[rows], cache=cache, absorbed=True).hidden

        return self._by_slot(slots, run)

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
