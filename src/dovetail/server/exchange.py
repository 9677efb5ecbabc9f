"""One request that generates, from the first byte of its body to the last byte of its answer.

A client that goes ends the generation at any stage: while its body is read, its prompt is tokenised, a whole answer is
made or a stream is sent. A client that does not read holds up its own answer only, and for a limited time.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import anyio
from anyio import to_thread
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dovetail.server.answered.choice import Piece
from dovetail.server.answered.events import encode
from dovetail.server.asked.body import BodyT, parse
from dovetail.server.errors import ApiError
from dovetail.server.metrics import Metrics
from dovetail.server.served import Served
from dovetail.server.settings import body_limit
from dovetail.server.work import Job, Work

log = logging.getLogger("dovetail.server")
_PREPARING = 4  # prompts tokenised at once; others wait their turn
# To make a Python object of each takes a microsecond in which nothing else runs. A text's own brackets count too.
_BRACKETS, _BRACKETS_PER_TOKEN = 65_536, 4
ValueT = TypeVar("ValueT")


class Answer(Protocol):
    """What an endpoint makes of a request."""

    is_stream: bool
    jobs: list[Job]

    def opening(self, work: Work) -> bytes: ...
    def piece(self, work: Work, index: int, piece: Piece) -> bytes: ...
    def closing(self, work: Work) -> bytes: ...
    def failure(self, error: ApiError) -> bytes: ...
    def whole(self, work: Work) -> dict[str, Any]: ...


class Desk:
    """What all requests share: the engine, its metrics, who is served now, and a few threads."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.metrics = Metrics(served.engine, served.name)
        self.threads = anyio.CapacityLimiter(_PREPARING)
        self.running = set[Work]()
        self.is_draining = False

    def cancel_all(self) -> None:
        """End every generation."""
        for work in list(self.running):
            work.cancel()

    async def in_thread(self, call: Callable[[], ValueT]) -> ValueT:
        """Run what takes long beside the event loop."""
        return await to_thread.run_sync(call, limiter=self.threads)


class Exchange(Response):
    """Answers one request: `make` turns its body into an Answer."""

    def __init__(self, desk: Desk, schema: type[BodyT], make: Callable[[Served, BodyT, int], Answer]) -> None:
        self.desk = desk
        self.background = None

        def prepare(data: bytes) -> Answer:
            return make(desk.served, parse(schema, data), secrets.randbits(62))

        self.prepare = prepare

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send, self.desk.served.config.slow_client_seconds)
        with Work(self.desk.served, self.desk.metrics) as work:
            self.desk.running.add(work)
            try:
                data = await read_body(self.desk.served, receive)
                await until_gone(receive, reply, lambda: self._answer(data, work, reply))
            except ApiError as error:
                if not reply.has_begun:
                    await reply.whole(error.status, error.body(), error.headers())
            finally:
                self.desk.running.discard(work)

    async def _answer(self, data: bytes, work: Work, reply: Reply) -> None:
        def submit() -> Answer:
            answer = self.prepare(data)
            work.submit(answer.jobs)
            return answer

        answer = await self.desk.in_thread(submit)
        if not answer.is_stream:

            async def ignore(index: int, piece: Piece) -> None:
                """A whole answer is the sum that each choice keeps."""

            await work.drive(ignore)
            await reply.whole(200, answer.whole(work))
            return
        await reply.begin()
        await reply.part(answer.opening(work))
        try:
            await work.drive(lambda index, piece: reply.part(answer.piece(work, index, piece)))
        except ApiError as error:
            await reply.part(answer.failure(error), is_last=True)
        except Exception:
            log.exception("a stream failed")
            await reply.part(answer.failure(ApiError(500, "internal error")), is_last=True)
        else:
            await reply.part(answer.closing(work), is_last=True)


class Reply:
    """The bytes on their way to one client."""

    def __init__(self, send: Send, seconds: float) -> None:
        self.send, self.seconds = send, seconds
        self.has_begun = False
        self.lock = anyio.Lock(fast_acquire=True)  # the choices of a stream take turns
        self.sending_since = math.inf

    async def whole(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = encode(body)
        lines = {"content-type": "application/json", "content-length": str(len(data)), **(headers or {})}
        await self._start(status, lines)
        await self.part(data, is_last=True)

    async def begin(self) -> None:
        lines = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        await self._start(200, {**lines, "x-accel-buffering": "no"})

    async def _start(self, status: int, lines: dict[str, str]) -> None:
        self.has_begun = True
        headers = [(name.encode(), value.encode()) for name, value in lines.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def part(self, data: bytes, *, is_last: bool = False) -> None:
        if not data and not is_last:
            return
        async with self.lock:
            self.sending_since = time.monotonic()
            await self.send({"type": "http.response.body", "body": data, "more_body": not is_last})
            self.sending_since = math.inf

    async def until_stuck(self) -> None:
        """Return once the client has read nothing for `seconds`: a timer for each part would cost more than a part."""
        while time.monotonic() - self.sending_since < self.seconds:
            await anyio.sleep(self.seconds / 4)


class Gone(Exception):
    """The client closed its connection."""


async def read_body(served: Served, receive: Receive) -> bytes:
    """Return the whole body. Raises ApiError for one that is too large or comes too slowly, Gone if the client went."""
    limit = body_limit(served.config, served.engine.max_model_len)
    data = bytearray()
    try:
        with anyio.fail_after(served.config.slow_client_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                data += message.get("body", b"")
                if len(data) > limit:
                    raise too_large(limit)
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        raise ApiError(408, "the body did not come in time") from None
    nested, most = data.count(b"[") + data.count(b"{"), _BRACKETS + _BRACKETS_PER_TOKEN * served.engine.max_model_len
    if nested > most:
        raise ApiError(
            400, f"the body has {nested:,} lists and objects or brackets in texts; at most {most:,} are read"
        )
    return bytes(data)


def too_large(limit: int) -> ApiError:
    """Return the refusal of a body."""
    return ApiError(413, f"the body has more than {limit:,} bytes; --max-body-bytes allows more", code="body_too_large")


async def until_gone(receive: Receive, reply: Reply, call: Callable[[], Awaitable[None]]) -> None:
    """Run `call` to its end, or until the client closes its connection. Raises TimeoutError where it reads nothing."""
    failures: list[Exception] = []

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        tasks.cancel_scope.cancel()

    async def time_out() -> None:
        await reply.until_stuck()
        failures.append(TimeoutError())
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        tasks.start_soon(time_out)
        try:
            await call()
        except Exception as error:
            failures.append(error)
        tasks.cancel_scope.cancel()
    if failures:
        raise failures[0]
