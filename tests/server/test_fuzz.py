"""Bodies at random, near what is right and far from it: always an answer, never a 500, never a hang."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dovetail.server.asked.chat import ChatRequest
from dovetail.server.asked.completion import CompletionRequest, DetokenizeRequest, TokenizeRequest
from dovetail.server.asked.responses import ResponsesRequest

SCHEMAS = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
RIGHT: dict[str, list[Any]] = {  # values that get a request past its first checks
    "messages": [
        [{"role": "user", "content": "a"}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, {"role": "tool", "content": "é"}],
    ],
    "prompt": ["a", ["a", "b"], [3, 4], [[3], [4]]],
    "input": ["a", [{"role": "user", "content": [{"type": "input_text", "text": "b"}]}]],
    "tokens": [[3, 4], []],
    "tools": [[{"type": "function", "function": {"name": "f"}}]],
    "tool_choice": ["auto", "required", {"type": "function", "function": {"name": "f"}}],
    "response_format": [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": True}}],
    "structured_outputs": [{"regex": "a"}, {"json": {}}, {"choice": ["a"]}],
    "stream_options": [{"include_usage": True}, {"continuous_usage_stats": True}],
    "model": ["tiny"],
    "stop": ["a", ["b"]],
    "text": [{"format": {"type": "json_schema", "schema": {}}}],
    "logit_bias": [{"5": 3}],
    "logprobs": [True, 2],
    "max_tokens": list(range(1, 20)),
    "temperature": [0, 0.0, 0.5, 1, 2],
    "top_p": [0.1, 0.9, 1],
    "min_p": [0, 0.2],
    "top_k": [-1, 1, 5],
    "seed": [0, 7, 2**40],
    "n": [1, 2],
    "presence_penalty": [-2, 0.5],
    "frequency_penalty": [2, -0.5],
    "repetition_penalty": [1.1],
    "min_tokens": [0, 1],
    "stream": [True, False],
    "ignore_eos": [True, False],
    "user": ["someone"],
}
scalar = (
    st.none()
    | st.booleans()
    | st.integers(-3, 20)
    | st.integers()
    | st.floats()
    | st.sampled_from([10**400, -(2**63), math.nan, "auto", "none", ""])
    | st.text(max_size=8)
)
anything = st.recursive(
    scalar,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes]:
    path = draw(st.sampled_from(sorted(SCHEMAS)))
    names = sorted({*SCHEMAS[path].model_fields, *SCHEMAS[path].REFUSED})
    body = {
        name: draw(st.sampled_from(RIGHT[name])) for name in names if name in ("messages", "prompt", "input", "tokens")
    }
    if draw(st.booleans()):  # values that are right one by one
        for name in draw(st.lists(st.sampled_from([name for name in names if name in RIGHT]), max_size=5)):
            body[name] = draw(st.sampled_from(RIGHT[name]))
        return path, json.dumps(body).encode()
    for name in draw(st.lists(st.sampled_from(names) | st.text(max_size=6), max_size=5)):
        body[name] = draw(st.sampled_from(RIGHT[name]) | anything if name in RIGHT else anything)
    data = json.dumps(body).encode()
    if draw(st.integers(0, 9)) == 0:  # and not even JSON
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=4)) + data[at + draw(st.integers(0, 3)) :]
    return path, data


def check(site: Any, loop: asyncio.AbstractEventLoop, path: str, data: bytes) -> int:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=site.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(path, content=data, headers={"content-type": "application/json"})

    answer = loop.run_until_complete(asyncio.wait_for(ask(), 5))
    assert answer.status_code in (200, 400, 404, 413), (answer.status_code, data)
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert "\n" not in error["message"] and len(error["message"]) < 1000, error
    elif answer.headers["content-type"].startswith("text/event-stream") and path != "/v1/responses":
        assert answer.text.endswith("data: [DONE]\n\n")
    else:
        assert answer.content
    return answer.status_code


def fuzz(site: Any, examples: int) -> None:
    seen: dict[int, int] = {}
    phases = [Phase.explicit, Phase.generate, Phase.shrink]
    with asyncio.Runner() as runner:

        @settings(
            max_examples=examples, deadline=None, derandomize=True, database=None, phases=phases,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(requests())
        def ask(request: tuple[str, bytes]) -> None:
            status = check(site, runner.get_loop(), *request)
            seen[status] = seen.get(status, 0) + 1

        ask()
    assert seen[200] > examples / 20 and seen[400] > examples / 20, seen  # both sides of the line were walked
    assert not site.desk.running


def test_some_hundred_bodies(build: Callable[..., Any]) -> None:
    fuzz(build(), 400)


@pytest.mark.slow
def test_very_many_bodies(build: Callable[..., Any]) -> None:
    fuzz(build(), 20_000)
