"""Conversations in the checkpoint's own template, or in the one that a user gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from dovetail.server.answered.choice import PlainText
from dovetail.server.served import Parser
from dovetail.text.chat import ChatTemplate
from dovetail.text.tokenizer import Tokenizer


class Conversation:
    """A template beside the tokenizer that its text goes through."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self.template, self.tokenizer = template, tokenizer

    @classmethod
    def load(cls, directory: Path, override: Path | None, tokenizer: Tokenizer) -> Self:
        """Read the template of a directory, or the file `override`. Raises ValueError for one that is malformed."""
        return cls(ChatTemplate.load(directory, override), tokenizer)

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> tuple[list[int], Callable[[], Parser]]:
        """Return the prompt's tokens, and what makes a reader of one answer to it. Raises ValueError."""
        text = self.template.render(messages, **options)
        return self.tokenizer.encode(text), PlainText
