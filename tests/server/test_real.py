"""The real engine over HTTP, beside transformers on the same weights in FP32."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import suppress
from typing import Any

import jsonschema
import pytest
import torch
from openai import AsyncOpenAI
from real_server import Real, until

from dovetail.numerics.formats.errors import network_terms, normwise_error, tolerance

ASK: Any = [{"role": "user", "content": "hi"}]
PLACE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["town", "hill"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 4},
    },
    "required": ["name", "size", "kind", "tags"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": PLACE}} for name in ("find_place", "drop_place")
]


def prompts_of(real: Real, count: int, seed: int) -> list[list[int]]:
    """Some begin alike, so that they share pages."""
    draws, size = random.Random(seed), real.desk.served.tokenizer.vocab_size
    common = draws.choices(range(5, size), k=48)
    return [
        (common if draws.random() < 0.4 else []) + draws.choices(range(5, size), k=draws.randint(1, 150))
        for _ in range(count)
    ]


def test_greedy_under_random_load_is_that_of_transformers(real: Real) -> None:
    draws, prompts = random.Random(1), prompts_of(real, 24, seed=1)
    counts = [draws.randint(1, 40) for _ in prompts]
    greedy: Any = {"ignore_eos": True, "return_token_ids": True}

    async def one(client: AsyncOpenAI, prompt: list[int], count: int) -> list[int]:
        asked: Any = {"model": "real", "prompt": prompt, "max_tokens": count, "temperature": 0, "extra_body": greedy}
        await asyncio.sleep(draws.random())
        if draws.random() < 0.5:
            choice = (await client.completions.create(**asked)).choices[0]
            assert choice.finish_reason == "length"
            return choice.token_ids
        chunks = [chunk async for chunk in await client.completions.create(**asked, stream=True)]
        return [token for chunk in chunks for token in chunk.choices[0].token_ids]

    async def noise(client: AsyncOpenAI, prompt: list[int]) -> None:
        await asyncio.sleep(draws.random())
        asked = client.completions.create(model="real", prompt=prompt, max_tokens=400, n=2)
        with suppress(TimeoutError):  # few have ended by then
            await asyncio.wait_for(asked, draws.random() / 20)

    async def load() -> list[list[int]]:
        async with AsyncOpenAI(base_url=real.url + "/v1", api_key="x", max_retries=0) as client:
            asked = [one(client, prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
            more = [noise(client, prompt) for prompt in prompts_of(real, 12, seed=2)]
            return (await asyncio.gather(*asked, *more))[: len(asked)]

    for prompt, count, tokens in zip(prompts, counts, asyncio.run(load()), strict=True):
        assert tokens == real.their_greedy(prompt, count)
    until(real.is_empty)


def test_a_stream_is_the_whole_in_parts(real: Real) -> None:
    asked: Any = {"model": "real", "messages": ASK, "n": 3, "seed": 4, "max_tokens": 30, "logprobs": True}
    whole = real.client.chat.completions.create(**asked)
    texts, rows, reasons = [""] * 3, [[], [], []], [None] * 3  # type: ignore[var-annotated]
    for chunk in real.client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            rows[choice.index] += (choice.logprobs and choice.logprobs.content) or []
            reasons[choice.index] = choice.finish_reason
    assert texts == [each.message.content for each in whole.choices]
    assert rows == [each.logprobs and each.logprobs.content for each in whole.choices]
    assert reasons == [each.finish_reason for each in whole.choices]
    assert len(set(texts)) == 3  # drawn differently
    again = real.client.chat.completions.create(**asked)
    assert [each.message.content for each in again.choices] == texts


def test_log_probabilities_are_those_of_transformers(real: Real) -> None:
    (prompt,) = prompts_of(real, 1, seed=3)
    asked: Any = {"model": "real", "prompt": prompt, "logprobs": 3, "max_tokens": 12, "temperature": 0}
    more: Any = {"ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True}
    choice: Any = real.client.completions.create(**asked, extra_body=more).choices[0]
    echo: Any = real.client.completions.create(**{**asked, "max_tokens": 0}, echo=True, extra_body=more).choices[0]
    text = [*prompt, *choice.token_ids]
    expected = real.their_logprobs(text)
    terms = network_terms(real.engine.llm.spec, len(text))
    bound = tolerance(torch.float32, roundings=len(text), terms=terms)
    assert echo.logprobs.token_logprobs[0] is None and len(echo.logprobs.tokens) == len(prompt)
    ours = torch.tensor([*echo.logprobs.token_logprobs[1:], *choice.logprobs.token_logprobs])
    assert normwise_error(ours, expected.gather(1, torch.tensor(text[1:])[:, None])[:, 0]) < bound
    rows = [*echo.logprobs.top_logprobs[1:], *choice.logprobs.top_logprobs]
    for row, theirs in zip(rows, expected, strict=True):
        values, ids = theirs.topk(3)
        found = {name: row[name] for name in (f"token_id:{token}" for token in ids.tolist())}
        assert normwise_error(torch.tensor(list(found.values())), values) < bound


@pytest.mark.parametrize("seed", range(4))
def test_json_ends_and_matches_its_schema(real: Real, seed: int) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE}}
    answer = real.client.chat.completions.create(
        model="real", messages=ASK, response_format=wanted, seed=seed, n=4, max_tokens=150
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop", choice.message.content
        jsonschema.validate(json.loads(choice.message.content or ""), PLACE)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "drop_place"}}])
def test_forced_calls_match_their_schema(real: Real, choice: Any) -> None:
    asked: Any = {"model": "real", "messages": ASK, "tools": TOOLS, "tool_choice": choice, "seed": 5}
    asked |= {"max_tokens": 300, "parallel_tool_calls": False}
    whole = real.client.chat.completions.create(**asked).choices[0]
    with real.client.chat.completions.stream(**asked) as events:
        streamed = events.get_final_completion().choices[0]
    assert whole.finish_reason == ("tool_calls" if choice == "required" else "stop") == streamed.finish_reason
    for message in (whole.message, streamed.message):
        (call,) = message.tool_calls or []
        assert call.function.name == "drop_place" or choice == "required"
        jsonschema.validate(json.loads(call.function.arguments), PLACE)
    assert [call.function.arguments for call in streamed.message.tool_calls or []] == [
        call.function.arguments for call in whole.message.tool_calls or []
    ]


def test_tools_that_are_offered_may_be_left_alone(real: Real) -> None:
    answer = real.client.chat.completions.create(
        model="real", messages=ASK, tools=TOOLS, tool_choice="auto", max_tokens=20, seed=1
    ).choices[0]
    assert answer.message.content and not answer.message.tool_calls and answer.finish_reason == "length"


def test_conversations_and_responses_go_on(real: Real) -> None:
    first = real.client.responses.create(model="real", input="hi", max_output_tokens=8)
    assert first.status == "incomplete" and first.usage and first.usage.output_tokens == 8
    turn: Any = [{"role": "user", "content": "hi"}, *first.output, {"role": "user", "content": "and?"}]
    second = real.client.responses.create(model="real", input=turn, max_output_tokens=8)
    assert second.usage and second.usage.input_tokens > 8 + (first.usage.input_tokens if first.usage else 0)


def test_the_cache_has_as_many_pages_as_its_bytes_hold(real: Real) -> None:
    engine, core = real.engine, real.engine._core
    assert core is not None
    held = core.runner.cache.data.nbytes
    page = held / engine.room.num_pages
    assert engine.config.cache_bytes - 1.25 * page < 1.25 * held <= engine.config.cache_bytes  # a quarter for prompts
