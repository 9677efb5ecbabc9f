"""What every request passes before its body is read: key, size, form, and whether there is room.

It is also the last to see an error: whatever went wrong inside is logged here.
"""

from __future__ import annotations

import hmac
import logging

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from dovetail.server.errors import ApiError
from dovetail.server.exchange import Desk, Gone, Reply, too_large
from dovetail.server.settings import body_limit

log = logging.getLogger("dovetail.server")
_GUARDED = ("/v1/", "/tokenize", "/detokenize", "/metrics")  # want the key, where there is one


class Gate:
    """An ASGI application around another."""

    def __init__(self, app: ASGIApp, desk: Desk) -> None:
        self.app, self.desk = app, desk
        self.num_inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self.num_inside += 1
        try:
            self._check(scope)
        except ApiError as error:
            reply = Reply(send, self.desk.served.config.slow_client_seconds)
            await reply.whole(error.status, error.body(), error.headers())
        else:
            await self._enter(scope, receive, send)
        finally:
            self.num_inside -= 1

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except (Gone, TimeoutError):  # nobody is there, or nobody reads
            return
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])

    def _check(self, scope: Scope) -> None:
        headers, config = Headers(scope=scope), self.desk.served.config
        if config.api_key is not None and scope["path"].startswith(_GUARDED):
            given = headers.get("authorization", "")
            if not hmac.compare_digest(given.encode("latin-1"), f"Bearer {config.api_key}".encode()):
                raise ApiError(401, "no or wrong API key: send Authorization: Bearer KEY", code="invalid_api_key")
        if scope["method"] != "POST":
            return
        if self.desk.is_draining:
            raise ApiError(503, "the server is stopping", code="stopping", retry_after=5)
        if self.num_inside > config.max_requests:
            raise ApiError(429, f"{config.max_requests} requests are being served", code="full", retry_after=1)
        limit = body_limit(config, self.desk.served.engine.max_model_len)
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdecimal() and (len(length) > 18 or int(length) > limit):
            raise too_large(limit)
        form = headers.get("content-type", "").partition(";")[0].strip().lower()
        if form != "application/json":  # a page of another site could send other forms without asking
            raise ApiError(415, f"content-type is {form[:80]!r}; send application/json")
