"""Draws a token from logits: temperature, top-k, top-p, min-p, in this order.

Each filter looks at the distribution that the one before it left, renormalised, as Hugging Face's
`generate` has it. (vLLM puts min-p before top-p; only then does the order matter, since min-p compares with the
largest probability and top-k with ranks, neither of which renormalising changes.) Ties go to the lower id.

A draw is a race: token i, of probability p_i, arrives at time E_i / p_i, and the first one wins, where E_i is an
exponential random number made from the seed, the position and i (`race_numba`). So what comes out at a position depends
on the seed and the distribution there, and on no earlier draw: a token that was drafted and then verified is the token
that would have been drawn without drafts, and no neighbour in the batch changes it.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from dovetail.config import Record
from dovetail.engine.grammar import Grammar
from dovetail.numerics.cpu import race_numba

MINIMUM_TEMPERATURE = 1e-4  # below it the division of FP32 logits says no more than their order


class SamplingParams(Record):
    """How to choose tokens, when to stop, and what to say of each token."""

    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)  # 0: greedy
    top_k: int = Field(default=0, ge=0)  # 0: all
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)  # share of the largest probability
    max_tokens: int = Field(default=128, ge=1)
    min_tokens: int = Field(default=0, ge=0)  # before it nothing stops a completion
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False  # the text keeps the stop string
    seed: int = Field(default=0, ge=0, lt=2**63)
    ignore_eos: bool = False
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)  # off a logit whose token was generated
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)  # off it each time
    repetition_penalty: float = Field(default=1.0, gt=0, allow_inf_nan=False)  # divides it; prompt tokens count too
    logit_bias: dict[int, float] = Field(default_factory=dict)  # by token, -100 to 100
    logprobs: int | None = Field(default=None, ge=0)  # of the token chosen, and of so many of the likeliest
    prompt_logprobs: int | None = Field(default=None, ge=0)  # likewise, of the prompt's tokens
    routed_experts: bool = False  # say which experts each token went to
    grammar: Grammar | None = None  # what the completion has to match

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("an empty stop string would stop every completion at its start; leave it out")
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _in_range(cls, bias: dict[int, float]) -> dict[int, float]:
        for token, value in bias.items():
            if not -100 <= value <= 100:
                raise ValueError(f"logit_bias of token {token} is {value}; it goes from -100 to 100")
        return bias

    @model_validator(mode="after")
    def _check(self) -> Self:
        if 0 < self.temperature < MINIMUM_TEMPERATURE:
            raise ValueError(
                f"temperature = {self.temperature} is too close to 0 (at least {MINIMUM_TEMPERATURE}); "
                "for the most likely token set temperature = 0"
            )
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens = {self.min_tokens} is more than max_tokens = {self.max_tokens}")
        return self

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def changes_logits(self) -> bool:
        """Whether anything is done to logits before a token is drawn."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1
            or self.logit_bias
            or self.min_tokens
            or self.grammar
        )


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution [..., V] FP32 that tokens are drawn from; logits [..., V]. Greedy gives 0 and 1."""
    logits = logits.float()
    if params.is_greedy:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    distribution = (logits / params.temperature).softmax(dim=-1)
    if params.top_k or params.top_p < 1:
        distribution = _keep_likely(distribution, params.top_k, params.top_p)
    if params.min_p > 0:
        is_out = distribution < params.min_p * distribution.amax(dim=-1, keepdim=True)
        distribution = _renormalized(distribution.masked_fill(is_out, 0.0))
    return distribution


def _keep_likely(distribution: Tensor, top_k: int, top_p: float) -> Tensor:
    """The top_k likeliest tokens, and of those the fewest that together reach top_p."""
    likely, ids = distribution.sort(dim=-1, descending=True, stable=True)
    if top_k:
        likely[..., top_k:] = 0.0
        likely = _renormalized(likely)
    before = likely.double().cumsum(dim=-1) - likely  # mass of the tokens ahead; 0 for the first, which stays
    likely = _renormalized(likely.masked_fill(before >= top_p, 0.0)) if top_p < 1 else likely
    return torch.zeros_like(distribution).scatter_(-1, ids, likely)


def _renormalized(distribution: Tensor) -> Tensor:
    return distribution / distribution.sum(dim=-1, keepdim=True)


def sample(distribution: Tensor, seed: int, position: int) -> int:
    """One token from distribution [V], which need not be normalised; never one of probability 0."""
    return int(race_numba.first(distribution.float().cpu().numpy(), seed, position))
