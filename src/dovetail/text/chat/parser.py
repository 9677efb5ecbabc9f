"""Takes the text of a model apart, token by token: answer, reasoning and calls of tools.

One parser per choice serves streams and whole answers. What it returns depends on the text alone, not on how it is cut
into tokens: the beginning of a tag is held back until it is sure. White space beside a tag belongs to the tag.

A call is given out once it is complete and well formed; a malformed one comes back as content, tags and all.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from dovetail.text.chat.tool_calls import TAGS, Tags, ToolFormat, read_call
from dovetail.text.stream import pending
from dovetail.text.tokenizer import Tokenizer

THINK, END_THINK = "<think>", "</think>"
Reasoning = Literal["off", "tagged", "open"]  # none; between <think> and </think>; up to </think> from the start


@dataclass(frozen=True, slots=True)
class Content:
    """A part of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """A part of the reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of a tool begins."""

    index: int  # among the calls of the answer
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A part of the arguments of a call: together they are a JSON object, as the model wrote it."""

    index: int
    text: str


Delta = Content | Thought | CallStart | CallArguments


def new_call_id() -> str:
    return f"chatcmpl-tool-{uuid.uuid4().hex}"


class ChatParser:
    """`push` every token, then `finish`."""

    def __init__(
        self,
        tools: ToolFormat | None,
        reasoning: Reasoning,
        hidden: Mapping[int, str] | None = None,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        """`tools` is None where none are offered. `hidden` is of `hidden_tags`."""
        self.tool_format = tools
        self.tags = Tags(begin="", end="") if tools is None else TAGS[tools]
        self.hidden = hidden or {}
        self.new_id = new_id
        self.num_calls = 0
        self._reasoning = reasoning
        self._step = self._answer if reasoning == "off" else self._begin
        self._held = ""  # not looked at to its end
        self._layout = ""  # white space and tags around calls, which are text only if text follows
        self._skips = False  # a tag was the last thing, and white space behind it is part of it
        self._is_thinking = False
        self._scanned, self._in_string = 0, False  # of `_held`, in a call
        self._end = re.compile(rf'\\.|"|{re.escape(self.tags.end)}', re.DOTALL)

    def push(self, token: int, text: str) -> list[Delta]:
        """Add a token with the text that became sure with it."""
        self._held += text or self.hidden.get(token, "")
        return list(self._run(is_last=False))

    def finish(self, text: str = "") -> list[Delta]:
        """Add what text is left; no more will come."""
        self._held += text
        deltas = list(self._run(is_last=True))
        rest, self._layout = self._layout, ""
        return [*deltas, self._delta(rest)] if rest and not self._skips else deltas

    def _run(self, is_last: bool) -> Iterator[Delta]:
        """Take as many steps as there is text for; a step that changes nothing waits for more."""
        while True:
            before = self._held, self._step
            yield from self._step(is_last)
            if (self._held, self._step) == before:
                return

    def _begin(self, is_last: bool) -> Iterator[Delta]:
        """At the very beginning: <think>, or not."""
        text = self._held.lstrip()
        if THINK.startswith(text) and text != THINK and not is_last:
            return
        if text.startswith(THINK):
            self._held, self._skips = text.removeprefix(THINK), True
        self._is_thinking = self._skips = self._skips or self._reasoning == "open"
        self._step = self._think if self._is_thinking else self._answer
        yield from ()

    def _think(self, is_last: bool) -> Iterator[Delta]:
        tag, text = self._up_to((END_THINK,), is_last)
        yield from self._emit(text)
        if tag:
            self._layout, self._skips, self._is_thinking = "", True, False
            self._step = self._answer

    def _answer(self, is_last: bool) -> Iterator[Delta]:
        if self.tool_format is None:
            text, self._held = self._held, ""
            yield from self._emit(text)
            return
        tag, text = self._up_to((self.tags.begin, *self.tags.around), is_last)
        yield from self._emit(text)
        if tag == self.tags.begin:
            self._scanned, self._in_string = 0, False
            self._step = self._call
        elif tag and not (self._skips and self.num_calls and tag == self.tags.around[-1]):
            self._layout += tag

    def _call(self, is_last: bool) -> Iterator[Delta]:
        """In a call, up to the end tag that is in none of its strings."""
        for match in self._end.finditer(self._held, self._scanned):
            self._scanned = match.end()
            if match[0] == '"':
                self._in_string = not self._in_string
            elif match[0] == self.tags.end and not self._in_string:
                body, self._held = self._held[: match.start()], self._held[match.end() :]
                yield from self._called(body, self.tags.end)
                return
        self._scanned = max(self._scanned, len(self._held) - len(self.tags.end) + 1)
        if is_last:
            body, self._held = self._held, ""
            yield from self._called(body, "")

    def _called(self, body: str, end: str) -> Iterator[Delta]:
        assert self.tool_format is not None
        self._step = self._answer
        call = read_call(body, self.tool_format) if end else None
        if call is None:
            yield from self._emit(self.tags.begin + body + end)
            return
        yield CallStart(self.num_calls, self.new_id(), call[0])
        yield CallArguments(self.num_calls, call[1])
        self.num_calls += 1
        self._layout, self._skips = "", True

    def _up_to(self, tags: tuple[str, ...], is_last: bool) -> tuple[str, str]:
        """Take the text before the first of `tags` and the tag; without one, what cannot be the beginning of one."""
        found = [(start, tag) for tag in tags if (start := self._held.find(tag)) >= 0]
        if found:
            start, tag = min(found)
            text, self._held = self._held[:start], self._held[start + len(tag) :]
            return tag, text
        end = len(self._held) - (0 if is_last else max(pending(self._held, tag) for tag in tags))
        text, self._held = self._held[:end], self._held[end:]
        return "", text

    def _emit(self, text: str) -> Iterator[Delta]:
        """Give out text; white space at its end waits for what follows."""
        if self._skips and not self._layout:
            text = text.lstrip()
        body = text.rstrip()
        if body:
            yield self._delta(self._layout + body)
            self._layout, self._skips = "", False
        self._layout += text[len(body) :]

    def _delta(self, text: str) -> Delta:
        return Thought(text) if self._is_thinking else Content(text)


def hidden_tags(tokenizer: Tokenizer, tools: ToolFormat | None) -> dict[int, str]:
    """Return the tags that are special tokens, by id: such a token has no text of its own."""
    tags = [THINK, END_THINK, *((TAGS[tools].begin, TAGS[tools].end, *TAGS[tools].around) if tools else ())]
    ids = {tag: tokenizer.backend.token_to_id(tag) for tag in tags}
    return {i: tag for tag, i in ids.items() if i is not None and tokenizer.decode([i]) == ""}
