"""Starts serving: mistakes are found before weights are read; a signal lets what runs end first."""

from __future__ import annotations

import contextlib
import errno
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch
import uvicorn

from dovetail.config import validate
from dovetail.convert import check_source, load_llm, sampling_defaults, source_spec, tokenizer_directory
from dovetail.engine.engine import Engine
from dovetail.engine.loaded import check_tokenizer, fastest_dtype
from dovetail.engine.room import EngineConfig, plan_room
from dovetail.server.app import build_app
from dovetail.server.conversation import Conversation
from dovetail.server.exchange import Desk
from dovetail.server.gate import is_local
from dovetail.server.served import Served
from dovetail.server.settings import ServeConfig
from dovetail.text.tokenizer import Tokenizer

_CLOSING = 5  # seconds for the last bytes to be read, after generation has ended


def serve(checkpoint: Path, config: ServeConfig, say: Callable[[str], None]) -> None:
    """Serve `checkpoint`, a run or a Hugging Face directory, until a signal comes. `say` is told what goes on.

    Raises ValueError, before weights are read, for a tokenizer or template that is missing or wrong, a cache without
    room, more tokens or drafts than the model takes, and a port that is taken.
    """
    check_source(checkpoint)
    directory = tokenizer_directory(checkpoint)
    tokenizer = Tokenizer.load(directory)
    spec = source_spec(checkpoint)
    check_tokenizer(tokenizer, spec)
    template = Conversation.load(directory, config.chat_template, tokenizer)
    defaults = sampling_defaults(checkpoint)
    table = config.model_dump(include=set(EngineConfig.model_fields), exclude_none=True)
    engine_config = validate(EngineConfig, table, where="options")
    dtype = fastest_dtype(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    plan_room(spec, engine_config, dtype.itemsize)
    with listen(config.host, config.port, config.slow_client_seconds) as listener:
        if warning := exposure(config):
            say(warning)
        llm, remarks = load_llm(checkpoint)
        if remarks:
            say(remarks)
        engine = Engine(llm, engine_config)
        try:
            engine.wait_until_ready()
            name = config.served_model_name or checkpoint.resolve().name
            served = Served(
                engine=engine,
                tokenizer=tokenizer,
                template=template,
                name=name,
                config=config,
                created=int(time.time()),
                defaults=defaults,
            )
            desk = Desk(served)
            say(greeting(served, listener.getsockname()[1]))
            DrainingServer(desk).run(sockets=[listener])
        finally:
            engine.close()


def listen(host: str, port: int, slow_seconds: float) -> socket.socket:
    """Return a socket that listens: whoever asks before the weights are read waits. Raises ValueError (one line)."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ValueError(f"--host {host}: {error.strerror}; give a name or an address of this machine") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sys.platform == "linux":  # ends a connection whose client reads nothing for so long
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(slow_seconds * 1000))
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        reason = (error.strerror or str(error)).lower()
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"port {port} is taken ({reason}): give another --port") from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise ValueError(f"--host {host}: {reason}; give an address of this machine") from None
        raise ValueError(f"cannot listen at {host} port {port}: {reason}; give another --port") from None
    return listener


def exposure(config: ServeConfig) -> str:
    """Return a warning where anyone who reaches this machine may use the server, else nothing."""
    if config.api_key is not None or is_local(config.host):
        return ""
    return (
        f"WARNING: --host {config.host} without --api-key: anyone who reaches this machine can use the model; "
        "give a key, or --host 127.0.0.1"
    )


def greeting(served: Served, port: int) -> str:
    """Return where the server is, and how to ask it."""
    host = "127.0.0.1" if served.config.host in ("0.0.0.0", "::", "") else served.config.host
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    key = "" if served.config.api_key is None else '-H "Authorization: Bearer $DOVETAIL_API_KEY" '
    return (
        f"{served.name} is ready at {url} (a page to try it) and {url}/v1 (for clients of OpenAI's)\n"
        f"curl {url}/v1/chat/completions {key}-H 'Content-Type: application/json' "
        f"""-d '{{"messages": [{{"role": "user", "content": "Hello"}}]}}'"""
    )


class DrainingServer(uvicorn.Server):
    """The first signal refuses new requests and lets those that run end; the second one ends at once."""

    def __init__(self, desk: Desk) -> None:
        super().__init__(
            uvicorn.Config(
                build_app(desk),
                http="h11",  # bounds what it reads of headers, and is as fast here
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=_CLOSING,
            )
        )
        self.desk = desk

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals while the server runs; unlike uvicorn's own, raise none of them again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        if self.desk.is_draining:
            self.force_exit = self.should_exit = True
            return
        self.desk.is_draining = True
        threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def _drain(self) -> None:
        if not self.desk.served.engine.drain(self.desk.served.config.drain_seconds):
            self.desk.cancel_all()
        self.should_exit = True
