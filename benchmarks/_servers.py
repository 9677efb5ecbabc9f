"""Servers of OpenAI's API on this machine, each a process of its own: how they are started, and when they are ready."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from dovetail.threads import num_threads

START_SECONDS = 900  # vLLM compiles
STOP_SECONDS = 30
TAIL = 4000  # characters of a log that are shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """How one server is started."""

    words: Sequence[str]
    model: str  # its name for clients
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What every server is given."""

    checkpoint: Path
    max_model_len: int  # tokens of prompt and answer together
    max_sequences: int  # at once


def dovetail_server(room: Room, port: int, speculate: str) -> Command:
    words = [sys.executable, "-m", "dovetail", "serve", str(room.checkpoint), "--port", str(port)]
    words += ["--max-model-len", str(room.max_model_len), "--max-sequences", str(room.max_sequences)]
    words += ["--speculate", speculate]
    return Command(words=words, model=room.checkpoint.name, environment=dict(os.environ))


def vllm_server(room: Room, port: int, python: Path, preload: Sequence[str], eager: bool) -> Command:
    words = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(room.checkpoint)]
    words += ["--served-model-name", "vllm", "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
    words += ["--max-model-len", str(room.max_model_len), "--max-num-seqs", str(room.max_sequences)]
    # Its own rotary op is wrong for the queries of MLA, which have three dimensions, and the text is nonsense.
    words += ["--compilation-config", json.dumps({"custom_ops": ["all", "-rotary_embedding"]})]
    words += ["--enforce-eager"] if eager else []
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "LD_PRELOAD": ":".join(preload),
        "OMP_NUM_THREADS": str(num_threads()),
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        # All cores compute: of itself it keeps one free for its other processes, which costs more than it saves here.
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_threads() - 1}",
    }
    return Command(words=words, model="vllm", environment=environment)


def llama_server(room: Room, port: int, program: Path, gguf: Path) -> Command:
    """llama.cpp's own server, with a slot for every sequence."""
    threads, context = str(num_threads()), str(room.max_model_len * room.max_sequences)
    words = [str(program), "--model", str(gguf), "--alias", "llama", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--parallel", str(room.max_sequences), "--ctx-size", context]
    words += ["--threads", threads, "--threads-batch", threads]
    return Command(words=words, model="llama", environment=dict(os.environ))


def llama_python_server(room: Room, port: int, python: Path, gguf: Path) -> Command:
    """The server of llama-cpp-python, which answers one request at a time."""
    threads = str(num_threads())
    words = [str(python), "-m", "llama_cpp.server", "--model", str(gguf), "--model_alias", "llama"]
    words += ["--interrupt_requests", "false"]  # else a new request ends the one before it
    words += ["--host", "127.0.0.1", "--port", str(port), "--n_ctx", str(room.max_model_len)]
    words += ["--n_threads", threads, "--n_threads_batch", threads]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return Command(words=words, model="llama", environment=environment)


def transformers_server(room: Room, port: int, is_batching: bool) -> Command:
    program = Path(sys.executable).with_name("transformers")
    words = [str(program), "serve", str(room.checkpoint), "--host", "127.0.0.1", "--port", str(port)]
    words += ["--device", "cpu", "--dtype", "bfloat16", *(["--continuous-batching"] if is_batching else [])]
    return Command(words=words, model=str(room.checkpoint), environment=dict(os.environ))


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextmanager
def running(command: Command, port: int, log: Path) -> Iterator[str]:
    """Start a server, wait until it lists its models, yield its address; end it with all its processes."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command.words, env=dict(command.environment), stdout=out, stderr=out, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{port}"
            await_ready(process, url, log)
            yield url
        finally:
            end(process)


def await_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(f"{log.stem} ended; its last lines:\n{log.read_text()[-TAIL:]}")
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/v1/models", timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.5)
    sys.exit(f"{url}: not ready after {START_SECONDS} s; its last lines:\n{log.read_text()[-TAIL:]}")


def end(process: subprocess.Popen[bytes]) -> None:
    """End its whole session, since vLLM's engine is a process of its own."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
