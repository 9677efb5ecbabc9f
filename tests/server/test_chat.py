"""POST /v1/chat/completions: streams, whole answers, and that they are equal."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

TEXT = "Grüße, 世界! 1 2 3"
ASK = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def chunks(response: Any) -> list[dict[str, Any]]:
    """The events of a stream, without its end, which has to be there."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, end, nothing = response.text.split("\n\n")
    assert end == "data: [DONE]" and nothing == ""
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def added_up(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices of a whole answer, from the chunks of a streamed one."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for part in event["choices"]:
            one = choices.setdefault(part["index"], {"message": {"content": ""}, "logprobs": None, "tokens": []})
            message, delta = one["message"], part["delta"]
            for key in ("content", "reasoning_content"):
                if key in delta:
                    message[key] = message.get(key, "") + delta[key]
            for call in delta.get("tool_calls", ()):
                calls = message.setdefault("tool_calls", [])
                if call["index"] == len(calls):
                    calls.append({"id": call["id"], "type": call["type"], "function": {**call["function"]}})
                else:
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            if part["logprobs"]:
                one["logprobs"] = one["logprobs"] or {"content": [], "refusal": None}
                one["logprobs"]["content"] += part["logprobs"]["content"]
            one["tokens"] += part.get("tokens", ())
            one["finish_reason"] = part["finish_reason"]
    return [choices[index] for index in sorted(choices)]


@pytest.mark.parametrize(
    ("text", "body"),
    [
        (TEXT, {}),
        (TEXT, {"n": 3, "logprobs": True, "top_logprobs": 2, "max_tokens": 7, "seed": 4}),
        (TEXT, {"routed_experts": True, "seed": 3}),
        ("Let me see.</think>It is 4", {"chat_template_kwargs": {"thinking": True}}),
        ("all of it is thought", {"chat_template_kwargs": {"thinking": True}}),
        ('Wait @{"a": 1}@{"b": "x"}', {"tools": [TOOL]}),
        ('{"a": "\\"}"}', {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}}}),
        (
            '[{"name": "look", "arguments": {"a": "}]\\""}}, {"name": "look", "arguments": {}}]',
            {"tools": [TOOL], "tool_choice": "required"},
        ),
    ],
)
@pytest.mark.parametrize("block", [1, 2, 5, 100])
def test_a_stream_adds_up_to_the_whole_answer(build: Callable[..., Any], text: str, body: Any, block: int) -> None:
    site = build(engine={"text": text, "block": block})
    whole = site.post("/v1/chat/completions", messages=ASK, **body)
    streamed = site.post(
        "/v1/chat/completions", messages=ASK, stream=True, stream_options={"include_usage": True}, **body
    )
    *events, last = chunks(streamed)
    assert last["choices"] == [] and last["usage"] == whole.json()["usage"]
    for one, other in zip(added_up(events), whole.json()["choices"], strict=True):
        message = other["message"]
        for call, same in zip(one["message"].get("tool_calls", ()), message.get("tool_calls", ()), strict=True):
            call["id"] = same["id"] if same["id"].startswith("chatcmpl-tool-") else call["id"]
        expected = {"content": message["content"] or ""}
        for key in ("reasoning_content", "tool_calls"):
            if key in message:
                expected[key] = message[key]
        assert one["message"] == expected
        assert one["logprobs"] == other["logprobs"]
        assert one["tokens"] == other.get("tokens", [])
        assert one["finish_reason"] == other["finish_reason"]


def test_the_form_of_a_stream(build: Callable[..., Any]) -> None:
    site = build(engine={"text": "ab c", "block": 2})
    first, second, last = chunks(site.post("/v1/chat/completions", messages=ASK, stream=True))
    assert first["object"] == "chat.completion.chunk" and first["id"].startswith("chatcmpl-")
    assert first["model"] == "tiny" and "usage" not in first and "weights_version" not in first
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert second["choices"][0]["delta"] == {"content": "ab"} and second["choices"][0]["finish_reason"] is None
    assert last["choices"][0]["delta"] == {"content": " c"} and last["choices"][0]["finish_reason"] == "stop"
    assert last["choices"][0]["stop_reason"] is None


def test_usage_in_every_chunk(build: Callable[..., Any]) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = chunks(build().post("/v1/chat/completions", messages=ASK, stream=True, stream_options=options))
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[0] > 0 and len(events[-1]["choices"]) == 0


def test_a_failure_in_mid_stream_is_told_and_the_stream_ends(build: Callable[..., Any]) -> None:
    site = build(engine={"failure": "RuntimeError: no memory"})
    *_, last = chunks(site.post("/v1/chat/completions", messages=ASK, stream=True))
    assert last == {
        "error": {
            "message": "generation failed: RuntimeError: no memory", "type": "server_error", "param": None, "code": None
        }
    }  # fmt: skip
    whole = site.post("/v1/chat/completions", messages=ASK)
    assert whole.status_code == 500 and whole.json() == last


@pytest.mark.parametrize(
    ("text", "reason"),
    [("[", "tool_calls"), ("{", "stop")],
)
def test_a_named_function_ends_with_stop(build: Callable[..., Any], text: str, reason: str) -> None:
    call = '[{"name": "look", "arguments": {}}]' if text == "[" else "{}"
    choice: Any = "required" if text == "[" else {"type": "function", "function": {"name": "look"}}
    site = build(engine={"text": call})
    answer = site.post("/v1/chat/completions", messages=ASK, tools=[TOOL], tool_choice=choice).json()["choices"][0]
    assert answer["finish_reason"] == reason
    assert answer["message"]["content"] is None
    assert answer["message"]["tool_calls"][0]["function"] == {"name": "look", "arguments": "{}"}
    _, params, _ = site.engine.asked[0]
    assert params.grammar.kind == "lark" and params.grammar.text.startswith("start: ")


def test_what_reaches_the_engine_and_the_template(build: Callable[..., Any]) -> None:
    site = build()
    body = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
            {"role": "user", "content": "hi", "name": "me"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}]},
            {"role": "tool", "content": "42", "tool_call_id": "1"},
        ],
        "tools": [TOOL], "temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "presence_penalty": 1,
        "frequency_penalty": -1, "repetition_penalty": 1.5, "logit_bias": {"7": -100}, "stop": "x",
        "stop_token_ids": [9], "include_stop_str_in_output": True, "ignore_eos": True, "min_tokens": 2, "n": 2,
        "seed": 5, "max_tokens": 3, "max_completion_tokens": 9, "priority": -4, "chat_template_kwargs": {"a": 1},
        "user": "u", "metadata": {"k": "v"}, "store": False, "service_tier": "auto", "audio": None,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
    }  # fmt: skip
    answer = site.post("/v1/chat/completions", **body)
    assert answer.status_code == 200, answer.text
    (_, first, priority), (_, second, _) = site.engine.asked
    assert priority == -4 and (first.seed, second.seed) == (5, 6)
    assert first.model_dump(exclude_defaults=True) == {
        "temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "presence_penalty": 1.0, "frequency_penalty": -1.0,
        "repetition_penalty": 1.5, "logit_bias": {7: -100.0}, "stop": ("x",), "stop_token_ids": (9,),
        "include_stop": True, "ignore_eos": True, "min_tokens": 2, "seed": 5, "max_tokens": 9,
        "grammar": {"kind": "json_schema", "text": '{"type": "object"}'},
    }  # fmt: skip
    messages, options = site.template.asked[0]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool"]
    assert messages[0]["content"] == "be brief" and messages[3]["tool_call_id"] == "1"
    assert options["a"] == 1 and options["add_generation_prompt"] and options["tools"][0]["function"]["name"] == "look"


def test_a_request_without_a_bound_may_fill_the_context_and_has_its_own_seed(build: Callable[..., Any]) -> None:
    site = build()
    for _ in range(2):
        site.post("/v1/chat/completions", messages=ASK)
    (prompt, first, _), (_, second, _) = site.engine.asked
    assert first.max_tokens == 4096 - len(prompt)
    assert first.seed != second.seed


def test_tokens_experts_and_weights(build: Callable[..., Any]) -> None:
    site = build(engine={"text": "ab"})
    body = {"messages": ASK, "routed_experts": True, "return_token_ids": True, "prompt_logprobs": 1}
    answer = site.post("/v1/chat/completions", **body).json()
    assert answer["weights_version"] == "7" and answer["prompt_token_ids"] == site.engine.asked[0][0]
    choice = answer["choices"][0]
    assert [token["id"] for token in choice["tokens"]] == choice["token_ids"]
    assert choice["tokens"][1] | {"id": 0, "logprob": 0} == {
        "id": 0, "text": "b", "logprob": 0, "sampler_logprob": -0.0625, "is_draft": True, "experts": [[1, 3], [0, 2]]
    }  # fmt: skip
    assert answer["prompt_logprobs"][0] is None
    own = str(answer["prompt_token_ids"][1])
    assert answer["prompt_logprobs"][1][own]["rank"] == 1


def test_logprobs_name_half_characters_and_have_no_infinity(build: Callable[..., Any]) -> None:
    site = build(engine={"text": "é"})
    answer = site.post("/v1/chat/completions", messages=ASK, logprobs=True, top_logprobs=2, seed=0).json()
    first, second = answer["choices"][0]["logprobs"]["content"]
    assert first["token"] == "bytes:\\xc3" and first["bytes"] == [0xC3] and second["bytes"] == [0xA9]
    assert first["logprob"] == -0.125 and first["top_logprobs"][1]["logprob"] == -9999.0
