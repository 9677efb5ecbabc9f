"""Draws a token from logits: temperature, top-k, top-p, min-p, in this order.

Each filter looks at the distribution that the one before it left, renormalised, as Hugging Face's
`generate` has it. (vLLM puts min-p before top-p; only then does the order matter, since min-p compares with the
largest probability and top-k with ranks, neither of which renormalising changes.) Ties go to the lower id.

A draw inverts the cumulative distribution at one number of the sequence's own generator, so what a sequence
gets depends on its seed and its tokens, never on its neighbours in the batch.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from dovetail.config import Record

MINIMUM_TEMPERATURE = 1e-4  # below it the division of FP32 logits says no more than their order


class SamplingParams(Record):
    """How to choose tokens and when to stop."""

    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)  # 0: greedy
    top_k: int = Field(default=0, ge=0)  # 0: all
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)  # share of the largest probability
    max_tokens: int = Field(default=128, ge=1)
    stop: tuple[str, ...] = ()
    seed: int = Field(default=0, ge=0, lt=2**63)
    ignore_eos: bool = False

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("an empty stop string would stop every completion at its start; leave it out")
        return stop

    @model_validator(mode="after")
    def _check(self) -> Self:
        if 0 < self.temperature < MINIMUM_TEMPERATURE:
            raise ValueError(
                f"temperature = {self.temperature} is too close to 0 (at least {MINIMUM_TEMPERATURE}); "
                "for the most likely token set temperature = 0"
            )
        return self

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def generator(self) -> torch.Generator:
        """A fresh one, on the CPU whatever the model's device, so that seeds mean the same everywhere."""
        return torch.Generator().manual_seed(self.seed)


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


def uniform(generator: torch.Generator) -> float:
    """In [0, 1), with 53 random bits."""
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def sample(distribution: Tensor, generator: torch.Generator) -> int:
    """One token from distribution [V], which need not be normalised; never one of probability 0."""
    cumulative = distribution.double().cumsum(dim=0)
    target = cumulative[-1:] * uniform(generator)
    token = int(torch.searchsorted(cumulative, target, right=True))
    if token == len(cumulative):  # rounded up to the total
        token = int(distribution.nonzero()[-1])
    return token
