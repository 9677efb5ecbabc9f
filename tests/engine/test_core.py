"""The engine's loop under random load: each completion has the bits that its prompt gives alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from dovetail.engine.core import Core
from dovetail.engine.llm import LLM
from dovetail.engine.room import Room
from dovetail.engine.sampler import SamplingParams, probabilities, sample
from dovetail.engine.scheduling.scheduler import Part, Scheduler
from dovetail.engine.sequence import Completion, Sequence
from dovetail.engine.steps.rows import NONE, Chunk, Short
from dovetail.engine.steps.runner import Chosen, Runner
from dovetail.engine.steps.tiled import TiledSteps
from dovetail.engine.stream import Token
from dovetail.model.transformer import Transformer
from dovetail.numerics import capability
from dovetail.numerics.formats.errors import network_terms, normwise_error, tolerance
from dovetail.spec.model import ModelSpec
from dovetail.text.tokenizer import Tokenizer

Trained = tuple[dict[torch.dtype, Transformer], list[int]]
DTYPES = [torch.bfloat16, torch.float32]
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=2)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=16, ignore_eos=True, logprobs=2)
PENALTIES = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.3,
    "logit_bias": {7: 3.0, 9: -5},
}
EVERYTHING = SAMPLED.model_copy(update={**PENALTIES, "routed_experts": True})


@dataclass
class Request:
    tokens: list[int]
    params: SamplingParams
    arrives: int = 0  # in this step
    cancelled: int | None = None  # in this step
    priority: int = 0
    leader: int | None = None  # an earlier request's number
    given: list[Token] = field(default_factory=list)
    sequence: Sequence | None = None

    def completion(self) -> Completion:
        assert self.sequence is not None
        return self.sequence.completion(tuple(self.given))


def run(core: Core, llm: LLM, requests: list[Request], checks_end: bool = True) -> list[Request]:
    """All requests through the core's steps; at the end nothing is held."""
    step = 0
    while core.has_work or any(request.sequence is None for request in requests):
        for request in requests:
            if request.arrives == step:
                request.sequence = llm.sequence(list(request.tokens), request.params)
                request.sequence.priority = request.priority
                request.sequence.leader = None if request.leader is None else requests[request.leader].sequence
                core.add(request.sequence)
            if request.cancelled == step and request.sequence is not None:
                had_ended = request.sequence.finish_reason is not None
                assert (core.cancel(request.sequence) is None) == had_ended
        by_sequence = {id(request.sequence): request for request in requests}
        for sequence, output in core.step():
            by_sequence[id(sequence)].given += output.tokens
        step += 1
        assert step < 5000, "it does not end"
    assert core.pool.num_free == core.room.num_pages
    kernels = core.runner.kernels
    assert not checks_end or not isinstance(kernels, TiledSteps) or not kernels.kept
    return requests


def random_requests(text: list[int], rng: random.Random, count: int) -> list[Request]:
    """Prompts that share beginnings, further samples of one prompt, cancellations, all kinds of params."""
    requests: list[Request] = []
    for number in range(count):
        params = rng.choice((GREEDY, SAMPLED, EVERYTHING))
        changes = {"max_tokens": rng.randint(1, 30), "seed": number}
        if rng.random() < 0.2:
            changes["prompt_logprobs"] = 1
        leader, arrives = None, rng.randrange(12)
        if requests and rng.random() < 0.25:
            leader = number - 1 if requests[-1].leader is None else requests[-1].leader
            tokens, arrives = requests[leader].tokens, requests[leader].arrives
        else:
            start, shared = rng.randrange(len(text) - 200), rng.choice((0, 0, 20, 48))
            tokens = text[:shared] + text[start : start + rng.choice((1, 2, 9, 17, 40))]
        requests.append(
            Request(
                tokens=tokens,
                params=params.model_copy(update=changes),
                arrives=arrives,
                cancelled=arrives + rng.randrange(15) if rng.random() < 0.15 else None,
                priority=rng.choice((0, 0, 1)),
                leader=leader,
            )
        )
    return requests


def alone(llm: LLM, requests: list[Request]) -> list[Completion]:
    return [llm.generate([request.tokens], [request.params])[0] for request in requests]


def plain(tokens: tuple[Token, ...]) -> list[Token]:
    return [replace(token, is_draft=False) for token in tokens]


def differing(requests: list[Request], completions: list[Completion]) -> int:
    """Completions with another bit; of a cancelled one its beginning counts."""
    count = 0
    for request, other in zip(requests, completions, strict=True):
        mine = request.completion()
        whole = mine.finish_reason != "abort"
        assert whole or request.cancelled is not None
        same = plain(mine.tokens) == plain(other.tokens if whole else other.tokens[: len(mine.tokens)])
        if whole:
            same &= mine.token_ids == other.token_ids and mine.prompt_logprobs == other.prompt_logprobs
        count += not same
    return count


def room_of(rng: random.Random, requests: list[Request], page_size: int, is_tiny: bool, depth: int) -> Room:
    """Tiny: as many pages as the longest alone may need."""
    positions = max(len(request.tokens) + request.params.max_tokens for request in requests)
    one = -(-(positions + depth) // page_size)
    return Room(
        sequences=rng.choice((3, 5, 9)),
        positions=positions,
        num_pages=one if is_tiny else 9 * one,
        page_size=page_size,
        prompt_tokens=rng.choice((1, 13, 64, 500)),
        shares_prefixes=rng.random() < 0.8,
    )


ROOMS = [(1, True, 0), (8, True, 2), (8, False, 1), (16, True, 2), (64, False, 2), (3, True, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_completion_does_not_depend_on_what_happens_beside_it(dtype: torch.dtype, trained: Trained) -> None:
    """Random arrivals, chunks, page sizes, prefix hits, set-backs, drafts, cancellations and priorities."""
    models, text = trained
    llm, rng = LLM(models[dtype], models[dtype].spec), random.Random(str(dtype))
    set_backs = hits = accepted = drafted = aborted = 0
    for number, (page_size, is_tiny, depth) in enumerate(2 * ROOMS):
        requests = random_requests(text, rng, 12)
        core = Core(models[dtype], room_of(rng, requests, page_size, is_tiny, depth), depth, is_auto=number % 2 == 1)
        assert differing(run(core, llm, requests), alone(llm, requests)) == 0
        set_backs, hits = set_backs + core.scheduler.set_backs, hits + core.scheduler.hit
        accepted, drafted = accepted + sum(core.counts.accepted), drafted + sum(core.counts.drafted)
        aborted += core.counts.finished.get("abort", 0)
    assert set_backs > 10 and hits > 100 and aborted > 3 and 0.1 < accepted / drafted < 0.9


def test_the_reference_keeps_the_promise_too(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole prompts, and row by row."""
    models, text = trained
    monkeypatch.setattr("dovetail.engine.steps.runner.takes", lambda model: False)
    llm, rng = LLM(models[torch.float32], models[torch.float32].spec), random.Random(4)
    requests = random_requests(text, rng, 6)
    for request in requests:
        request.params = request.params.model_copy(update={"max_tokens": 5})
    core = Core(llm.model, room_of(rng, requests, 8, True, 2), 2)
    assert not core.runner.cuts_prompts
    assert differing(run(core, llm, requests), alone(llm, requests)) == 0


def again_as_a_prompt(
    self: Runner, short: Short, chunks: list[Chunk], wanted: list[int] | None = None, chosen: Chosen | None = None
) -> Tensor:
    """What a sequence had generated before it was set back, the way of its prompt: several rows of one slot."""
    hidden = RUN(self, short, chunks, wanted, chosen)
    for slot, count in Counter(short.slots).items():
        if count > 1:
            first = short.slots.index(slot)
            RUN(self, NONE, [Chunk(slot, short.positions[first], short.tokens[first : first + count])])
    return hidden


def nothing_is_forgotten(self: Runner, slot: int) -> None:
    pass


def published_too_soon(self: Scheduler, part: Part) -> None:
    for page, key in zip(part.task.pages, part.task.keys, strict=False):
        self.pool.publish(page, key)
    COMMIT(self, part)


COMMIT, RUN = Scheduler.commit, Runner.run
# Without AVX-512 BF16 prompts go the way of steps, and no keys are kept.
BF16_MISTAKES = [
    (Runner, "run", again_as_a_prompt),
    (Runner, "forget", nothing_is_forgotten),
] * capability.has_bf16_instructions()


@pytest.mark.parametrize(
    ("target", "name", "wrong"),
    [
        (Core, "has_work", Core.has_work),  # nothing is wrong
        (Scheduler, "commit", published_too_soon),
        *BF16_MISTAKES,
    ],
)
def test_mistakes_are_noticed(
    target: type, name: str, wrong: object, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, text = trained
    model = models[torch.bfloat16]
    llm, params = LLM(model, model.spec), GREEDY.model_copy(update={"max_tokens": 40})
    requests = [
        Request(tokens=text[:25] + text[i * 90 :][:20], params=params, arrives=2 * i, cancelled=12 if i == 5 else None)
        for i in range(10)
    ]
    expected = alone(llm, requests)
    monkeypatch.setattr(target, name, wrong)
    room = Room(sequences=5, positions=90, num_pages=25, page_size=8, prompt_tokens=13)
    core = Core(model, room)
    assert (differing(run(core, llm, requests, checks_end=False), expected) == 0) == (name == "has_work")
    assert core.scheduler.set_backs > 0 and core.scheduler.hit > 0


def test_one_that_was_cancelled_gives_no_more_and_its_pages_go_to_others(trained: Trained) -> None:
    models, text = trained
    llm = LLM(models[torch.float32], models[torch.float32].spec)
    core = Core(llm.model, Room(sequences=2, positions=60, num_pages=2, page_size=64))
    first, second, third = (llm.sequence(text[i * 50 :][:20], GREEDY) for i in range(3))
    for sequence in (first, second, third):
        core.add(sequence)
    core.step()
    core.step()
    assert third.computed == 0
    output = core.cancel(first)
    assert output is not None and output.finish_reason == "abort" and not output.tokens
    assert core.cancel(first) is None, "it had ended"
    assert first.completion().finish_reason == "abort" and len(first.completion().token_ids) == 2
    assert first not in [sequence for sequence, _ in core.step()] and third.is_running
    waiting = llm.sequence(text[:20], GREEDY)
    core.add(waiting)
    assert core.cancel(waiting) is not None
    while core.has_work:
        core.step()
    assert core.counts.finished == {"abort": 2, "length": 2} and core.pool.num_free == 2
    assert third.completion().token_ids == llm.generate([third.tokens[:20]], [GREEDY])[0].token_ids


@pytest.mark.parametrize("depth", [0, 2])
def test_counts(depth: int, trained: Trained) -> None:
    models, text = trained
    llm = LLM(models[torch.float32], models[torch.float32].spec)
    core = Core(llm.model, Room(sequences=8, positions=80, num_pages=40, page_size=16, prompt_tokens=30), depth)
    prompts = [text[:50], text[:50], text[:33] + text[200:217]]
    requests = [Request(tokens=tokens, params=GREEDY, arrives=9 * number) for number, tokens in enumerate(prompts)]
    statistics = [request.completion().statistics for request in run(core, llm, requests)]
    assert [each.cached_tokens for each in statistics] == ([0, 48, 32] if depth == 0 else [0, 32, 16])
    assert core.counts.prompt_tokens == 150 - sum(each.cached_tokens for each in statistics)
    assert core.counts.generated_tokens == 48 and core.counts.finished == {"length": 3}
    assert sum(core.counts.drafted) == sum(each.drafted for each in statistics)
    assert sum(core.counts.accepted) == sum(each.accepted for each in statistics)
    for request, each in zip(requests, statistics, strict=True):
        assert sum(token.is_draft for token in request.given) == each.accepted
        assert each.steps - (15 - each.accepted) in ((0,) if depth == 0 else (0, 1))  # the last may be cut
        assert each.drafted == depth * each.steps
        assert each.prefill_seconds > 0 and each.decode_seconds > 0


# ---- What is said of tokens ----


@torch.no_grad()
def logits_of(model: Transformer, tokens: list[int]) -> Tensor:
    """[T, V] of the reference, over everything at once."""
    return model.logits(model(torch.tensor([tokens])).hidden[0])


def bound_of(model: Transformer, length: int) -> float:
    return tolerance(torch.float32, roundings=length, terms=network_terms(model.spec, length))


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED, EVERYTHING])
def test_log_probabilities_are_those_of_the_full_forward(params: SamplingParams, depth: int, trained: Trained) -> None:
    models, text = trained
    model = models[torch.float32]
    params = params.model_copy(update={"logprobs": 3, "prompt_logprobs": 2, "max_tokens": 24})
    prompt = text[300:340]
    [completion] = LLM(model, model.spec).generate([prompt], [params], speculate=depth)
    everything = [*prompt, *completion.token_ids]
    logprobs = logits_of(model, everything).log_softmax(dim=-1)
    bound = bound_of(model, len(everything))
    assert completion.prompt_logprobs is not None and completion.prompt_logprobs[0] is None
    said = [(token.logprob, token.top) for token in completion.tokens]
    rows = [*completion.prompt_logprobs[1:], *said]
    assert len(rows) == len(everything) - 1
    for position, row in enumerate(rows):
        assert row is not None
        own, top = row
        best = logprobs[position].topk(2 if position < len(prompt) - 1 else 3)
        ours = torch.tensor([own, *(value for _, value in top)])
        theirs = torch.cat((logprobs[position, everything[position + 1]][None], best.values))
        assert normwise_error(ours, theirs) < bound
        assert [token for token, _ in top] == best.indices.tolist()


def test_nothing_is_said_unless_asked_for(trained: Trained) -> None:
    models, text = trained
    model = models[torch.float32]
    params = SamplingParams(max_tokens=2)
    [completion] = LLM(model, model.spec).generate([text[:5]], params)
    assert completion.prompt_logprobs is None
    assert [(t.logprob, t.sampler_logprob, t.top, t.experts) for t in completion.tokens] == [(None, None, (), None)] * 2
    none, *_ = LLM(model, model.spec).generate([text[:5]], params.model_copy(update={"logprobs": 0}))
    assert none.tokens[0].logprob is not None and none.tokens[0].top == ()


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("depth", [0, 2])
def test_experts_are_those_of_the_full_forward(
    depth: int, fused: bool, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the position that a token is drawn at: the one before it."""
    models, text = trained
    model = models[torch.float32]
    if not fused:
        monkeypatch.setattr("dovetail.engine.steps.runner.takes", lambda model: False)
    prompts = [text[300:340], text[500:501]]
    params = [EVERYTHING, EVERYTHING.model_copy(update={"seed": 4})]
    for prompt, completion in zip(prompts, LLM(model, model.spec).generate(prompts, params, depth), strict=True):
        routings = model(torch.tensor([[*prompt, *completion.token_ids]])).routings
        for number, token in enumerate(completion.tokens):
            theirs = [sorted(each.expert_ids[len(prompt) + number - 1].tolist()) for each in routings]
            assert token.experts is not None and [sorted(layer) for layer in token.experts] == theirs
    assert len({token.experts for token in completion.tokens}) > 3


# ---- What a request does to its logits ----


def their_logits(
    logits: Tensor, params: SamplingParams, prompt: list[int], generated: list[int], ends: set[int]
) -> Tensor:
    """By transformers' processors, and the formula of OpenAI's manual, which it lacks."""
    tokens = torch.tensor([[*prompt, *generated]])
    logits = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(tokens, logits[None].clone())
    for token in set(generated):
        logits[0, token] -= params.presence_penalty + params.frequency_penalty * generated.count(token)
    processors = LogitsProcessorList()
    if params.logit_bias:
        processors.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in params.logit_bias.items()}))
    if params.min_tokens:
        processors.append(MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, sorted(ends), "cpu"))
    return processors(tokens, logits)[0]


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.8},
        {"presence_penalty": 1.0},
        {"frequency_penalty": -0.5},
        {"logit_bias": {7: 4.0, 225: -100.0, 10**6: 5.0}},
        {"min_tokens": 9},
        {**PENALTIES, "min_tokens": 5},
    ],
    ids=str,
)
def test_tokens_are_those_of_transformers_processors(
    changes: dict[str, object], temperature: float, depth: int, trained: Trained
) -> None:
    """Across drafts that were kept and drafts that were not."""
    models, text = trained
    model = models[torch.float32]
    stops = {int(logits_of(model, text[300:340])[-1].argmax()), 225}
    params = SamplingParams(temperature=temperature, max_tokens=30, logprobs=0, seed=3, ignore_eos=True, **changes)
    if params.min_tokens:
        params = params.model_copy(update={"stop_token_ids": tuple(stops)})
    prompts = [text[300:340], text[700:709]]
    llm = LLM(model, model.spec)
    completions = llm.generate(prompts, [params] * 2, speculate=depth)
    known = params.model_copy(update={"logit_bias": {t: b for t, b in params.logit_bias.items() if t < 320}})
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = completion.token_ids
        assert len(ids) >= max(params.min_tokens, 1)
        rows = logits_of(model, [*prompt, *ids])
        for number, token in enumerate(completion.tokens):
            logits = their_logits(rows[len(prompt) + number - 1], known, prompt, ids[:number], stops)
            distribution = probabilities(logits, params)
            assert token.id == sample(distribution, params.seed, len(prompt) + number)
            expected = torch.tensor([1.0, float(distribution[token.id].log())])  # errors of exponents are absolute
            assert token.sampler_logprob is not None
            ours = torch.tensor([1.0, token.sampler_logprob])
            assert normwise_error(ours, expected) < 100 * bound_of(model, len(rows))
    drafted = sum(completion.statistics.drafted for completion in completions)
    assert depth == 0 or 0 < sum(completion.statistics.accepted for completion in completions) < drafted


@pytest.fixture(scope="module")
def bytes_llm(engine_spec: Callable[..., ModelSpec], engine_model: Callable[..., Transformer]) -> LLM:
    """A model that says all kinds of bytes."""
    spec = engine_spec(vocab_size=261, eos_token_id=1)
    return LLM(engine_model(spec, seed=1), spec, Tokenizer.train([], 261))


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("include_stop", [False, True])
@pytest.mark.parametrize("min_tokens", [0, 12])
def test_stop_tokens(bytes_llm: LLM, min_tokens: int, include_stop: bool, depth: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    whole = bytes_llm.generate(["ab"], params)[0].token_ids
    stop = whole[5]
    params = params.model_copy(
        update={"stop_token_ids": (stop,), "include_stop": include_stop, "min_tokens": min_tokens}
    )
    core = Core(bytes_llm.drawn_from, Room(sequences=1, positions=60, num_pages=1, page_size=64), depth)
    request = Request(tokens=[0, *Tokenizer.train([], 261).encode("ab")], params=params)
    outputs = []
    step = core.step
    core.step = lambda: outputs.extend(new := step()) or new  # type: ignore[method-assign, func-returns-value]
    [completion] = [each.completion() for each in run(core, bytes_llm, [request])]
    ids = completion.token_ids
    if not min_tokens:
        assert ids == whole[: whole.index(stop) + 1]
    else:
        assert stop not in ids[:min_tokens] and len(ids) >= min_tokens
    if ids[-1] == stop:
        assert completion.finish_reason == "stop" and outputs[-1][1].stop_reason == stop
        assert completion.text == bytes_llm.tokenizer.decode(ids if include_stop else ids[:-1])
    text = "".join(token.text for _, output in outputs for token in output.tokens) + outputs[-1][1].text
    assert text == completion.text


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("include_stop", [False, True])
def test_stop_strings_after_enough_tokens(bytes_llm: LLM, include_stop: bool, depth: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    whole = bytes_llm.generate(["ab"], params)[0]
    stop = next(char for char in whole.text if whole.text.count(char) > 1 and char != "\ufffd")
    first, second = whole.text.index(stop), whole.text.index(stop, whole.text.index(stop) + 1)
    enough = next(n for n in range(60) if bytes_llm.tokenizer.decode(whole.token_ids[:n]).count(stop) == 1) + 1
    params = params.model_copy(update={"stop": (stop,), "include_stop": include_stop})
    for min_tokens, end in ((0, first), (enough, second)):
        mine = params.model_copy(update={"min_tokens": min_tokens})
        completion = bytes_llm.generate(["ab"], mine, speculate=depth)[0]
        assert completion.text == whole.text[: end + include_stop]
        assert completion.finish_reason == "stop"
