"""One choice on its way out: what the engine gave, read for streams and whole answers alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from dovetail.engine.stream import Output, Token
from dovetail.server.served import Delta, Parser


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one step of the engine added to a choice. A stream sends pieces; a whole answer is their sum."""

    deltas: tuple[Delta, ...] = ()
    tokens: tuple[Token, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class PlainText:
    """Reads a completion: all of it is content."""

    def push(self, token_id: int, text: str) -> list[Delta]:
        """Take the next token's text."""
        return [Delta(content=text)] if text else []

    def finish(self, text: str) -> list[Delta]:
        """Take the rest."""
        return [Delta(content=text)] if text else []


@dataclass(slots=True, kw_only=True)
class Choice:
    """The answer so far."""

    parser: Parser
    names_calls: bool = True  # whether a call makes the finish reason "tool_calls"
    keeps_tokens: bool = False  # whether the whole answer tells of each token
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[Delta] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    num_tokens: int = 0
    num_reasoning: int = 0  # tokens up to the last one of a thought
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def feed(self, output: Output) -> Piece:
        """Read one step's output."""
        deltas: list[Delta] = []
        for token in output.tokens:
            self.num_tokens += 1
            self._add(self.parser.push(token.id, token.text), deltas)
        if output.finish_reason is not None:
            self._add(self.parser.finish(output.text), deltas)
            is_call = bool(self.calls) and self.names_calls and output.finish_reason == "stop"
            self.finish_reason = "tool_calls" if is_call else output.finish_reason
            self.stop_reason = output.stop_reason
        if self.keeps_tokens:
            self.tokens += output.tokens
        return Piece(
            deltas=tuple(deltas),
            tokens=output.tokens,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _add(self, new: Iterable[Delta], deltas: list[Delta]) -> None:
        for delta in new:
            if delta.reasoning:
                self.num_reasoning = self.num_tokens
                self.reasoning.append(delta.reasoning)
            if delta.content:
                self.content.append(delta.content)
            if delta.call is not None:
                join(self.calls, delta)
            join(deltas, delta)


def join(deltas: list[Delta], delta: Delta) -> None:
    """Append `delta`, as part of the last one if it goes on with it."""
    last = deltas[-1] if deltas else None
    if last is None or last.call != delta.call or delta.id or bool(last.content) != bool(delta.content):
        deltas.append(delta)
        return
    deltas[-1] = replace(
        last,
        content=last.content + delta.content,
        reasoning=last.reasoning + delta.reasoning,
        arguments=last.arguments + delta.arguments,
    )
