"""The page with a server behind it that answers by a script, token by token, with drafts and experts.

`python tests/oracles/scripted_page.py` runs it for a browser. What a prompt says decides the answer: "refuse", "break"
and "slow" are refused, broken off, and endless; anything else is answered with `WORDS`, after `THOUGHTS`.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from scripted_server import serving
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

PAGE = Path(__file__).parents[2] / "src" / "dovetail" / "server" / "page"
LAYERS, EXPERTS, CHOSEN = 12, 64, 6
THOUGHTS = "The user asks about drafts. I should say what they are, and why they are safe."
WORDS = (
    "A draft is a token that a small module guesses while the model computes the one before it. The model checks every"
    " guess in its next step: a guess that it would have drawn itself is kept, and the others cost nothing but their"
    " computing. So the text is the same as without drafts, <b>and</b> it comes sooner \u2713"
)
METRICS = r"""# HELP dovetail_speculation_info The depth in use, and why.
dovetail_draft_tokens_per_position_total{model_name="tiny",position="0"} 200.0
dovetail_draft_tokens_per_position_total{model_name="tiny",position="1"} 160.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="tiny",position="0"} 164.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="tiny",position="1"} 96.0
dovetail_speculation_info{model_name="tiny",why="2 drafts: they \"pay\" here"} 1.0
"""


class Scripted:
    """The app; `bodies` are what it was asked, and `stopped` counts streams whose reader went away."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.stopped = 0
        self.key: str | None = None

    def app(self) -> Starlette:
        async def page(request: Request) -> Response:
            return FileResponse(PAGE / (request.path_params.get("name") or "index.html"))

        routes = [
            Route("/v1/models", self.models),
            Route("/metrics", lambda request: PlainTextResponse(METRICS)),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/", page),
            Route("/{name}", page),
        ]
        return Starlette(routes=routes)

    async def models(self, request: Request) -> Response:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "no key was given"}}, 401)
        return JSONResponse({"data": [{"id": "tiny"}]})

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        said = body["messages"][-1]["content"]
        if "refuse" in said:
            return JSONResponse({"error": {"message": "the prompt is too long by 7 tokens"}}, 400)
        return StreamingResponse(self.stream(said), media_type="text/event-stream")

    async def stream(self, said: str) -> AsyncIterator[str]:
        numbers = random.Random(0)
        ended = False
        try:
            yield chunk({"role": "assistant", "content": ""})
            while "slow" in said:
                yield chunk({"content": "on "}, token("on ", numbers))
                await asyncio.sleep(0.01)
            for piece in pieces(THOUGHTS):
                yield chunk({"reasoning_content": piece}, token(piece, numbers))
            for place, piece in enumerate(pieces(WORDS)):
                if place == 3 and "break" in said:
                    yield 'data: {"error": {"message": "out of memory"}}\n\n'
                    break
                if piece == "\u2713":  # its bytes are three tokens, and it is whole with the last of them
                    yield chunk({"content": ""}, token("", numbers), token("", numbers))
                yield chunk({"content": piece}, token(piece, numbers, is_draft=place % 3 == 1))
            else:
                yield chunk({}, finish="stop")
                details = {"prompt_tokens_details": {"cached_tokens": 32}}
                usage = {"prompt_tokens": 40, "completion_tokens": 99, **details}
                yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
            ended = True
        finally:
            self.stopped += not ended


def pieces(text: str) -> list[str]:
    return [*(f"{word} " for word in text.split(" ")[:-1]), text.split(" ")[-1]]


def token(text: str, numbers: random.Random, is_draft: bool = False) -> dict[str, Any]:
    experts = []
    for layer in range(LAYERS):
        favourite = 7 * layer % EXPERTS
        others = [expert for expert in range(EXPERTS) if expert != favourite]
        experts.append(sorted([favourite, *numbers.sample(others, CHOSEN - 1)]))
    logprobs = {"logprob": -0.125, "sampler_logprob": -0.0625}
    return {"id": 500 + len(text), "text": text, **logprobs, "is_draft": is_draft, "experts": experts}


def chunk(delta: dict[str, Any], *tokens: dict[str, Any], finish: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, **({"tokens": tokens} if tokens else {})}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


if __name__ == "__main__":
    with serving(Scripted().app()) as url:
        input(f"{url} runs until Enter is pressed")
