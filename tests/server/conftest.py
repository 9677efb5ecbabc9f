"""A scripted engine, and the application around it: in this process, or behind a port. And the real one, small."""

from __future__ import annotations

import inspect
import json
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from real_server import Real, serving

from dovetail.engine.engine import Draining, Full, Statistics
from dovetail.engine.sampler import SamplingParams
from dovetail.engine.stream import Output, Stream, Token
from dovetail.model.checkpoint.weights import export_hf
from dovetail.model.transformer import Transformer
from dovetail.server.exchange import Desk
from dovetail.server.served import Delta, Prompt, Served
from dovetail.server.settings import ServeConfig
from dovetail.server.start import DrainingServer, listen
from dovetail.spec.model import ModelSpec
from dovetail.text.stream import TextStream
from dovetail.text.tokenizer import Tokenizer

TEXT = "Grüße, 世界! 1 2 3"


@dataclass
class ScriptedEngine:
    """Answers every prompt with `text`, `block` tokens at a time, `pace` seconds apart (0: all at once)."""

    tokenizer: Tokenizer
    text: str = TEXT
    block: int = 3
    pace: float = 0.0
    failure: str | None = None  # after the first block
    is_full: bool = False
    is_ready: bool = True
    max_model_len: int = 4096
    weights_version: str = "7"
    num_drafts: int = 1
    is_draining: bool = False
    asked: list[tuple[list[int], SamplingParams, int]] = field(default_factory=list)
    num_running: int = 0
    num_cancelled: int = 0  # before their end
    num_left: int = 0  # calls of cancel
    before_submit: Callable[[], object] = lambda: None

    def submit_group(
        self, prompt: Sequence[int], params: Sequence[SamplingParams], *, priority: int = 0
    ) -> list[Stream]:
        self.before_submit()
        if self.is_draining:
            raise Draining("no")
        if self.is_full:
            raise Full(9, 2.5)
        if not prompt or len(prompt) >= self.max_model_len:
            raise ValueError(f"the prompt has {len(prompt)} tokens; max_model_len = {self.max_model_len}: shorten it")
        self.asked += [(list(prompt), each, priority) for each in params]
        return [self._stream(list(prompt), each) for each in params]

    def _stream(self, prompt: list[int], params: SamplingParams) -> Stream:
        stopped = threading.Event()

        def cancel() -> None:
            self.num_left += 1
            stopped.set()

        stream = Stream(len(prompt), cancel)
        if params.prompt_logprobs is not None:
            stream.prompt_logprobs = [None] + [(-0.5 * token, ((token, -0.25), (5, -1.5))) for token in prompt[1:]]
        stream.cached_tokens = 2
        outputs = list(self.outputs(params))
        self.num_running += 1
        if self.pace:
            threading.Thread(target=self._play, args=(stream, outputs, stopped), daemon=True).start()
        else:
            self._play(stream, outputs, stopped)
        return stream

    def _play(self, stream: Stream, outputs: list[Output], stopped: threading.Event) -> None:
        for output in outputs:
            if self.pace and stopped.wait(self.pace):
                self.num_cancelled += 1
                stream.put(Output(finish_reason="abort"))
                break
            stream.put(output)
        self.num_running -= 1

    def outputs(self, params: SamplingParams) -> Iterator[Output]:
        ids = self.tokenizer.encode(self.text)
        reason = "length" if params.max_tokens < len(ids) else "stop"
        ids = ids[: params.max_tokens]
        stream = TextStream(self.tokenizer)
        tokens = [self.token(i, each, stream.push([each]), params) for i, each in enumerate(ids)]
        for start in range(0, len(ids), self.block):
            is_last = start + self.block >= len(ids)
            if self.failure and start:
                yield Output(finish_reason="error", error=f"Traceback (most recent call last):\n  x\n{self.failure}")
                return
            output = Output(tokens=tuple(tokens[start : start + self.block]))
            yield replace(output, finish_reason=reason, text=stream.finish()) if is_last else output

    def token(self, position: int, token_id: int, text: str, params: SamplingParams) -> Token:
        is_scored = params.logprobs is not None
        return Token(
            id=token_id,
            text=text,
            logprob=-0.125 * (1 + (params.seed + position) % 5) if is_scored else None,
            sampler_logprob=-0.0625 if is_scored else None,
            top=((token_id, -0.125), (9, float("-inf")))[: params.logprobs or 0],
            is_draft=position % 2 == 1,
            experts=((1, 3), (0, 2)) if params.routed_experts else None,
        )

    def statistics(self) -> Statistics:
        return Statistics(
            running=self.num_running,
            waiting=4,
            cache_usage=0.25,
            prompt_tokens=11,
            generated_tokens=12,
            prefix_queried_tokens=13,
            prefix_hit_tokens=14,
            preemptions=15,
            drafted=(16, 8),
            accepted=(10, 3),
            finished={"stop": 17, "length": 18},
            speculation="2 drafts: they pay",
            step_seconds=0.5,
            step_tokens=19,
        )

    def drain(self, timeout: float) -> bool:
        self.is_draining = True
        end = time.monotonic() + timeout
        while self.num_running and time.monotonic() < end:
            time.sleep(0.01)
        return not self.num_running


class ScriptedParser:
    """What stands before "</think>" is a thought, if the conversation asked for one; "<f>{...}" is a call of f."""

    def __init__(self, thinks: bool) -> None:
        self.is_thinking, self.num_calls = thinks, 0
        self.held = ""

    def push(self, token_id: int, text: str) -> list[Delta]:
        self.held += text
        if not self.is_thinking:
            return self._content(self.take())
        thought, mark, rest = self.held.partition("</think>")
        if mark:
            self.is_thinking, self.held = False, ""
            return [*([Delta(reasoning=thought)] if thought else []), *self._content(rest)]
        return [] if "<" in self.held else [Delta(reasoning=self.take())] if self.held else []

    def take(self) -> str:
        text, self.held = self.held, ""
        return text

    def _content(self, text: str) -> list[Delta]:
        deltas: list[Delta] = []
        for character in text:
            if character == "@":  # a call begins
                self.num_calls += 1
                deltas.append(Delta(call=self.num_calls - 1, id=f"id{self.num_calls}", name="look"))
            elif self.num_calls:
                deltas.append(Delta(call=self.num_calls - 1, arguments=character))
            else:
                deltas.append(Delta(content=character))
        return deltas

    def finish(self, text: str) -> list[Delta]:
        rest = self.take() + text
        if self.is_thinking:
            return [Delta(reasoning=rest)] if rest else []
        return self._content(rest)


class ScriptedTemplate:
    """Writes "role: content" lines; refuses a conversation that says so."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.asked: list[tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]] = []

    def prompt(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> Prompt:
        self.asked.append((messages, options))
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        if "refuse this" in text:
            raise ValueError("the template refuses it")
        thinks = bool(options.get("thinking"))

        def new_parser(*, reads_calls: bool) -> ScriptedParser:
            return ScriptedParser(thinks)

        return Prompt(tokens=self.tokenizer.encode(text), new_parser=new_parser, after="</think>" if thinks else "")


@dataclass
class Site:
    """The application, what it serves, and a client in this process."""

    desk: Desk
    engine: ScriptedEngine
    template: ScriptedTemplate
    app: Any

    def ask(self, method: str, path: str, **given: Any) -> httpx.Response:
        """One request; the application may not raise."""
        import asyncio

        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=20) as client:
                return await client.request(method, path, **given)

        return asyncio.run(run())

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.ask("POST", path, json=body)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["Grüße 世界 " * 3], 268)


@pytest.fixture
def build(tokenizer: Tokenizer) -> Callable[..., Site]:
    """`build(api_key="x", engine={"text": "y"})`: an application with these settings."""
    from dovetail.server.app import build_app

    def make(engine: Mapping[str, Any] | None = None, **settings: Any) -> Site:
        scripted, template = ScriptedEngine(tokenizer, **(engine or {})), ScriptedTemplate(tokenizer)
        config = ServeConfig(**settings)
        desk = Desk(
            Served(engine=scripted, tokenizer=tokenizer, template=template, name="tiny", config=config, created=5)
        )
        return Site(desk, scripted, template, build_app(desk))

    return make


@dataclass
class Running:
    """A site behind a port."""

    site: Site
    port: int
    server: uvicorn.Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
def start(build: Callable[..., Site]) -> Iterator[Callable[..., Running]]:
    """`start(...)`, as `build`, behind a free port of this machine."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def run(**settings: Any) -> Running:
        site = build(**settings)
        listener = listen("127.0.0.1", 0, site.desk.served.config.slow_client_seconds)
        server = DrainingServer(site.desk)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        running.append((server, thread))
        return Running(site, listener.getsockname()[1], server)

    yield run
    for server, thread in running:
        server.should_exit = server.force_exit = True
        thread.join(5)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_spec: Callable[..., ModelSpec],
    random_model: Callable[..., Transformer],
) -> Path:
    """A directory in the Hugging Face layout: random weights in FP32, one MTP module, a tokenizer that fits."""
    directory = tmp_path_factory.mktemp("checkpoint")
    text = inspect.getsource(textwrap)
    tokenizer = Tokenizer.train([text, json.dumps({"name": "Grüße", "size": 3})] * 3, 400)
    tokenizer.save(directory / "own")
    spec = tiny_spec(vocab_size=tokenizer.vocab_size, max_position_embeddings=1024)
    export_hf(random_model(spec), spec, directory / "real", tokenizer_files=sorted((directory / "own").glob("*.json")))
    return directory / "real"


@pytest.fixture(scope="session")
def real(checkpoint: Path) -> Iterator[Real]:
    """The real engine on it behind a port, for bodies of up to 30 MB."""
    with serving(checkpoint, ServeConfig(max_body_bytes=30_000_000, slow_client_seconds=2, drain_seconds=3)) as running:
        yield running
