"""Conversations in the checkpoint's own template, or in the one that a user chose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from dovetail.server.served import Delta, Parser, Prompt
from dovetail.text.chat.parser import END_THINK, CallArguments, CallStart, ChatParser, Content, Thought, hidden_tags
from dovetail.text.chat.parser import Delta as Part
from dovetail.text.chat.template import ChatTemplate
from dovetail.text.tokenizer import Tokenizer


class Conversation:
    """A template beside the tokenizer that its text goes through."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self.template, self.tokenizer = template, tokenizer

    @classmethod
    def load(cls, directory: Path, override: str | None, tokenizer: Tokenizer) -> Self:
        """Read the template of a directory, or `override`. Raises ValueError for one that is malformed."""
        return cls(ChatTemplate.load(directory, tokenizer, override), tokenizer)

    def prompt(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> Prompt:
        """Return the prompt for an answer. Raises ValueError."""
        written = self.template.render(messages, **options)

        def new_parser(*, reads_calls: bool) -> Parser:
            calls = self.template.tool_format if reads_calls else None
            return _Reader(ChatParser(calls, written.reasoning, hidden_tags(self.tokenizer, calls)))

        return Prompt(
            tokens=self.template.encode(written),
            new_parser=new_parser,
            after=END_THINK if written.reasoning == "open" else "",
        )


class _Reader:
    """Hands on what a ChatParser finds."""

    def __init__(self, parser: ChatParser) -> None:
        self.parser = parser

    def push(self, token_id: int, text: str) -> list[Delta]:
        return _deltas(self.parser.push(token_id, text))

    def finish(self, text: str) -> list[Delta]:
        return _deltas(self.parser.finish(text))


def _deltas(parts: Iterable[Part]) -> list[Delta]:
    deltas = []
    for part in parts:
        match part:
            case Content(text):
                deltas.append(Delta(content=text))
            case Thought(text):
                deltas.append(Delta(reasoning=text))
            case CallStart(index, call_id, name):
                deltas.append(Delta(call=index, id=call_id, name=name))
            case CallArguments(index, text):
                deltas.append(Delta(call=index, arguments=text))
    return deltas
