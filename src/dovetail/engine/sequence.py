"""A sequence being generated, and the completion that it becomes."""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dovetail.engine.completion_text import CompletionText
from dovetail.engine.sampler import SamplingParams

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What one completion took."""

    drafted: int  # tokens proposed by MTP modules
    accepted: int  # of these, tokens that are in the completion
    steps: int  # runs of the main model after the prompt
    prefill_seconds: float
    decode_seconds: float  # of the steps this sequence took part in, shared with its neighbours

    @property
    def acceptance(self) -> float:
        """Share of drafts accepted; 0 if none were made."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def summary(self) -> str:
        """One line for a person."""
        parts = f"prompt {self.prefill_seconds:.2f} s, {self.steps} steps in {self.decode_seconds:.2f} s"
        return f"{parts}, {self.acceptance:.0%} of {self.drafted} drafts accepted" if self.drafted else parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    text: str  # without end-of-sequence token and stop string; empty without a tokenizer
    token_ids: list[int]  # all that were generated, those of a stop string and the end-of-sequence token included
    finish_reason: FinishReason
    prompt_tokens: int
    statistics: Statistics


@dataclass(slots=True, kw_only=True)
class Sequence:
    """Mutable: grows until `finish_reason` is set."""

    tokens: list[int]  # prompt, then completion
    prompt_tokens: int
    max_tokens: int
    params: SamplingParams
    end_tokens: frozenset[int]  # any of them ends it
    text: CompletionText | None
    generator: torch.Generator
    slot: int = -1
    # Main hidden states [R, dim] of the last R positions that the model has seen: what MTP modules are fed next.
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    finish_reason: FinishReason | None = None
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    def extend(self, tokens: Sequences[int]) -> int:
        """Append up to the first token that ends the sequence; how many that were."""
        for count, token in enumerate(tokens, start=1):
            self.tokens.append(token)
            if token in self.end_tokens and not self.params.ignore_eos:
                self._finish("stop")
            else:
                self._extend_text(token)
            if self.finish_reason is None and self.completion_tokens >= self.max_tokens:
                self._finish("length")
            if self.finish_reason is not None:
                return count
        return len(tokens)

    def completion(self) -> Completion:
        assert self.finish_reason is not None, "the sequence is still growing"
        return Completion(
            text=self.text.text if self.text is not None else "",
            token_ids=self.tokens[self.prompt_tokens :],
            finish_reason=self.finish_reason,
            prompt_tokens=self.prompt_tokens,
            statistics=Statistics(
                drafted=self.drafted,
                accepted=self.accepted,
                steps=self.steps,
                prefill_seconds=self.prefill_seconds,
                decode_seconds=self.decode_seconds,
            ),
        )

    def _extend_text(self, token: int) -> None:
        if self.text is not None:
            self.text.push([token])
            if self.text.is_stopped:
                self._finish("stop")

    def _finish(self, reason: FinishReason) -> None:
        if self.text is not None:
            self.text.finish()
            if self.text.is_stopped:  # also by the last held-back characters
                reason = "stop"
        self.finish_reason = reason
