"""What is refused: by name, in OpenAI's shape, with the right status, and never with a traceback."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

ASK = [{"role": "user", "content": "hi"}]
CHAT, COMPLETION, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def problem(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "\n" not in error["message"] and "Traceback" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (CHAT, {"audio": {}}, "audio", "audio is not supported: only text is generated"),
        (CHAT, {"function_call": "auto"}, "function_call", "use tool_choice"),
        (CHAT, {"functions": [{}]}, "functions", "use tools"),
        (CHAT, {"store": True}, "store", "nothing is kept"),
        (CHAT, {"service_tier": "flex"}, "service_tier", "unknown field 'service_tier'"),
        (CHAT, {"temprature": 1}, "temprature", "unknown field 'temprature'; did you mean temperature?"),
        (CHAT, {"temperature": "1"}, "temperature", "temperature = '1': input should be a valid number"),
        (CHAT, {"temperature": -1}, "temperature", "temperature = -1.0: input should be greater"),
        (CHAT, {"top_p": 0}, "top_p", "top_p = 0.0"),
        (CHAT, {"n": 0}, "n", "n = 0"),
        (CHAT, {"n": 10**9}, "n", "less than or equal to 128"),
        (CHAT, {"max_tokens": True}, "max_tokens", "max_tokens = True: input should be a valid integer"),
        (CHAT, {"top_logprobs": 3}, "top_logprobs", "needs logprobs = true"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs = 21"),
        (CHAT, {"stream_options": {}}, "stream_options", "only allowed with stream = true"),
        (CHAT, {"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "needs stream = false"),
        (CHAT, {"stop": ["a", ""]}, "stop", "an empty stop string"),
        (CHAT, {"stop": ["a", 1]}, "stop.1", "stop.1 = 1"),
        (CHAT, {"logit_bias": {"x": 1}}, "logit_bias", "'x' is not a token id"),
        (CHAT, {"logit_bias": {"1": 101}}, "logit_bias", "outside -100 to 100"),
        (CHAT, {"tools": []}, "tools", "tools is an empty list"),
        (CHAT, {"tool_choice": "required"}, "tool_choice", "tool_choice needs tools"),
        (CHAT, {"tools": [TOOL], "tool_choice": "any"}, "tool_choice", 'expected "none", "auto", "required"'),
        (
            CHAT,
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            "'x', which is none of tools: look",
        ),
        (CHAT, {"tools": [{"type": "web"}]}, "tools.0.type", "input should be 'function'"),
        (CHAT, {"messages": []}, "messages", "messages = []"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages.0", "a message of role user needs content"),
        (CHAT, {"messages": [{"role": "bot", "content": ""}]}, "messages.0.role", "messages.0.role = 'bot'"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "'image_url'"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages", "'input_audio'"),
        (CHAT, {"messages": [{"role": "user", "content": "refuse this"}]}, "messages", "the template refuses it"),
        (CHAT, {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "tools is a field of its own"),
        (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages is a field of its own"),
        (
            CHAT,
            {"chat_template_kwargs": {"add_generation_prompt": False}},
            "chat_template_kwargs",
            "add_generation_prompt is a field of its own",
        ),
        (CHAT, {"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs", "self cannot be set"),
        (CHAT, {"chat_template_kwargs": {"bos_token": ""}}, "chat_template_kwargs", "bos_token cannot be set"),
        (RESPONSES, {"input": "a", "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "of its own"),
        (CHAT, {"continue_final_message": True}, None, "needs a last message of role assistant"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format", "json_schema is given with type"),
        (CHAT, {"response_format": {"type": "xml"}}, "response_format.type", "input should be 'text'"),
        (CHAT, {"guided_regex": "a", "response_format": {"type": "json_object"}}, None, "several forms"),
        (CHAT, {"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        (COMPLETION, {"prompt": "a", "suffix": "b"}, "suffix", "suffix is not supported"),
        (COMPLETION, {"prompt": "a", "logprobs": 21}, "logprobs", "logprobs = 21"),
        (COMPLETION, {"prompt": "a", "logprobs": True}, "logprobs", "logprobs = True"),
        (COMPLETION, {"prompt": []}, "prompt", "expected a text, a list of texts"),
        (COMPLETION, {"prompt": [1, "a"]}, "prompt", "prompt 0 is neither text nor a list of token ids"),
        (COMPLETION, {}, "prompt", "prompt is missing"),
        (COMPLETION, {"prompt": "a", "max_tokens": 0}, "max_tokens", "without echo"),
        (COMPLETION, {"prompt": "a", "best_of": 1, "n": 2}, "best_of", "less than n = 2"),
        (COMPLETION, {"prompt": "a", "best_of": 2, "stream": True}, "best_of", "needs stream = false"),
        (COMPLETION, {"prompt": "a" * 5000}, None, "the prompt has 5001 tokens; max_model_len = 4096: shorten it"),
        (COMPLETION, {"prompt": "a" * 900_000}, "prompt", "900,000 characters are"),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 900_000}]}, "messages", "900,000 characters are"),
        (RESPONSES, {"input": "a", "tools": [{"type": "web_search"}]}, "tools", "use /v1/chat/completions"),
        (RESPONSES, {"input": "a", "previous_response_id": "r"}, "previous_response_id", "send the whole conversation"),
        (RESPONSES, {"input": [{"type": "input_image"}]}, "input", "an item of type 'input_image'"),
        (RESPONSES, {"input": "a", "reasoning": {"effort": "low"}}, "reasoning", "chat_template_kwargs"),
    ],
)
def test_by_name(build: Callable[..., Any], path: str, body: Any, param: str | None, message: str) -> None:
    site = build()
    full = {"messages": ASK, **body} if path == CHAT else body
    error = problem(site.post(path, **full), 400)
    assert message in error["message"] and error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert not site.engine.asked


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"messages": "\\ud800"}'])
def test_what_is_no_json_object(build: Callable[..., Any], data: bytes) -> None:
    site = build()
    for path in (CHAT, COMPLETION, RESPONSES, "/tokenize", "/detokenize"):
        problem(site.ask("POST", path, content=data, headers={"content-type": "application/json"}), 400)


def test_the_name_of_another_model(build: Callable[..., Any]) -> None:
    site = build()
    for path, body in ((CHAT, {"messages": ASK}), (COMPLETION, {"prompt": "a"}), (RESPONSES, {"input": "a"})):
        assert site.post(path, model="tiny", **body).status_code == 200
        error = problem(site.post(path, model="gpt-4", **body), 404)
        assert error["code"] == "model_not_found" and "'gpt-4'" in error["message"] and "'tiny'" in error["message"]
    assert site.ask("GET", "/v1/models/tiny").json() == site.ask("GET", "/v1/models").json()["data"][0]
    problem(site.ask("GET", "/v1/models/a/b"), 404)


def test_the_key(build: Callable[..., Any]) -> None:
    site = build(api_key="sécret")
    for headers in ({}, {"authorization": "Bearer x"}, {"authorization": "sécret".encode()}):
        for path in ("/v1/models", "/metrics"):
            error = problem(site.ask("GET", path, headers=headers), 401)
            assert error["type"] == "authentication_error"
        problem(site.ask("POST", CHAT, headers=headers, content=b"no json"), 401)
    right = {"authorization": "Bearer sécret".encode()}
    assert site.ask("GET", "/v1/models", headers=right).status_code == 200
    assert site.ask("GET", "/health").status_code == 200


def test_a_body_that_is_too_large_is_refused_before_it_is_read(build: Callable[..., Any]) -> None:
    site = build(max_body_bytes=100)
    assert site.post(COMPLETION, prompt="a").status_code == 200
    error = problem(site.post(COMPLETION, prompt="a" * 100), 413)
    assert "more than 100 bytes" in error["message"]
    sent = 0

    async def parts() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1
            yield b" " * 60

    problem(site.ask("POST", COMPLETION, content=parts(), headers={"content-type": "application/json"}), 413)
    assert sent < 5


def test_a_form_that_other_sites_may_send_without_asking(build: Callable[..., Any]) -> None:
    site = build()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        headers = {"content-type": kind}
        problem(site.ask("POST", CHAT, content=json.dumps({"messages": ASK}), headers=headers), 415)


def test_a_page_that_calls_this_machine_by_its_own_name(build: Callable[..., Any]) -> None:
    site = build()
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1:8000", "[2001:db8::1]:8000"):
        error = problem(site.ask("GET", "/v1/models", headers={"host": host}), 403)
        assert host in error["message"] and "--api-key" in error["message"]
        problem(site.ask("POST", CHAT, json={"messages": ASK}, headers={"host": host}), 403)
    for host in ("localhost:80", "LOCALHOST", "a.localhost", "127.0.0.1:8000", "127.0.0.2", "[::1]:80", "[::1]", ""):
        assert site.ask("GET", "/v1/models", headers={"host": host}).status_code == 200, host


@pytest.mark.parametrize("settings", [{"api_key": "k"}, {"host": "0.0.0.0"}, {"host": "box.lan"}])
def test_a_server_with_a_key_or_for_others_has_any_name(build: Callable[..., Any], settings: dict[str, str]) -> None:
    headers = {"host": "model.example", "authorization": "Bearer k"}
    assert build(**settings).ask("GET", "/v1/models", headers=headers).status_code == 200


def test_a_full_waiting_room(build: Callable[..., Any]) -> None:
    site = build(engine={"is_full": True})
    for stream in (False, True):
        answer = site.post(CHAT, messages=ASK, stream=stream)
        assert problem(answer, 429)["type"] == "rate_limit_error" and answer.headers["retry-after"] == "3"


def test_paths_and_methods_that_are_not_there(build: Callable[..., Any]) -> None:
    site = build()
    assert "/v1/engines is not there" in problem(site.ask("GET", "/v1/engines"), 404)["message"]
    assert "GET is not for" in problem(site.ask("GET", CHAT), 405)["message"]
    problem(site.ask("GET", "/../../etc/passwd"), 404)


def test_an_error_inside_says_nothing_of_it(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    site = build()

    def fail() -> None:
        raise KeyError("secret")

    site.engine.before_submit = fail
    for stream in (False, True):
        answer = site.post(CHAT, messages=ASK, stream=stream)
        assert problem(answer, 500)["message"] == "internal error" and "secret" not in answer.text


def test_while_it_drains(build: Callable[..., Any]) -> None:
    site = build()
    assert site.ask("GET", "/ready").status_code == 200
    site.engine.is_draining = True  # and a request that came before the server knew
    problem(site.post(CHAT, messages=ASK), 503)
    site.desk.is_draining = True
    answer = site.post(CHAT, messages=ASK)
    assert problem(answer, 503)["type"] == "server_error" and answer.headers["retry-after"]
    assert site.ask("GET", "/ready").status_code == 503 and site.ask("GET", "/health").status_code == 200


@pytest.mark.parametrize("is_draining", [False, True])
def test_an_engine_that_has_failed_is_not_well(is_draining: bool, build: Callable[..., Any]) -> None:
    """Whatever else goes on."""
    site = build()
    site.desk.is_draining = site.engine.is_draining = is_draining
    site.engine.is_ready = False
    for path in ("/health", "/ready"):
        assert site.ask("GET", path).status_code == 503
