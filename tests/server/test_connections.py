"""Clients that go, at every stage; that read slowly or never; that send slowly; and signals."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def connect(running: Any, buffer: int | None = None) -> socket.socket:
    link = socket.socket()
    if buffer is not None:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    link.settimeout(10)
    link.connect(("127.0.0.1", running.port))
    return link


def send(link: socket.socket, body: dict[str, Any], part: float = 1.0) -> None:
    data = json.dumps(body).encode()
    lines = ("POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    head = "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""])
    link.sendall(head.encode() + data[: int(len(data) * part)])


def until(is_so: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("resets", [True, False])
def test_a_client_that_goes_ends_its_generation(start: Callable[..., Any], stream: bool, resets: bool) -> None:
    running = start(engine={"text": "a" * 4000, "pace": 0.01})
    engine = running.site.engine
    link = connect(running)
    send(link, {**CHAT, "stream": stream, "n": 3})
    until(lambda: engine.num_running == 3)
    if stream:
        assert b"200 OK" in link.recv(1000)
    if resets:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    link.close()
    until(lambda: engine.num_running == 0)
    assert engine.num_cancelled == 3 and not running.site.desk.running


def test_a_client_that_goes_while_its_prompt_is_prepared(start: Callable[..., Any]) -> None:
    running = start(engine={"text": "a" * 4000, "pace": 0.01})
    engine, may_go, is_there = running.site.engine, threading.Event(), threading.Event()

    def wait() -> None:
        is_there.set()
        may_go.wait(5)

    engine.before_submit = wait
    link = connect(running)
    send(link, CHAT)
    assert is_there.wait(5)
    link.close()
    assert httpx.get(running.url + "/health").status_code == 200  # the loop is free all the while
    may_go.set()
    until(lambda: engine.num_cancelled == 1 and engine.num_running == 0)


def test_a_client_that_goes_in_the_middle_of_its_body(start: Callable[..., Any]) -> None:
    running = start()
    link = connect(running)
    send(link, CHAT, part=0.5)
    until(lambda: len(running.site.desk.running) == 1)
    link.close()
    until(lambda: not running.site.desk.running)
    assert not running.site.engine.asked


def test_a_body_that_does_not_come(start: Callable[..., Any]) -> None:
    running = start(slow_client_seconds=0.1)
    link = connect(running)
    send(link, CHAT, part=0.5)
    assert b" 408 " in link.recv(1000)


def test_a_client_that_never_reads_is_left_and_holds_up_nobody(start: Callable[..., Any]) -> None:
    running = start(engine={"text": "word " * 800, "block": 1}, slow_client_seconds=0.3)
    link = connect(running, buffer=4096)
    send(link, {**CHAT, "stream": True, "n": 60, "logprobs": True})  # more than all buffers of the way hold
    until(lambda: len(running.site.desk.running) == 1)
    begin = time.monotonic()
    answer = httpx.post(running.url + "/v1/completions", json={"prompt": "x", "max_tokens": 3}, timeout=10)
    assert answer.status_code == 200 and time.monotonic() - begin < 5
    until(lambda: not running.site.desk.running, 10)
    data = b""
    with pytest.raises(ConnectionResetError):
        while part := link.recv(65536):
            data += part
        raise ConnectionResetError  # it was closed before all that it had was sent
    assert data and b"[DONE]" not in data
    link.close()


def test_a_slow_reader_gets_it_all(start: Callable[..., Any]) -> None:
    running = start(engine={"text": "word " * 800, "block": 1})
    link = connect(running, buffer=4096)
    send(link, {**CHAT, "stream": True, "logprobs": True})
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        data += link.recv(65536)
    assert data.count(b"data: ") > 800 and b"data: [DONE]\n\n" in data
    link.close()


def test_a_signal_lets_what_runs_end_and_refuses_the_rest(start: Callable[..., Any]) -> None:
    running = start(engine={"text": "word " * 30, "pace": 0.01})
    answers: list[httpx.Response] = []
    url = running.url + "/v1/chat/completions"
    asking = threading.Thread(target=lambda: answers.append(httpx.post(url, json=CHAT)))
    asking.start()
    until(lambda: running.site.engine.num_running == 1)
    running.server.handle_exit(15, None)
    refused = httpx.post(url, json=CHAT)
    assert refused.status_code == 503 and refused.headers["retry-after"]
    assert httpx.get(running.url + "/ready").status_code == 503
    asking.join(10)
    assert answers[0].status_code == 200 and answers[0].json()["choices"][0]["finish_reason"] == "stop"
    until(lambda: running.server.should_exit)


def test_what_does_not_end_in_time_is_ended(start: Callable[..., Any]) -> None:
    running = start(engine={"text": "word " * 800, "pace": 0.02}, drain_seconds=0.05)
    link = connect(running)
    send(link, {**CHAT, "stream": True})
    until(lambda: running.site.engine.num_running == 1)
    running.server.handle_exit(15, None)
    data = b""
    while part := link.recv(65536):
        data += part
    assert b'"error"' in data and b"data: [DONE]\n\n" in data
    link.close()


def test_a_second_signal_ends_at_once(start: Callable[..., Any]) -> None:
    running = start(engine={"text": "word " * 800, "pace": 0.02})
    link = connect(running)
    send(link, {**CHAT, "stream": True})
    until(lambda: running.site.engine.num_running == 1)
    running.server.handle_exit(2, None)
    assert not running.server.should_exit
    running.server.handle_exit(2, None)
    assert running.server.should_exit and running.server.force_exit
    link.close()


def test_headers_without_end(start: Callable[..., Any]) -> None:
    running = start()
    link = connect(running)
    with pytest.raises(OSError):
        for i in range(100_000):
            link.sendall(b"GET / HTTP/1.1\r\n" if i == 0 else b"X-More: " + b"x" * 8000 + b"\r\n")
    link.close()
    assert httpx.get(running.url + "/health").status_code == 200


def test_what_has_ended_is_not_cancelled(start: Callable[..., Any]) -> None:
    running = start()
    for stream in (True, False):
        assert httpx.post(running.url + "/v1/chat/completions", json={**CHAT, "stream": stream}).status_code == 200
    until(lambda: not running.site.desk.running)
    assert running.site.engine.num_left == 0


def test_what_is_prepared_when_time_is_over_is_ended(start: Callable[..., Any]) -> None:
    running = start(engine={"text": "a" * 4000, "pace": 0.01})
    running.site.engine.before_submit = running.site.desk.cancel_all
    answer = httpx.post(running.url + "/v1/completions", json={"prompt": ["a", "b"], "n": 2, "max_tokens": 4000})
    assert answer.status_code == 503
    until(lambda: running.site.engine.num_cancelled == 4)
