"""The engine's thread: what many clients get from it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from dovetail.engine import llm as llm_module
from dovetail.engine.engine import Engine, Full
from dovetail.engine.grammar import Grammar
from dovetail.engine.llm import LLM
from dovetail.engine.room import EngineConfig
from dovetail.engine.sampler import SamplingParams
from dovetail.engine.sequence import Completion
from dovetail.engine.stream import Output, Stream, Token

SOON = 60.0  # seconds after which something hangs
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=1)
SAMPLED = GREEDY.model_copy(update={"temperature": 0.8, "seed": 5})
PENALIZED = SAMPLED.model_copy(update={"repetition_penalty": 1.2, "prompt_logprobs": 1})
MATCHING = SAMPLED.model_copy(update={"grammar": Grammar(kind="regex", text="[a-m]{3,9}(x|yz)*")})
LONG = GREEDY.model_copy(update={"max_tokens": 100})
PROMPTS = [[1, 2, 3], [4] * 40, [5, 6], [4] * 33 + [7, 8], list(range(9, 60)), [12]]
MANY = 1000  # steps
EngineFactory = Callable[..., Engine]


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
    gate.release(MANY)
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
    gate.release(MANY)
    assert [len(tokens_of(read(stream))) for stream in streams] == [20, 20, 20]
    assert len(tokens_of(read(engine.submit([1], GREEDY)))) == 20


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([1] * 120, GREEDY, r"120 tokens; max_model_len = 120 leaves room for 119"),
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
        Engine(llm, EngineConfig(max_model_len=120, cache_bytes=1, page_size=16))
    least = int(str(error.value).split("needs ")[1].split(" bytes")[0].replace(",", ""))
    engine = engine_of(cache_bytes=least, max_sequences=5, shares_prefixes=False)
    prompts = [[number] * 10 for number in range(2, 7)]
    params = SAMPLED.model_copy(update={"max_tokens": 60})
    streams = [engine.submit(prompt, params) for prompt in prompts]
    for stream, prompt in zip(streams, prompts, strict=True):
        assert_same(stream, read(stream), llm.generate([prompt], [params])[0])
    assert engine.statistics().preemptions > 0
