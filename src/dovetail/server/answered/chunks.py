"""What streams of chunks have in common: chats and completions in OpenAI's older interface."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from dovetail.engine.stream import Token
from dovetail.server.answered.events import DONE, event
from dovetail.server.answered.logprobs import TokenNames, details
from dovetail.server.asked.sampling import Generating
from dovetail.server.errors import ApiError
from dovetail.server.served import Served
from dovetail.server.work import Work


class ChunkWriter:
    """Writes what stands around choices. `prefix` begins the answer's id, `kind` is a chunk's object."""

    def __init__(self, served: Served, asked: Generating, prefix: str, kind: str) -> None:
        self.served, self.kind, self.is_stream = served, kind, asked.stream
        self.names = TokenNames(served.tokenizer, as_ids=asked.return_tokens_as_token_ids)
        self.head: dict[str, Any] = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time())}
        self.shows_tokens = asked.token_details or asked.routed_experts
        self.gives_ids = asked.return_token_ids
        options = asked.stream_options
        self.has_usage = options is not None and options.include_usage
        self.always_usage = self.has_usage and options is not None and options.continuous_usage_stats

    def opening(self, work: Work) -> bytes:
        """Return what is sent before the first token: nothing."""
        return b""

    def closing(self, work: Work) -> bytes:
        """Return the usage, if it was asked for, and the end."""
        last = {**self.common(self.kind), "choices": [], "usage": work.usage()}
        return (event(last) if self.has_usage else b"") + DONE

    def failure(self, error: ApiError) -> bytes:
        """Return an error inside a stream, and the end."""
        return event(error.body()) + DONE

    def common(self, kind: str) -> dict[str, Any]:
        """Return what every chunk and the whole answer say of themselves."""
        common = {**self.head, "object": kind, "model": self.served.name}
        return {**common, "weights_version": self.served.engine.weights_version} if self.shows_tokens else common

    def chunk(self, work: Work, choice: dict[str, Any]) -> dict[str, Any]:
        """Return a chunk with one choice."""
        chunk = {**self.common(self.kind), "choices": [choice]}
        return {**chunk, "usage": work.usage()} if self.always_usage else chunk

    def of_tokens(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Return what is told of tokens beside their log-probabilities."""
        found: dict[str, Any] = {}
        if tokens and self.gives_ids:
            found["token_ids"] = [token.id for token in tokens]
        if tokens and self.shows_tokens:
            found["tokens"] = details(tokens)
        return found
