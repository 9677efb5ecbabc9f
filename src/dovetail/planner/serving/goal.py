"""The goal of serving: the lengths of prompts and outputs, and the speed for each user."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from dovetail.config import Record


class ServingGoal(Record):
    """What is to be served. Lengths are means over requests, in tokens.

    `context` is the mean number of tokens before an output token. If requests are alike, context = prompt_length +
    output_length / 2, so two of the three give the third. Context alone means a prompt with hardly any output.
    """

    context: float | None = Field(default=None, gt=0)
    prompt_length: float | None = Field(default=None, gt=0)
    output_length: float | None = Field(default=None, gt=0)
    output_speed: float | None = Field(default=None, gt=0)  # tokens/s that a user gets at least
    cache_hit: float = Field(default=0.0, ge=0, lt=1)  # share of prompt tokens whose latents are found stored
    prefill_tokens: int = Field(default=16384, gt=0)  # computed per GPU and step, both micro-batches [profile-data]
    requests_per_gpu: int | None = Field(default=None, gt=0)  # decoded at once; None: the most that is possible
    max_requests_per_gpu: int = Field(default=1024, gt=0)
    microbatches: Literal[1, 2] = 2
    mtp_acceptance: float | None = Field(default=None, ge=0, le=1)  # of the second token; None: no MTP
    exchange: Literal["low-latency", "normal"] = "low-latency"  # in decoding
    expert_imbalance: float = Field(default=1.0, ge=1)  # load of the fullest rank over the mean, after balancing

    @model_validator(mode="after")
    def _lengths_are_given(self) -> Self:
        if self.context is None and self.prompt_length is None:
            raise ValueError("expected context, or prompt_length (and output_length)")
        if self.context is not None and self.prompt_length is None and (self.output_length or 0) >= 2 * self.context:
            raise ValueError(
                f"output_length = {self.output_length:g} leaves no prompt in a mean context of {self.context:g}: "
                f"give less than {2 * self.context:g}"
            )
        return self

    @model_validator(mode="after")
    def _requests_are_allowed(self) -> Self:
        if (self.requests_per_gpu or 0) > self.max_requests_per_gpu:
            raise ValueError(
                f"requests_per_gpu = {self.requests_per_gpu} is above max_requests_per_gpu = "
                f"{self.max_requests_per_gpu}: raise that too"
            )
        return self

    @property
    def mean_context(self) -> float:
        if self.context is not None:
            return self.context
        assert self.prompt_length is not None
        return self.prompt_length + (self.output_length or 0) / 2

    @property
    def prompt(self) -> float:
        return self.prompt_length or self.mean_context - (self.output_length or 0) / 2

    @property
    def output(self) -> float | None:
        """The tokens of an output, or None if they are not known."""
        if self.output_length is None and self.context is not None and self.prompt_length is not None:
            return max(0.0, 2 * (self.context - self.prompt_length)) or None
        return self.output_length

    @property
    def computed_per_prompt(self) -> float:
        """The tokens of a prompt whose latents are not found stored."""
        return self.prompt * (1 - self.cache_hit)

    @property
    def step_seconds_allowed(self) -> float | None:
        """The longest decoding step for the output speed asked for; with MTP a step gives more than one token."""
        return self.tokens_per_step / self.output_speed if self.output_speed else None

    @property
    def tokens_per_step(self) -> float:
        """The output tokens of one request in a step: 1, or 1 + acceptance with MTP [V3 §5.4.3]."""
        return 1 + (self.mtp_acceptance or 0.0)
