"""The application: which path is answered by what."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from dovetail.server.answered.chat import ChatAnswer
from dovetail.server.answered.completion import CompletionAnswer, to_tokens
from dovetail.server.answered.events import encode
from dovetail.server.answered.logprobs import TokenNames
from dovetail.server.answered.responses import ResponsesAnswer
from dovetail.server.asked.body import BodyT, parse
from dovetail.server.asked.chat import ChatRequest
from dovetail.server.asked.completion import CompletionRequest, DetokenizeRequest, TokenizeRequest
from dovetail.server.asked.responses import ResponsesRequest
from dovetail.server.errors import ApiError
from dovetail.server.exchange import Answer, Desk, Exchange, read_body
from dovetail.server.gate import Gate
from dovetail.server.metrics import CONTENT_TYPE
from dovetail.server.page import read_pages
from dovetail.server.served import Served


def build_app(desk: Desk) -> ASGIApp:
    """Return the whole application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # FastAPI's own pages load scripts of other hosts
    _add_generation(app, desk)
    _add_tokens(app, desk)
    _add_state(app, desk)
    for path, page in read_pages().items():
        app.add_api_route(path, _always(page), methods=["GET", "HEAD"])

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return _json(error.body(), error.status, error.headers())

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:  # the gate logs it
        return _json(ApiError(500, "internal error").body(), 500)

    @app.exception_handler(HTTPException)
    async def not_there(request: Request, error: HTTPException) -> Response:
        path = request.url.path[:200]
        text = f"{path} is not there" if error.status_code == 404 else f"{request.method} is not for {path}"
        return _json(ApiError(error.status_code, text).body(), error.status_code, error.headers)

    return Gate(app, desk)


def _always(response: Response) -> Callable[[], Awaitable[Response]]:
    async def get() -> Response:
        return response

    return get


def _json(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(encode(value), status, headers=headers, media_type="application/json")


def _add_generation(app: FastAPI, desk: Desk) -> None:
    def add(path: str, schema: type[BodyT], make: Callable[[Served, BodyT, int], Answer]) -> None:
        async def post() -> Exchange:
            return Exchange(desk, schema, make)

        app.add_api_route(path, post, methods=["POST"], response_model=None)

    add("/v1/chat/completions", ChatRequest, ChatAnswer)
    add("/v1/completions", CompletionRequest, CompletionAnswer)
    add("/v1/responses", ResponsesRequest, ResponsesAnswer)


def _add_tokens(app: FastAPI, desk: Desk) -> None:
    served = desk.served
    tokenizer = served.tokenizer

    def tokenize(asked: TokenizeRequest) -> dict[str, object]:
        served.check_model(asked.model)
        ids = to_tokens(served, asked.prompt, adds_special=asked.add_special_tokens)
        names = TokenNames(tokenizer)
        strings = [names.name(each) for each in ids] if asked.return_token_strs else None
        return {"count": len(ids), "max_model_len": served.engine.max_model_len, "tokens": ids, "token_strs": strings}

    def detokenize(asked: DetokenizeRequest) -> dict[str, object]:
        served.check_model(asked.model)
        for token_id in asked.tokens:
            if not 0 <= token_id < tokenizer.vocab_size:
                message = f"{token_id} is not a token; the tokenizer has {tokenizer.vocab_size}"
                raise ApiError(400, message, param="tokens")
        return {"prompt": tokenizer.decode(asked.tokens)}

    def add(path: str, schema: type[BodyT], call: Callable[[BodyT], dict[str, object]]) -> None:
        async def post(request: Request) -> Response:
            data = await read_body(served, request.receive)
            return _json(await desk.in_thread(lambda: call(parse(schema, data))))

        app.add_api_route(path, post, methods=["POST"], response_model=None)

    add("/tokenize", TokenizeRequest, tokenize)
    add("/detokenize", DetokenizeRequest, detokenize)


def _add_state(app: FastAPI, desk: Desk) -> None:
    served = desk.served
    card = {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "dovetail",
        "root": served.name,
        "parent": None,
        "max_model_len": served.engine.max_model_len,
    }

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [card]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        served.check_model(name)
        return _json(card)

    @app.get("/health")
    async def health() -> Response:
        """Whether the process does its work; it still does while it drains."""
        is_well = served.engine.is_ready
        return _json({"status": "ok" if is_well else "the engine does not run"}, 200 if is_well else 503)

    @app.get("/ready")
    async def ready() -> Response:
        """Whether new requests should come here."""
        is_ready = served.engine.is_ready and not desk.is_draining
        return _json({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(desk.metrics.text(), headers={"content-type": CONTENT_TYPE})
