"""What every request passes before its body is read: key, size, form, and whether there is room.

It is also the last to see an error: whatever went wrong inside is logged here.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from dovetail.server.errors import ApiError
from dovetail.server.exchange import Desk, Gone, Reply, too_large
from dovetail.server.settings import body_limit

log = logging.getLogger("dovetail.server")
_PORT = re.compile(r":\d*$")
_GUARDED = ("/v1/", "/tokenize", "/detokenize", "/metrics")  # want the key, where there is one


def is_own_name(host: str, listens_at: str) -> bool:
    """Return whether a request to `host` may be meant for a server of this machine's users alone.

    A page of another site can have its own name resolved to 127.0.0.1, and then read what a server without a key
    answers. Its name is still in the Host header. A server at a public address goes by names that are not known here.
    """
    name = _PORT.sub("", host).strip("[]").lower()
    return not is_local(listens_at) or not name or name == listens_at.lower() or is_local(name)


def is_local(host: str) -> bool:
    """Return whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


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
        host = headers.get("host", "")
        if config.api_key is None and not is_own_name(host, config.host):
            message = (
                f"the host {host[:80]!r} is not this server's: ask {config.host}, or start the server with --api-key"
            )
            raise ApiError(403, message, code="host_not_allowed")
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
