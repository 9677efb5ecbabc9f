"""Drills with the real engine: clients that go, bodies that are bombs, readers that sleep, long load, sudden death."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from real_server import Real, until

from dovetail.engine.sampler import SamplingParams

log = logging.getLogger("drills")
GROWTH = 32 * 2**20  # bytes that a process under load may gain after it is warm
CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "hi"}]


def message(body: bytes, kind: str = "application/json") -> bytes:
    lines = (f"POST {CHAT} HTTP/1.1", "Host: localhost", f"Content-Type: {kind}", f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def go_at_random(real: Real, draws: random.Random) -> None:
    """One request that ends early: at the engine, or by its socket, at whatever point of its way it is."""
    body = {"messages": ASK, "max_tokens": draws.randint(1, 300), "n": draws.randint(1, 3)}
    wait = draws.random() * draws.choice((0.001, 0.03, 0.3))
    if draws.random() < 0.5:
        prompt = draws.choices(range(5, 300), k=draws.randint(1, 300))
        params = [SamplingParams(max_tokens=200, seed=i) for i in range(body["n"])]
        streams = real.engine.submit_group(prompt, params)
        time.sleep(wait)
        for stream in streams:
            stream.cancel()
            assert list(stream)[-1].finish_reason in ("abort", "stop", "length")
        return
    data = message(json.dumps({**body, "stream": draws.random() < 0.5}).encode())
    with socket.create_connection(("127.0.0.1", real.port)) as link:
        if draws.random() < 0.5:  # a reset, not a farewell
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        link.sendall(data[: draws.randint(1, len(data))] if draws.random() < 0.2 else data)
        time.sleep(wait)


def cancel_many(real: Real, count: int) -> None:
    greedy = {"prompt": [7, 8, 9], "temperature": 0, "max_tokens": 20, "ignore_eos": True}
    before = httpx.post(real.url + "/v1/completions", json=greedy).json()["choices"]
    with ThreadPoolExecutor(16) as clients:
        list(clients.map(lambda seed: go_at_random(real, random.Random(seed)), range(count)))
    until(real.is_empty)
    assert not real.engine._streams and not real.engine._begins and not real.engine._shared.waiting
    assert httpx.get(real.url + "/health").status_code == 200
    assert httpx.post(real.url + "/v1/completions", json=greedy).json()["choices"] == before


def test_what_is_cancelled_leaves_nothing(real: Real) -> None:
    cancel_many(real, 300)


@pytest.mark.slow
def test_ten_thousand_that_are_cancelled_leave_nothing(real: Real) -> None:
    cancel_many(real, 10_000)


@contextmanager
def neighbour(real: Real) -> Iterator[list[float]]:
    """Another client's streams, one after the other; yields the times between their events, in seconds."""
    gaps, is_over = [0.0], threading.Event()

    def read() -> None:
        body = {"prompt": [5, 6], "max_tokens": 500, "ignore_eos": True, "stream": True}
        with httpx.Client(base_url=real.url, timeout=60) as client:
            while not is_over.is_set():
                with client.stream("POST", "/v1/completions", json=body) as answer:
                    last = time.monotonic()
                    for line in answer.iter_lines():
                        if is_over.is_set():
                            return
                        if line:
                            gaps.append(time.monotonic() - last)
                            last = time.monotonic()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(read)
        try:
            until(lambda: len(gaps) > 20)
            yield gaps
        finally:
            is_over.set()
        done.result(30)


def chat(text: str, **more: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": 5, **more}).encode()


def schema(value: Any) -> bytes:
    return chat("hi", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": value}})


NESTED = schema({"type": "null"}).replace(b'{"type": "null"}', b'{"properties": {"a": ' * 3000 + b"{}" + b"}}" * 3000)
CHAIN = {"$ref": "#/$defs/d0", "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(5000)}}
DOUBLING = {
    "$ref": "#/$defs/d0",
    "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)} | {"d40": {"type": "null"}},
}
BOMBS: dict[str, tuple[str, bytes, tuple[int, ...]]] = {
    "a million tokens": ("/v1/completions", json.dumps({"prompt": [7] * 10**6}).encode(), (400,)),
    "a text of a million tokens": ("/v1/completions", json.dumps({"prompt": "\x07" * 10**6}).encode(), (400,)),
    "megabytes of text": (CHAT, chat("a b " * 600_000), (400,)),
    "ten megabytes of lists": (CHAT, b'{"messages": [' + b"[]," * 3_300_000 + b"[]]}", (400,)),
    "ten megabytes of brackets": (CHAT, b"[" * 10**7, (400,)),
    "ten megabytes of unknown fields": (CHAT, json.dumps({f"field{i}": i for i in range(500_000)}).encode(), (400,)),
    "more than is read": (CHAT, b" " * 31_000_000, (413,)),
    "no text": (CHAT, b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', (400,)),
    "an unknown field": (CHAT, chat("hi", tempo=1), (400,)),
    "a deep schema": (CHAT, NESTED, (400,)),
    "a chain of references": (CHAT, schema(CHAIN), (400,)),
    "a doubling schema": (CHAT, schema(DOUBLING), (200, 400)),
    "a wide schema": (CHAT, schema({"enum": [f"{i:06d}" for i in range(50_000)]}), (400,)),
    "a regex of regexes": (CHAT, chat("hi", guided_regex="((a{1,900}){1,900}){1,900}"), (200, 400)),
    "a long stop": (CHAT, chat("hi", stop=["a" * 10**5] * 64), (200, 400)),
}  # fmt: skip


def test_bombs_are_refused_and_hold_up_nobody(real: Real) -> None:
    with neighbour(real) as gaps, httpx.Client(base_url=real.url, timeout=60) as client:
        for name, (path, body, allowed) in BOMBS.items():
            begin, seen = time.monotonic(), len(gaps)
            answer = client.post(path, content=body, headers={"content-type": "application/json"})
            took, most = time.monotonic() - begin, max(gaps[seen:], default=0.0)
            log.info("%s: %d in %.3f s, gap %.3f s, %.200s", name, answer.status_code, took, most, answer.text)
            assert answer.status_code in allowed, (name, answer.text[:300])
            if answer.status_code != 200:
                assert len(answer.json()["error"]["message"]) < 1000
            assert took < 20 and most < 5, name
    until(real.is_empty)


def test_clients_that_never_read_hold_up_nobody(real: Real) -> None:
    body = json.dumps({"messages": ASK, "stream": True, "n": 8, "logprobs": True, "top_logprobs": 20}).encode()
    links = []
    with neighbour(real) as gaps:
        for _ in range(12):
            link = socket.socket()
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            link.connect(("127.0.0.1", real.port))
            link.sendall(message(body))
            links.append(link)
        until(lambda: real.engine.statistics().waiting > 20)
        seen = len(gaps)
        until(lambda: len(gaps) > seen + 50)
        assert max(gaps[seen:]) < 5
        for link in links[::2]:
            link.close()
    until(real.is_empty, 60)  # the others have not read for slow_client_seconds
    for link in links:
        link.close()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def one_of_all(client: httpx.Client, seed: int) -> None:
    """A request of any kind, with a prompt of its own."""
    draws = random.Random(seed)
    prompt = draws.choices(range(5, 300), k=draws.randint(1, 200))
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": prompt, "max_tokens": 20, "logprobs": 5, "echo": True}),
        ("/v1/completions", {"prompt": prompt, "max_tokens": 20, "n": 3, "stream": True}),
        (CHAT, {"messages": [{"role": "user", "content": str(seed)}], "max_tokens": 20, "stop": ["e"]}),
        (CHAT, {"messages": ASK, "max_tokens": 20, "guided_regex": f"[ab]{{1,{2 + seed % 50}}}"}),
        ("/v1/responses", {"input": str(seed), "max_output_tokens": 10, "stream": True}),
        ("/v1/completions", {"prompt": prompt, "nonsense": seed}),
    ]
    path, body = draws.choice(bodies)
    assert client.post(path, json=body).status_code == (400 if "nonsense" in body else 200)


def load_for(real: Real, seconds: float, seed: int) -> int:
    """Eight clients at once; how many requests there were."""
    end, counts = time.monotonic() + seconds, [0] * 8

    def run(number: int) -> None:
        with httpx.Client(base_url=real.url, timeout=60) as client:
            while time.monotonic() < end:
                one_of_all(client, seed + 8 * counts[number] + number)
                counts[number] += 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(8)))
    until(real.is_empty)
    return sum(counts)


def memory_is_flat(real: Real, seconds: float) -> None:
    logging.getLogger("httpx").setLevel(logging.WARNING)  # pytest would keep a line of each request
    load_for(real, seconds / 2, 0)
    warm = resident()
    count = load_for(real, seconds, 10**6)
    grown = resident() - warm
    log.info("%d requests in %.0f s; resident memory grew by %.1f MiB", count, seconds, grown / 2**20)
    assert count > 20 and grown < GROWTH


def test_memory_is_flat(real: Real) -> None:
    memory_is_flat(real, 4)


@pytest.mark.slow
def test_memory_is_flat_for_minutes(real: Real) -> None:
    memory_is_flat(real, 120)


@contextmanager
def process(checkpoint: Path, port: int) -> Iterator[tuple[subprocess.Popen[str], int, float]]:
    """A server in a process of its own, its port, and the seconds until it was ready."""
    begin = time.monotonic()
    command = [sys.executable, "-m", "dovetail", "serve", str(checkpoint), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            ready = next(line for line in server.stdout if "is ready at" in line)
            found = re.search(r":(\d+) ", ready)
            assert found
            yield server, int(found[1]), time.monotonic() - begin
        finally:
            server.kill()


def test_killed_and_started_again_it_is_ready_as_soon(checkpoint: Path) -> None:
    body = {"prompt": [7, 8], "max_tokens": 900, "ignore_eos": True, "temperature": 0}
    with process(checkpoint, 0) as (server, port, _):  # the kernels are compiled now
        url = f"http://127.0.0.1:{port}"
        text = httpx.post(url + "/v1/completions", json={**body, "max_tokens": 5}, timeout=60).json()["choices"]
        taken = subprocess.run(
            [sys.executable, "-m", "dovetail", "serve", str(checkpoint), "--port", str(port)],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert taken.returncode == 1 and taken.stdout == ""
        assert taken.stderr == f"dovetail: port {port} is taken (address already in use): give another --port\n"
        link = socket.create_connection(("127.0.0.1", port))
        link.sendall(message(json.dumps({"messages": ASK, "stream": True}).encode()))
        assert link.recv(100)
        server.send_signal(signal.SIGKILL)
        server.wait(10)
        link.close()
    with process(checkpoint, port) as (server, port, seconds):
        log.info("ready again after %.1f s", seconds)
        assert seconds < 30
        assert httpx.post(url + "/v1/completions", json={**body, "max_tokens": 5}, timeout=60).json()["choices"] == text
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
