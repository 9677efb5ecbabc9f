"""The engine's thread: what many clients get from it, and how it ends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from dovetail.engine import llm as llm_module
from dovetail.engine.core import Core, Outputs
from dovetail.engine.engine import Draining, Engine, Full
from dovetail.engine.grammar import Grammar
from dovetail.engine.llm import LLM
from dovetail.engine.room import EngineConfig
from dovetail.engine.sampler import SamplingParams
from dovetail.engine.sequence import Completion
from dovetail.engine.stream import Output, Stream, Token
from dovetail.model.transformer import Transformer
from dovetail.spec.model import ModelSpec
from dovetail.text.tokenizer import Tokenizer

SOON = 60.0  # seconds after which something hangs
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=1)
SAMPLED = GREEDY.model_copy(update={"temperature": 0.8, "seed": 5})
PENALIZED = SAMPLED.model_copy(update={"repetition_penalty": 1.2, "prompt_logprobs": 1})
MATCHING = SAMPLED.model_copy(update={"grammar": Grammar(kind="regex", text="[a-m]{3,9}(x|yz)*")})
LONG = GREEDY.model_copy(update={"max_tokens": 100})
PROMPTS = [[1, 2, 3], [4] * 40, [5, 6], [4] * 33 + [7, 8], list(range(9, 60)), [12]]
EngineFactory = Callable[..., Engine]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def llm(
    request: pytest.FixtureRequest,
    engine_spec: Callable[..., ModelSpec],
    random_model: Callable[..., Transformer],
) -> LLM:
    """A model with two MTP modules that says all kinds of bytes."""
    spec = engine_spec(vocab_size=261, eos_token_id=1)
    return LLM(random_model(spec, request.param, 1), spec, Tokenizer.train([], 261))


@pytest.fixture
def engine_of(llm: LLM) -> Iterator[EngineFactory]:
    """`engine_of(field=value)`: an engine that is ready; all are closed in the end."""
    engines: list[Engine] = []

    def build(**changes: object) -> Engine:
        engines.append(Engine(llm, EngineConfig(**{"max_model_len": 128, "page_size": 16, **changes})))
        assert engines[-1].wait_until_ready(SOON)
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


def read(stream: Stream) -> list[Output]:
    outputs = list(stream)
    assert all(output.finish_reason is None for output in outputs[:-1])
    return outputs


def tokens_of(outputs: list[Output]) -> list[Token]:
    """But for what depends on when it was made."""
    return [replace(token, is_draft=False) for output in outputs for token in output.tokens]


def text_of(outputs: list[Output]) -> str:
    return "".join("".join(token.text for token in output.tokens) + output.text for output in outputs)


def assert_same(stream: Stream, outputs: list[Output], completion: Completion) -> None:
    assert tokens_of(outputs) == [replace(token, is_draft=False) for token in completion.tokens]
    assert text_of(outputs) == completion.text and outputs[-1].finish_reason == completion.finish_reason
    assert stream.prompt_logprobs == completion.prompt_logprobs and stream.prompt_tokens == completion.prompt_tokens


@pytest.mark.parametrize("changes", [{}, {"speculate": 0, "max_sequences": 2}, {"speculate": 2, "max_batch_tokens": 9}])
def test_what_many_clients_get_is_what_generate_gives_each_alone(
    changes: dict[str, object], llm: LLM, engine_of: EngineFactory
) -> None:
    """Bit for bit: tokens, log-probabilities and text."""
    engine = engine_of(**changes)
    jobs = [
        (prompt, params.model_copy(update={"seed": seed, "max_tokens": 5 + 3 * seed}))
        for seed, prompt in enumerate(PROMPTS)
        for params in (GREEDY, SAMPLED, PENALIZED, MATCHING)
    ]

    def ask(job: tuple[list[int], SamplingParams]) -> tuple[Stream, list[Output]]:
        stream = engine.submit(*job)
        return stream, read(stream)

    with ThreadPoolExecutor(6) as clients:
        answers = list(clients.map(ask, jobs))
    for (prompt, params), answer in zip(jobs, answers, strict=True):
        assert_same(*answer, llm.generate([prompt], [params])[0])
    seen = engine.statistics()
    assert seen.running == seen.waiting == 0 and sum(seen.finished.values()) == len(jobs)
    assert seen.generated_tokens == sum(len(tokens_of(outputs)) for _, outputs in answers)
    assert len({tuple(token.id for token in tokens_of(outputs)) for _, outputs in answers}) > len(jobs) / 2


def test_submit_in_threads_and_in_an_event_loop(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call starts the engine, one for all."""
    started: list[Engine] = []

    def start(model: LLM) -> Engine:
        started.append(Engine(model, EngineConfig(max_model_len=128)))
        return started[-1]

    monkeypatch.setattr(llm_module, "Engine", start)
    own = LLM(llm.model, llm.spec, llm.tokenizer)
    jobs = [("ab", GREEDY), ("cd", SAMPLED), ("e", PENALIZED)]

    async def ask(prompt: str, params: SamplingParams) -> tuple[Stream, list[Output]]:
        stream = own.submit(prompt, params)
        return stream, [output async for output in stream]

    async def ask_all() -> list[tuple[Stream, list[Output]]]:
        return await asyncio.gather(*(ask(*job) for job in jobs))

    try:
        with ThreadPoolExecutor(3) as clients:
            streams = list(clients.map(lambda job: own.submit(*job), jobs))
            in_threads = list(zip(streams, clients.map(read, streams), strict=True))
        in_loop = asyncio.run(ask_all())
        for one, other, (prompt, params) in zip(in_threads, in_loop, jobs, strict=True):
            [completion] = llm.generate([prompt], [params])
            assert_same(*one, completion)
            assert_same(*other, completion)
    finally:
        for engine in started:
            engine.close()
    assert len(started) == 1


def test_a_client_whose_loop_has_ended_disturbs_nobody(llm: LLM, engine_of: EngineFactory) -> None:
    engine = engine_of()

    async def leave_early() -> None:
        async for _ in engine.submit([1, 2], LONG):
            return

    for _ in range(3):
        asyncio.run(leave_early())
    assert_same(stream := engine.submit([3], GREEDY), read(stream), llm.generate([[3]], [GREEDY])[0])
    assert engine.drain(SOON) and engine.statistics().finished == {"length": 4}


def test_a_loop_that_ends_while_it_is_woken_disturbs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, loop = Stream(1, lambda: None), asyncio.new_event_loop()

    async def begin() -> None:
        outputs = stream.__aiter__()
        await outputs.__anext__()
        await outputs.aclose()  # type: ignore[attr-defined]

    stream.put(Output())
    loop.run_until_complete(begin())
    wake = loop.call_soon_threadsafe

    def end_first(*arguments: Callable[[], object]) -> None:
        loop.close()
        wake(*arguments)

    monkeypatch.setattr(loop, "call_soon_threadsafe", end_first)
    stream.put(Output(finish_reason="stop"))
    stream.put(Output(finish_reason="abort"))
    assert loop.is_closed() and [output.finish_reason for output in stream] == ["stop"]


def test_a_group_has_one_prompt_that_is_computed_once(llm: LLM, engine_of: EngineFactory) -> None:
    engine = engine_of(speculate=0)
    each = [SAMPLED.model_copy(update={"seed": seed}) for seed in range(4)]
    streams = engine.submit_group(PROMPTS[1], each)
    for stream, params in zip(streams, each, strict=True):
        assert_same(stream, read(stream), llm.generate([PROMPTS[1]], [params])[0])
    assert [stream.cached_tokens for stream in streams] == [0, 32, 32, 32]
    seen = engine.statistics()
    assert seen.prompt_tokens == 40 + 3 * 8 and seen.prefix_hit_tokens == 96


# ---- Requests that do not go all the way ----


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """Each of the engine's steps waits for one `release`; `CLOSED` steps may be asked for, all go on in the end."""
    steps, step, is_open = threading.Semaphore(0), Core.step, threading.Event()

    def wait(core: Core) -> Outputs:
        while not steps.acquire(timeout=0.01):
            if is_open.is_set():
                break
        return step(core)

    monkeypatch.setattr(Core, "step", wait)
    yield steps
    is_open.set()


def open_up(gate: threading.Semaphore, steps: int = 1000) -> None:
    for _ in range(steps):
        gate.release()


def test_what_is_cancelled_before_its_first_output(
    llm: LLM, engine_of: EngineFactory, gate: threading.Semaphore
) -> None:
    """While it waits, and while others are computed; a second time it changes nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LLM, "warm_up", lambda *arguments: None)  # its steps would wait too
        engine = engine_of(max_sequences=1, speculate=0)
    first, second, third = (engine.submit(prompt, GREEDY) for prompt in PROMPTS[:3])
    second.cancel()
    second.cancel()
    open_up(gate)
    [output] = read(second)
    assert (output.finish_reason, output.tokens, output.text) == ("abort", (), "")
    for stream, prompt in ((first, PROMPTS[0]), (third, PROMPTS[2])):
        assert_same(stream, read(stream), llm.generate([prompt], [GREEDY])[0])
    first.cancel()  # it has ended
    assert engine.drain(SOON)
    assert engine.statistics().finished == {"abort": 1, "length": 2} and engine.statistics().cache_usage == 0


def test_what_is_cancelled_while_it_grows_ends_with_what_it_has(llm: LLM, engine_of: EngineFactory) -> None:
    engine, whole = engine_of(), llm.generate([PROMPTS[0]], [LONG])[0].tokens
    streams = [engine.submit(PROMPTS[0], LONG) for _ in range(3)]
    outputs = [next(iter(streams[0]))]
    streams[0].cancel()
    outputs += read(streams[0])
    assert outputs[-1].finish_reason in ("abort", "length")
    given = tokens_of(outputs)
    assert given == [replace(token, is_draft=False) for token in whole[: len(given)]]
    assert all(len(tokens_of(read(stream))) == 100 for stream in streams[1:])


def test_a_full_waiting_room(llm: LLM, engine_of: EngineFactory, gate: threading.Semaphore) -> None:
    """All of a group or none; who is told when to come again may come then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LLM, "warm_up", lambda *arguments: None)
        engine = engine_of(max_sequences=1, max_waiting=2, speculate=0)
    streams = [engine.submit([1], GREEDY)]
    with pytest.raises(Full):
        engine.submit_group([1], [GREEDY] * 3)
    streams += engine.submit_group([1], [GREEDY] * 2)
    with pytest.raises(Full, match=r"3 requests wait already; ask again in 3 s") as full:
        engine.submit([1], GREEDY)
    assert full.value.retry_after == 3.0, "three rounds of a request, which is taken to last a second"
    assert engine.statistics().waiting + engine.statistics().running <= 3
    open_up(gate)
    assert [len(tokens_of(read(stream))) for stream in streams] == [20, 20, 20]
    assert len(tokens_of(read(engine.submit([1], GREEDY)))) == 20


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([1] * 128, GREEDY, r"128 tokens; max_model_len = 128 leaves room for 127"),
        ([], GREEDY, "is empty"),
        ([261], GREEDY, "261 at position 0 is not a token"),
        ([1], GREEDY.model_copy(update={"grammar": Grammar(kind="regex", text="(")}), "regex cannot be followed"),
    ],
)
def test_what_cannot_be_met_is_said_on_the_call(
    prompt: list[int], params: SamplingParams, message: str, engine_of: EngineFactory
) -> None:
    engine = engine_of()
    with pytest.raises(ValueError, match=message):
        engine.submit(prompt, params)
    assert engine.statistics().waiting == 0 and engine.drain(SOON)


def test_a_completion_ends_at_max_model_len(engine_of: EngineFactory) -> None:
    outputs = read(engine_of(max_model_len=40).submit([1] * 30, LONG))
    assert len(tokens_of(outputs)) == 10 and outputs[-1].finish_reason == "length"


def test_a_cache_too_small_for_one_sequence_is_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"cache_bytes = 50,000 has room for .* max_model_len = 128 needs [0-9,]+"):
        Engine(llm, EngineConfig(cache_bytes=50_000))
    with pytest.raises(ValueError, match="speculate = 3 drafts per step"):
        Engine(llm, EngineConfig(speculate=3))


def test_a_cache_for_one_sequence_serves_many(llm: LLM, engine_of: EngineFactory) -> None:
    """They are set back, and nobody notices."""
    with pytest.raises(ValueError) as error:
        Engine(llm, EngineConfig(cache_bytes=1, page_size=16))
    least = int(str(error.value).split("needs ")[1].split(" bytes")[0].replace(",", ""))
    engine = engine_of(cache_bytes=least, max_sequences=5, shares_prefixes=False)
    prompts = [[number] * 10 for number in range(2, 7)]
    params = SAMPLED.model_copy(update={"max_tokens": 60})
    streams = [engine.submit(prompt, params) for prompt in prompts]
    for stream, prompt in zip(streams, prompts, strict=True):
        assert_same(stream, read(stream), llm.generate([prompt], [params])[0])
    assert engine.statistics().preemptions > 0


# ---- The end ----


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
    open_up(gate)
    assert engine.drain(SOON) and read(stream)[-1].finish_reason == "length"


def test_closing_ends_everything_at_once(engine_of: EngineFactory, gate: threading.Semaphore) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LLM, "warm_up", lambda *arguments: None)
        engine = engine_of(max_sequences=2, speculate=0)
    streams = [engine.submit(prompt, LONG) for prompt in PROMPTS]
    open_up(gate, 3)
    closing = threading.Thread(target=engine.close)
    closing.start()
    open_up(gate, 3)
    closing.join(SOON)
    assert not closing.is_alive()
    assert {read(stream)[-1].finish_reason for stream in streams} == {"abort"}
    with pytest.raises(Draining):
        engine.submit([1], GREEDY)
    assert engine.statistics().waiting == 0
    streams[0].cancel()
    engine.close()


FAILS = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


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
    if way == "fail":
        is_over.set()
    else:
        engine.close()
    for client in clients:
        client.join(SOON)
    assert not any(client.is_alive() for client in clients)
    assert set(reasons) <= {"length", "error" if way == "fail" else "abort"}
