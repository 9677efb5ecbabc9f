"""OpenAI's own client, over HTTP: sync, async, streams, tools, schemas, log-probabilities, responses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

TEXT = "Grüße, 世界! 1 2 3"
ASK: Any = [{"role": "user", "content": "hi"}]
TOOLS: Any = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


def client(running: Any, key: str = "none") -> OpenAI:
    return OpenAI(base_url=running.url + "/v1", api_key=key, max_retries=0, timeout=20)


def test_chat_whole_and_streamed(start: Callable[..., Any]) -> None:
    asked = client(start()).chat.completions
    whole = asked.create(model="tiny", messages=ASK, n=2)
    assert [choice.message.content for choice in whole.choices] == [TEXT, TEXT]
    assert whole.usage and whole.usage.prompt_tokens_details and whole.usage.prompt_tokens_details.cached_tokens == 2
    stream = list(asked.create(model="tiny", messages=ASK, stream=True, stream_options={"include_usage": True}))
    assert stream[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream[:-1]) == TEXT
    assert stream[-2].choices[0].finish_reason == "stop"
    assert stream[-1].choices == [] and stream[-1].usage and stream[-1].usage.completion_tokens > 5
    with asked.stream(model="tiny", messages=ASK) as events:  # the client's own sum
        assert events.get_final_completion().choices[0].message.content == TEXT


def test_many_at_once(start: Callable[..., Any]) -> None:
    running = start(engine={"pace": 0.002})

    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=running.url + "/v1", api_key="x", max_retries=0) as asked:

            async def one() -> str:
                stream = await asked.chat.completions.create(model="tiny", messages=ASK, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one() for _ in range(20)))

    assert asyncio.run(ask()) == [TEXT] * 20


def test_tools(start: Callable[..., Any]) -> None:
    asked = client(start(engine={"text": 'Hm @{"a": 1}@{"b": 2}', "block": 2})).chat.completions
    whole = asked.create(model="tiny", messages=ASK, tools=TOOLS).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content == "Hm "
    calls = whole.message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in calls] == [  # type: ignore[union-attr]
        ("look", '{"a": 1}'),
        ("look", '{"b": 2}'),
    ]
    with asked.stream(model="tiny", messages=ASK, tools=TOOLS) as events:
        streamed = events.get_final_completion().choices[0]
    assert [call.function.arguments for call in streamed.message.tool_calls or []] == ['{"a": 1}', '{"b": 2}']
    answer: Any = whole.message.model_dump()  # as clients send it back
    done = {"role": "tool", "tool_call_id": calls[0].id, "content": "42"}
    assert asked.create(model="tiny", messages=[*ASK, answer, done]).choices  # type: ignore[list-item]


class Place(BaseModel):
    name: str
    size: int


def test_a_schema(start: Callable[..., Any]) -> None:
    running = start(engine={"text": '{"name": "Ulm", "size": 3}'})
    answer = client(running).chat.completions.parse(model="tiny", messages=ASK, response_format=Place)
    assert answer.choices[0].message.parsed == Place(name="Ulm", size=3)
    grammar = running.site.engine.asked[0][1].grammar
    assert grammar.kind == "json_schema" and '"size"' in grammar.text
    parsed = client(running).responses.parse(model="tiny", input="hi", text_format=Place)
    assert parsed.output_parsed == Place(name="Ulm", size=3)


def test_log_probabilities_and_completions(start: Callable[..., Any]) -> None:
    asked = client(start())
    chat = asked.chat.completions.create(model="tiny", messages=ASK, logprobs=True, top_logprobs=2, seed=0)
    rows = (chat.choices[0].logprobs and chat.choices[0].logprobs.content) or []
    assert b"".join(bytes(row.bytes or []) for row in rows).decode() == TEXT
    assert len(rows[0].top_logprobs) == 2
    scored = asked.completions.create(model="tiny", prompt=["ab", "c"], echo=True, logprobs=1, max_tokens=0)
    first = scored.choices[0].logprobs
    assert first and first.token_logprobs and first.token_logprobs[0] is None and len(first.tokens or []) == 3
    stream = asked.completions.create(model="tiny", prompt="a", stream=True, max_tokens=99)
    assert "".join(chunk.choices[0].text for chunk in stream) == TEXT


def test_responses(start: Callable[..., Any]) -> None:
    asked = client(start()).responses
    whole = asked.create(model="tiny", input="hi")
    assert whole.output_text == TEXT and whole.usage and whole.usage.input_tokens
    again = asked.create(model="tiny", input=[*ASK, *whole.output, *ASK])  # type: ignore[list-item]
    assert again.output_text == TEXT
    with asked.stream(model="tiny", input="hi") as events:
        kinds = [event.type for event in events]
        assert events.get_final_response().output_text == TEXT
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"


def test_models_and_mistakes(start: Callable[..., Any]) -> None:
    running = start(api_key="secret")
    asked = client(running, "secret")
    (model,) = asked.models.list().data
    assert model.id == "tiny" and model.max_model_len == 4096  # type: ignore[attr-defined]
    with pytest.raises(openai.AuthenticationError):
        client(running, "wrong").models.list()
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        asked.chat.completions.create(model="gpt-4", messages=ASK)
    with pytest.raises(openai.BadRequestError) as refused:
        asked.chat.completions.create(model="tiny", messages=ASK, modalities=["text", "audio"])
    assert refused.value.param == "modalities" and refused.value.code == "unsupported_parameter"
    running.site.engine.is_full = True
    with pytest.raises(openai.RateLimitError):
        asked.completions.create(model="tiny", prompt="a")
    running.site.engine.is_full, running.site.engine.failure = False, "no memory"
    with pytest.raises(openai.APIError, match="generation failed: no memory"):
        list(asked.completions.create(model="tiny", prompt="a", stream=True))
