"""A streamed answer while it comes: its chunks, and the tokens that the server says it has so far."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dovetail.bench.outcome import Counting


class BrokenAnswer(Exception):
    """A request failed; `kind` is what failures are counted by."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Answer:
    """Takes the events of one stream."""

    def __init__(self) -> None:
        self.usage: dict[str, Any] = {}  # the last that came
        self.finish_reason: str | None = None
        self._chunks: list[tuple[float, int | None, bool]] = []  # when, tokens so far by usage, whether text came

    def take(self, data: str, moment: float) -> None:
        """Take in one event. Raises BrokenAnswer for an error in the stream."""
        try:
            event = json.loads(data)
        except json.JSONDecodeError:
            raise BrokenAnswer("not JSON", f"the stream holds {data[:80]!r}") from None
        if event.get("error"):
            raise BrokenAnswer("error in the stream", said(data.encode()))
        usage = event.get("usage") or {}
        self.usage.update(usage)
        for choice in event.get("choices") or ():
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            self._chunks.append((moment, usage.get("completion_tokens"), has_text(choice)))

    def counted(self) -> tuple[tuple[tuple[float, float], ...], Counting]:
        """Return the chunks that brought tokens, with how many, and how they were counted."""
        if self._chunks and all(tokens is not None for _, tokens, _ in self._chunks):
            before, out = 0, []
            for moment, tokens, _ in self._chunks:
                if tokens is not None and tokens > before:
                    out.append((moment, float(tokens - before)))
                    before = tokens
            return tuple(out), "usage of every chunk"
        moments = [moment for moment, _, is_text in self._chunks if is_text]
        total = self.usage.get("completion_tokens")
        if total and moments:
            return tuple((moment, total / len(moments)) for moment in moments), "usage at the end"
        return tuple((moment, 1.0) for moment in moments), "one token a chunk"


def has_text(choice: Mapping[str, Any]) -> bool:
    """Tell whether a chunk brought text, of whatever kind."""
    delta = choice.get("delta") or {}
    kinds = ("content", "reasoning_content", "reasoning", "tool_calls")
    return bool(choice.get("text") or any(delta.get(kind) for kind in kinds))


def said(body: bytes) -> str:
    """Return what an error's body says, in one line."""
    text = body.decode("utf-8", "replace")
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = text
    while isinstance(found, dict):
        found = next((found[key] for key in ("error", "message", "detail") if found.get(key)), json.dumps(found))
    return " ".join(str(found).split())[:300]
