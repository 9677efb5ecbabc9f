"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, FailFast, Field, model_validator

from dovetail.server.asked.body import Body
from dovetail.server.asked.sampling import MOST_CHOICES, MOST_LOGPROBS, Generating
from dovetail.server.errors import ApiError, Refusal

Prompt = str | list[int]
MOST_PROMPTS = 1024  # of one request


def _prompts(value: Any) -> Any:
    """Return a list of texts and lists of ids, whichever of the four forms `value` has."""
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("expected a text, a list of texts, a list of token ids, or a list of such lists; none empty")
    if len(value) > MOST_PROMPTS:
        raise ValueError(f"{len(value):,} prompts; at most {MOST_PROMPTS:,} go into one request")
    for i, prompt in enumerate(value):
        if not isinstance(prompt, str) and not _is_ids(prompt):
            raise ValueError(f"prompt {i} is neither text nor a list of token ids")
    return value


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)


class CompletionRequest(Generating):
    """Prompts to complete."""

    prompt: Annotated[list[Any], BeforeValidator(_prompts)]  # of str and list[int]
    max_tokens: int = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    echo: bool = False
    best_of: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    add_special_tokens: bool = True
    REFUSED: ClassVar = {
        "suffix": "put the tokens of fill-in-the-middle into the prompt",
        "tools": "use /v1/chat/completions",
        "messages": "use /v1/chat/completions",
        "max_completion_tokens": "use max_tokens",
        "top_logprobs": "use logprobs, which is a number here",
        "store": "nothing is kept",
    }

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise Refusal(ApiError(400, "max_tokens = 0 gives nothing without echo = true", param="max_tokens"))
        if self.max_tokens == 0 and self.stream:
            raise Refusal(ApiError(400, "max_tokens = 0 needs stream = false", param="max_tokens"))
        if self.echo and self.stream and self.logprobs is not None:
            raise Refusal(ApiError(400, "echo with logprobs needs stream = false", param="echo"))
        if self.best_of is not None and self.best_of < self.n:
            raise Refusal(ApiError(400, f"best_of = {self.best_of} is less than n = {self.n}", param="best_of"))
        if self.stream and self.draws > self.n:
            raise Refusal(ApiError(400, "best_of above n needs stream = false", param="best_of"))
        if self.draws * len(self.prompt) > MOST_PROMPTS:
            count = self.draws * len(self.prompt)
            raise ValueError(f"{count:,} completions are asked for; at most {MOST_PROMPTS:,} go into one request")
        return self

    @property
    def draws(self) -> int:
        """Completions made of each prompt; the best `n` are given back."""
        return self.best_of or self.n


class TokenizeRequest(Body):
    """A text to cut into tokens."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False
    REFUSED: ClassVar = {"messages": "give the text as prompt"}


class DetokenizeRequest(Body):
    """Tokens to join into a text."""

    model: str | None = None
    tokens: Annotated[list[int], FailFast()]
