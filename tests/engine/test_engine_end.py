"""How the engine's thread ends: by draining, closing, or failing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from dovetail.engine.core import Core, Outputs
from dovetail.engine.engine import Draining, Engine
from dovetail.engine.llm import LLM
from dovetail.engine.room import EngineConfig
from dovetail.engine.sampler import SamplingParams
from dovetail.engine.stream import Output, Stream

SOON = 60.0  # seconds after which something hangs
MANY = 1000  # steps
FAILS = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
LONG = GREEDY.model_copy(update={"max_tokens": 100})
PROMPTS = [[1, 2, 3], [4] * 17, [5, 6], [7]]
EngineFactory = Callable[..., Engine]


def read(stream: Stream) -> list[Output]:
    outputs = list(stream)
    assert all(output.finish_reason is None for output in outputs[:-1])
    return outputs


def test_draining_lets_all_finish_and_takes_nothing_new(engine_of: EngineFactory) -> None:
    engine = engine_of()
    streams = [engine.submit(prompt, LONG) for prompt in PROMPTS[:3]]
    engine.drain(0)
    with pytest.raises(Draining, match="takes nothing new"):
        engine.submit([1], GREEDY)
    assert engine.drain(SOON) and engine.is_ready
    assert [read(stream)[-1].finish_reason for stream in streams] == ["length"] * 3


def test_draining_takes_as_long_as_it_may(engine_of: EngineFactory, gate: threading.Semaphore) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LLM, "warm_up", lambda *arguments: None)
        engine = engine_of(speculate=0)
    stream = engine.submit([1], GREEDY)
    assert not engine.drain(0.05)
    gate.release(MANY)
    assert engine.drain(SOON) and read(stream)[-1].finish_reason == "length"


def test_closing_ends_everything_at_once(engine_of: EngineFactory, gate: threading.Semaphore) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LLM, "warm_up", lambda *arguments: None)
        engine = engine_of(max_sequences=2, speculate=0)
    streams = [engine.submit(prompt, LONG) for prompt in PROMPTS]
    gate.release(3)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._shared.is_draining:
        closing.join(0.001)
    gate.release(MANY)
    closing.join(SOON)
    assert not closing.is_alive()
    assert {read(stream)[-1].finish_reason for stream in streams} == {"abort"}
    with pytest.raises(Draining):
        engine.submit([1], GREEDY)
    seen = engine.statistics()
    assert seen.running == seen.waiting == seen.cache_usage == 0 and seen.finished == {"abort": len(PROMPTS)}
    streams[0].cancel()
    engine.close()


@FAILS
def test_a_failure_ends_every_stream_and_is_said_to_whoever_comes(
    engine_of: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, step, count = engine_of(max_sequences=2), Core.step, iter(range(99))

    def fail_at_last(core: Core) -> Outputs:
        if next(count) == 4:
            raise RuntimeError("the fan is broken")
        return step(core)

    monkeypatch.setattr(Core, "step", fail_at_last)
    assert engine.is_ready
    streams = engine.submit_group(PROMPTS[0], [LONG] * 4)
    message = "the engine failed: RuntimeError: the fan is broken"
    for stream in streams:
        last = read(stream)[-1]
        assert (last.finish_reason, last.error) == ("error", message)
    assert not engine.is_ready
    for call in (lambda: engine.submit([1], GREEDY), engine.wait_until_ready, lambda: engine.wait_until_ready(SOON)):
        with pytest.raises(RuntimeError, match=message):
            call()
    assert engine.drain(SOON) and engine.statistics().waiting == 0


@FAILS
def test_a_failure_before_it_is_ready(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LLM, "warm_up", lambda *arguments: 1 / 0)
    for timeout in (None, SOON):  # neither waits longer than until it fails
        engine, begin = Engine(llm, EngineConfig(max_model_len=128)), time.perf_counter()
        with pytest.raises(RuntimeError, match="the engine failed: ZeroDivisionError: division by zero"):
            engine.wait_until_ready(timeout)
        assert not engine.is_ready and time.perf_counter() - begin < SOON / 2
        engine.close()


@FAILS
@pytest.mark.parametrize("way", ["fail", "close"])
def test_nobody_who_comes_at_the_end_waits_for_ever(
    way: str, engine_of: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call raises, or gives a stream that ends."""
    engine, step = engine_of(), Core.step
    is_over = threading.Event()

    def fail_at_last(core: Core) -> Outputs:
        if is_over.is_set():
            raise RuntimeError("over")
        return step(core)

    monkeypatch.setattr(Core, "step", fail_at_last)
    reasons: list[str | None] = []

    def ask() -> None:
        while True:
            try:
                stream = engine.submit([1, 2], GREEDY)
            except RuntimeError:
                return
            reasons.append(read(stream)[-1].finish_reason)

    clients = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    for client in clients:
        client.start()
    while len(reasons) < 4:
        engine.statistics()
        is_over.wait(0.001)
    if way == "fail":
        is_over.set()
    else:
        engine.close()
    for client in clients:
        client.join(SOON)
    assert not any(client.is_alive() for client in clients)
    assert set(reasons) <= {"length", "error" if way == "fail" else "abort"}
