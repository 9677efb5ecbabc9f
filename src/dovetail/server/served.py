"""What is served: an engine, the template of its conversations, its name, and the settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dovetail.engine.engine import Engine
from dovetail.server.errors import ApiError
from dovetail.server.settings import ServeConfig
from dovetail.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one token added to an answer: text, thought, the start of a tool call, or more of its arguments."""

    content: str = ""
    reasoning: str = ""
    call: int | None = None  # which call `id`, `name` and `arguments` belong to
    id: str = ""
    name: str = ""
    arguments: str = ""


class Parser(Protocol):
    """Reads an answer token by token."""

    def push(self, token_id: int, text: str) -> list[Delta]:
        """Take the next token and the text that became sure with it."""
        ...

    def finish(self, text: str) -> list[Delta]:
        """Take the text that became sure because the answer ended."""
        ...


class NewParser(Protocol):
    """Makes what reads one answer."""

    def __call__(self, *, reads_calls: bool) -> Parser:
        """Return a fresh parser; one that reads no calls takes them for text."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A conversation as the model reads it."""

    tokens: list[int]
    new_parser: NewParser
    after: str = ""  # the thought that the model begins with ends with this; a grammar begins behind it


class Template(Protocol):
    """Writes a conversation as the model reads it."""

    def prompt(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> Prompt:
        """Return the prompt for an answer to `messages`.

        `options`: tools, add_generation_prompt, continue_final_message, and what the template knows beside. Raises
        ValueError for a conversation that the template refuses.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """Everything that an endpoint reads."""

    engine: Engine
    tokenizer: Tokenizer
    template: Template
    name: str
    config: ServeConfig
    created: int  # seconds since 1970
    defaults: Mapping[str, Any] = field(default_factory=dict)  # how to draw where a request does not say

    def check_model(self, model: str | None) -> None:
        """Raise ApiError (404) for the name of another model."""
        if model not in (None, self.name):
            message = f"the model {model[:80]!r} does not exist; this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_length(self, text: str, param: str) -> None:
        """Raise ApiError (400) for a text so long that encoding it, which takes seconds for megabytes, is no use."""
        limit = self.engine.max_model_len
        if len(text) > limit and (least := self.tokenizer.least_tokens(text)) >= limit:
            message = f"{param}: {len(text):,} characters are {least:,} tokens at least; max_model_len = {limit:,}"
            raise ApiError(400, message, param=param, code="context_length_exceeded")
