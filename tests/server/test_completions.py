"""POST /v1/completions and /v1/responses, /tokenize and /detokenize."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

TEXT = "Grüße, 世界! 1 2 3"


def test_every_form_of_a_prompt(build: Callable[..., Any]) -> None:
    site = build(engine={"text": "ok"})
    ids = site.engine.tokenizer.encode("a b")
    for prompt, expected in (
        ("a b", [[0, *ids]]),
        (["a b", "a b"], [[0, *ids]] * 2),
        (ids, [ids]),
        ([ids, [5]], [ids, [5]]),
    ):
        site.engine.asked.clear()
        answer = site.post("/v1/completions", prompt=prompt, n=2).json()
        assert [prompt for prompt, _, _ in site.engine.asked] == [each for each in expected for _ in range(2)]
        assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(expected)))
        assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))  # once, whatever n is
        assert answer["usage"]["completion_tokens"] == 2 * len(expected) * len(site.engine.tokenizer.encode("ok"))
    assert site.engine.asked[0][1].max_tokens == 16


def test_equal_prompts_are_drawn_differently(build: Callable[..., Any]) -> None:
    site = build()
    for seed in (5, None):
        site.engine.asked.clear()
        site.post("/v1/completions", prompt=["a", "a"], n=2, seed=seed)
        first, *others = [params.seed for _, params, _ in site.engine.asked]
        assert others == [first + 1, first + 2, first + 3] and seed in (first, None)


@pytest.mark.parametrize("block", [1, 3])
def test_a_stream_adds_up_to_the_whole_answer(build: Callable[..., Any], block: int) -> None:
    site = build(engine={"block": block})
    body = {"prompt": ["x", "é"], "n": 2, "logprobs": 1, "seed": 1, "max_tokens": 12, "return_token_ids": True}
    whole = site.post("/v1/completions", **body).json()["choices"]
    lines = site.post("/v1/completions", stream=True, **body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    for index, expected in enumerate(whole):
        mine = [part for line in lines[:-2] for part in json.loads(line[6:])["choices"] if part["index"] == index]
        assert "".join(part["text"] for part in mine) == expected["text"]
        assert [each for part in mine for each in part["token_ids"]] == expected["token_ids"]
        for key, values in expected["logprobs"].items():
            assert [each for part in mine for each in part["logprobs"][key]] == values, key
        assert mine[-1]["finish_reason"] == expected["finish_reason"] == "length"
        assert mine[0]["prompt_token_ids"] == expected["prompt_token_ids"]


def test_echo_scores_a_prompt_without_generating(build: Callable[..., Any]) -> None:
    site = build()
    answer = site.post("/v1/completions", prompt="Grüß", echo=True, max_tokens=0, logprobs=1).json()
    (choice,) = answer["choices"]
    ids = site.engine.asked[0][0]
    assert choice["text"] == "Grüß" and choice["finish_reason"] == "length"
    scores = choice["logprobs"]
    assert scores["tokens"][0] == "<|begin_of_sentence|>" and len(scores["tokens"]) == len(ids)
    assert scores["token_logprobs"] == [None, *(-0.5 * each for each in ids[1:])]
    assert scores["top_logprobs"][0] is None and len(scores["top_logprobs"][1]) == 1
    assert scores["text_offset"][:3] == [0, 0, 2] and scores["text_offset"] == sorted(scores["text_offset"])
    assert answer["usage"]["completion_tokens"] == 0 and answer["usage"]["total_tokens"] == len(ids)


def test_echo_goes_before_what_is_generated(build: Callable[..., Any]) -> None:
    site = build(engine={"text": "!"})
    assert site.post("/v1/completions", prompt="ab", echo=True).json()["choices"][0]["text"] == "ab!"
    ids = site.engine.tokenizer.encode("ab")
    both = site.post("/v1/completions", prompt=ids, echo=True, logprobs=0).json()["choices"][0]
    assert both["text"] == "ab!" and both["logprobs"]["text_offset"] == [0, 1, 2]


def test_best_of_gives_back_the_likeliest(build: Callable[..., Any]) -> None:
    site = build(engine={"text": "a"})  # one token, of log-probability -(1 + seed % 5) / 8
    answer = site.post("/v1/completions", prompt="x", best_of=5, n=2, seed=2, logprobs=0).json()
    assert [choice["logprobs"]["token_logprobs"] for choice in answer["choices"]] == [[-0.125], [-0.25]]
    assert answer["usage"]["completion_tokens"] == 5


def test_forms_of_the_answer_become_grammars(build: Callable[..., Any]) -> None:
    site = build()
    for body, kind, text in (
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a", 'b"']}}, "lark", 'start: "a" | "b\\""'),
        ({"structured_outputs": {"json": {"type": "object"}}}, "json_schema", '{"type": "object"}'),
        ({"guided_grammar": "start: /a/"}, "lark", "start: /a/"),
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
    ):
        site.engine.asked.clear()
        assert site.post("/v1/completions", prompt="x", **body).status_code == 200
        grammar = site.engine.asked[0][1].grammar
        assert (grammar.kind, grammar.text) == (kind, text)
    site.engine.asked.clear()
    site.post("/v1/completions", prompt="x", response_format={"type": "text"})
    assert site.engine.asked[0][1].grammar is None


def test_tokens_and_back(build: Callable[..., Any]) -> None:
    site = build()
    answer = site.post("/tokenize", prompt="Grüße", return_token_strs=True).json()
    assert answer["tokens"][0] == 0 and answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert site.post("/detokenize", tokens=answer["tokens"]).json() == {"prompt": "Grüße"}
    bare = site.post("/tokenize", prompt="Grüße", add_special_tokens=False).json()
    assert bare["tokens"] == answer["tokens"][1:] and bare["max_model_len"] == 4096
    refused = site.post("/detokenize", tokens=[10**9])
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "tokens"


@pytest.mark.parametrize("block", [1, 4])
def test_responses_stream_what_they_answer(build: Callable[..., Any], block: int) -> None:
    site = build(engine={"text": "So.</think>It is 4", "block": block})
    body = {"input": "2 + 2?", "instructions": "be brief", "chat_template_kwargs": {"thinking": True}}
    whole = site.post("/v1/responses", **body).json()
    assert [message["role"] for message in site.template.asked[0][0]] == ["system", "user"]
    assert whole["status"] == "completed" and whole["object"] == "response"
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message"]
    assert [item["content"][0]["text"] for item in whole["output"]] == ["So.", "It is 4"]
    assert whole["usage"]["output_tokens"] == len(site.engine.tokenizer.encode(site.engine.text))
    lines = site.post("/v1/responses", stream=True, **body).text.split("\n\n")
    assert lines.pop() == ""
    events = [json.loads(line.partition("\ndata: ")[2]) for line in lines]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert all(line.startswith(f"event: {event['type']}\n") for line, event in zip(lines, events, strict=True))
    for kind, text in (("reasoning_text", "So."), ("output_text", "It is 4")):
        assert "".join(each["delta"] for each in events if each["type"] == f"response.{kind}.delta") == text
    assert events[-1]["type"] == "response.completed"
    streamed = events[-1]["response"]
    for item in (*streamed["output"], *whole["output"]):
        item["id"] = ""
    assert streamed["output"] == whole["output"] and streamed["usage"] == whole["usage"]


def test_a_response_that_was_cut_is_incomplete(build: Callable[..., Any]) -> None:
    site = build()
    answer = site.post("/v1/responses", input="x", max_output_tokens=2).json()
    assert answer["status"] == "incomplete" and answer["incomplete_details"] == {"reason": "max_output_tokens"}
    text = site.post("/v1/responses", input="x", max_output_tokens=2, stream=True).text
    assert "event: response.incomplete\n" in text
