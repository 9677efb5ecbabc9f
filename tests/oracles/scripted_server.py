"""A server of OpenAI's API that answers as it is told, for what speaks to servers: no model, no timing of its own.

`Scripted` says what it takes and how its streams go. `serving(app)` runs an app on a free port.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

Answer = Literal["whole", "cut off", "error", "empty", "refused", "not json"]

ENDS: dict[Answer, str] = {  # after the first chunk
    "cut off": ": gone\n\n",
    "error": 'data: {"error": {"message": "out of memory"}}\n\n',
    "not json": "data: {\n\n",
}


@dataclass(kw_only=True)
class Scripted:
    """A server for text and token ids. What it was asked stands in `bodies`."""

    models: tuple[str, ...] = ("tiny",)
    key: str | None = None
    takes_ids: bool = True
    refused: tuple[str, ...] = ()  # fields that it does not know
    usage: Literal["each", "end", "never"] = "each"
    per_chunk: int = 1  # tokens
    pause: float = 0.0  # seconds between chunks
    answers: dict[int, Answer] = field(default_factory=dict)  # by the request's seed; whole where nothing is said
    bodies: list[dict[str, Any]] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0

    def app(self) -> Starlette:
        paths = ("/v1/completions", "/v1/chat/completions")
        routes = [Route(path, self.complete, methods=["POST"]) for path in paths]
        return Starlette(routes=[Route("/v1/models", self.list_models), *routes])

    async def list_models(self, request: Request) -> Response:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "no such key"}}, 401)
        return JSONResponse({"data": [{"id": name} for name in self.models]})

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        unknown = [name for name in self.refused if name in body]
        if unknown or (isinstance(body.get("prompt"), list) and not self.takes_ids):
            return JSONResponse({"error": {"message": f"not taken: {unknown or 'ids'}"}}, 400)
        if "stream_options" in body and not body.get("stream"):
            return JSONResponse({"error": {"message": "stream_options without stream"}}, 400)
        answer = self.answers.get(body.get("seed", -1), "whole")
        if answer == "refused":
            return JSONResponse({"error": {"message": "the waiting room is full"}}, 429, {"retry-after": "1"})
        if not body.get("stream"):
            return JSONResponse({"choices": [{"text": "a"}], "usage": self.counts(body, 1)})
        self.bodies.append(body)
        return StreamingResponse(self.stream(body, answer), media_type="text/event-stream")

    async def stream(self, body: dict[str, Any], answer: Answer) -> AsyncIterator[str]:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            tokens = 0 if answer == "empty" else body["max_tokens"]
            for begin in range(0, tokens, self.per_chunk):
                await asyncio.sleep(self.pause)
                if begin and answer in ENDS:
                    yield ENDS[answer]
                    return
                sofar = min(tokens, begin + self.per_chunk)
                yield self.event(body, "a" * (sofar - begin), sofar)
            yield self.event(body, "", tokens, "length")
            if self.usage != "never":
                yield f"data: {json.dumps({'choices': [], 'usage': self.counts(body, tokens)})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.under_way -= 1

    def event(self, body: dict[str, Any], text: str, sofar: int, finish: str | None = None) -> str:
        part = {"delta": {"content": text}} if "messages" in body else {"text": text}
        event: dict[str, Any] = {"choices": [{"index": 0, **part, "finish_reason": finish}]}
        if self.usage == "each":
            event["usage"] = self.counts(body, sofar)
        return f"data: {json.dumps(event)}\n\n"

    def counts(self, body: dict[str, Any], completion: int) -> dict[str, Any]:
        """Two tokens a word, and five for the template of a chat."""
        prompt = body.get("prompt", "")
        if isinstance(prompt, list):
            tokens = len(prompt)
        else:
            text = prompt or body["messages"][0]["content"]
            tokens = 2 * len(text.split()) + (5 if "messages" in body else 0)
        return {"prompt_tokens": tokens, "completion_tokens": completion}


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Run an ASGI app on a free port of this machine; yields its address."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()  # before anybody asks
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
