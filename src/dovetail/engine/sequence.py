"""A sequence being generated, and the completion that it becomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dovetail.engine.completion_text import CompletionText
from dovetail.engine.grammar import GrammarState
from dovetail.engine.sampler import SamplingParams
from dovetail.engine.scheduling.scheduler import Task
from dovetail.engine.stream import FinishReason, Output, PromptLogprobs, Token


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What one completion took."""

    drafted: int  # tokens proposed by MTP modules
    accepted: int  # of these, tokens that are in the completion
    steps: int  # runs of the main model after the prompt
    prefill_seconds: float  # of the passes that its prompt took part in, shared with its neighbours
    decode_seconds: float  # of the steps, likewise
    cached_tokens: int = 0  # of the prompt, found in the cache

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
    tokens: tuple[Token, ...] = ()  # each with its log-probabilities, where `SamplingParams.logprobs` asked for them
    prompt_logprobs: PromptLogprobs | None = None
    error: str | None = None  # why it ended, where `finish_reason` is "error"


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence(Task):
    """Mutable: grows until `finish_reason` is set."""

    max_tokens: int
    params: SamplingParams
    end_tokens: frozenset[int]  # any of them ends it
    text: CompletionText | None
    grammar: GrammarState | None = None
    counts: Counter[int] = field(default_factory=Counter)  # of generated tokens
    # Main hidden states [R, dim] of the last R positions that the model has seen: what MTP modules are fed next.
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    prompt_logprobs: PromptLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None  # why nothing can follow what was drawn
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end it, now or later."""
        return self.end_tokens if not self.params.ignore_eos else frozenset()

    def extend(self, drawn: Sequences[Token]) -> Output:
        """Append up to the first that ends the sequence, each with its text. All but the last were drafts; with an
        `error` behind them, the last one too."""
        num_drafts = len(drawn) - (self.error is None)
        tokens = []
        for number, token in enumerate(drawn):
            self._append(token.id)
            tokens.append(replace(token, text=self._taken(), is_draft=number < num_drafts))
            if self.finish_reason is not None:
                break
        if self.finish_reason is None and self.error is not None:
            self._finish("error", self.error)
        rest = "" if self.finish_reason is None else self._taken()
        return Output(
            tokens=tuple(tokens),
            text=rest,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            error=self.error,
        )

    def abort(self) -> Output:
        """End it where it is."""
        if self.text is not None:
            self.text.finish()
        self.finish_reason = "abort"
        return Output(text=self._taken(), finish_reason="abort")

    def _taken(self) -> str:
        """What of the text has become sure since the last call."""
        return "" if self.text is None else self.text.take()

    def completion(self, tokens: tuple[Token, ...] = ()) -> Completion:
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
                cached_tokens=self.cached,
            ),
            tokens=tokens,
            prompt_logprobs=self.prompt_logprobs,
            error=self.error,
        )

    def _append(self, token: int) -> None:
        self.tokens.append(token)
        if self.params.changes_logits:
            self.counts[token] += 1
        may_stop = self.completion_tokens >= self.params.min_tokens
        if token in self.ends:
            self._finish("stop")
        elif token in self.params.stop_token_ids and may_stop:
            self.stop_reason = token
            if self.params.include_stop and self.text is not None:
                self.text.push([token], False)
            self._finish("stop")
        elif self.text is not None:
            self.text.push([token], may_stop)
            if self.text.is_stopped:
                self._finish("stop")
        if self.grammar is not None and self.finish_reason is None:
            self._advance(self.grammar, token)
        if self.finish_reason is None and self.completion_tokens >= self.max_tokens:
            self._finish("length")

    def _advance(self, grammar: GrammarState, token: int) -> None:
        try:
            grammar.advance(token)
        except ValueError as error:  # this sequence ends, and no other one
            self._finish("error", str(error))
        else:
            if grammar.is_finished:
                self._finish("stop")

    def _finish(self, reason: FinishReason, error: str | None = None) -> None:
        if self.text is not None:
            self.text.finish()
            if self.text.is_stopped:  # also by the last held-back characters
                reason, self.stop_reason = "stop", self.text.stopped_by
        self.finish_reason, self.error = reason, error if reason == "error" else None
