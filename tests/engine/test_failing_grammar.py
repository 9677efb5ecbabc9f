"""A grammar that becomes too complex on the way ends its own request, with its reason, and nobody else notices."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from numpy.typing import NDArray

from dovetail.engine import speculative
from dovetail.engine.core import Core
from dovetail.engine.engine import Engine
from dovetail.engine.grammar import Grammar, GrammarCompiler, GrammarFailure, GrammarState
from dovetail.engine.llm import LLM
from dovetail.engine.room import EngineConfig, Room
from dovetail.engine.sampler import SamplingParams
from dovetail.engine.sequence import Sequence
from dovetail.engine.stream import Output
from dovetail.model.transformer import Transformer
from dovetail.spec.model import ModelSpec
from dovetail.text.tokenizer import Tokenizer

PLAIN = SamplingParams(temperature=0.9, max_tokens=24, ignore_eos=True, seed=4)
LETTERS = PLAIN.model_copy(update={"grammar": Grammar(kind="regex", text="[a-z]{24}")})
TOO_LARGE = Grammar(kind="regex", text="((((a{0,99}){0,99}){0,99}){0,99})")  # for single bytes, after some of them
BOMB = PLAIN.model_copy(update={"grammar": TOO_LARGE, "ignore_eos": False, "min_tokens": 60, "max_tokens": 60})
TOO_COMPLEX = "the grammar cannot be followed any further: .*too many"
PROMPTS = [[3, 4, 5], [6] * 30, [7]]
EOS = 1
Mask = NDArray[np.bool_]


@pytest.fixture(scope="module")
def llm(engine_spec: Callable[..., ModelSpec], engine_model: Callable[..., Transformer]) -> LLM:
    spec = engine_spec(vocab_size=261, eos_token_id=1)
    return LLM(engine_model(spec, seed=1), spec, Tokenizer.train([], 261))


def run(llm: LLM, sequences: list[Sequence], depth: int) -> list[list[Output]]:
    """What each gets; at the end nothing is held."""
    core = Core(llm.drawn_from, Room(sequences=8, positions=100, num_pages=50, page_size=16, prompt_tokens=20), depth)
    outputs: dict[int, list[Output]] = {id(sequence): [] for sequence in sequences}
    for sequence in sequences:
        core.add(sequence)
    while core.has_work:
        for sequence, output in core.step():
            outputs[id(sequence)].append(output)
    assert core.pool.num_free == 50
    assert core.counts.finished.get("error", 0) == sum(sequence.error is not None for sequence in sequences)
    return list(outputs.values())


def tokens_of(outputs: list[Output]) -> list[int]:
    return [token.id for output in outputs for token in output.tokens]


def fail_where(sequence: Sequence, fails: Callable[[list[int]], bool]) -> None:
    """Its grammar fails behind such tokens."""
    assert sequence.grammar is not None
    grammar: GrammarState = sequence.grammar
    mask = grammar.mask

    def failing() -> Mask:
        if fails(grammar._follower.tokens):
            raise GrammarFailure("too much")
        return mask()

    grammar.mask = failing  # type: ignore[method-assign]


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("after", [0, 1, 2, 7, 8])
def test_a_request_ends_with_the_tokens_before_the_failure(after: int, depth: int, llm: LLM) -> None:
    """The same ones with drafts, which reach beyond it."""
    beside = [(prompt, params) for prompt in PROMPTS for params in (PLAIN, LETTERS)]
    whole = llm.generate([[9, 9]], [LETTERS])[0]
    alone = [llm.generate([prompt], [params])[0].token_ids for prompt, params in beside]
    failing = llm.sequence([9, 9], LETTERS)
    fail_where(failing, lambda tokens: len(tokens) >= after)
    ours, *others = run(llm, [failing, *(llm.sequence(list(prompt), params) for prompt, params in beside)], depth)
    assert tokens_of(ours) == whole.token_ids[:after]
    assert (ours[-1].finish_reason, ours[-1].error) == ("error", "too much")
    assert all(output.error is None and output.finish_reason is None for output in ours[:-1])
    text = "".join("".join(token.text for token in output.tokens) + output.text for output in ours)
    assert text == llm.tokenizer.decode(whole.token_ids[:after])  # type: ignore[union-attr]
    assert failing.completion().error == "too much"
    assert [tokens_of(outputs) for outputs in others] == alone
    assert {outputs[-1].finish_reason for outputs in others} <= {"length", "stop"}


def test_a_failure_behind_a_draft_that_is_not_kept_changes_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = llm.generate([[9, 9]], [LETTERS])[0].token_ids
    draft, seen = speculative.draft, []

    def record(runner: object, sequences: list[Sequence], depth: int) -> list[list[int]]:
        drafts = draft(runner, sequences, depth)  # type: ignore[arg-type]
        seen.append((sequences[0].completion_tokens, drafts[0][0]))
        return drafts

    monkeypatch.setattr(speculative, "draft", record)
    run(llm, [llm.sequence([9, 9], LETTERS)], 2)
    letters = set(llm.tokenizer.encode("abcdefghijklmnopqrstuvwxyz"))  # type: ignore[union-attr]
    wrong = [(place, token) for place, token in seen if token != whole[place] and token in letters]
    assert wrong
    failures: list[list[int]] = []

    def fails(tokens: list[int]) -> bool:
        is_wrong = any(len(tokens) > place and tokens[place] == token for place, token in wrong)
        failures.extend([list(tokens)] * is_wrong)
        return is_wrong

    sequence = llm.sequence([9, 9], LETTERS)
    fail_where(sequence, fails)
    [outputs] = run(llm, [sequence], 2)
    assert failures and tokens_of(outputs) == whole and outputs[-1].error is None


@pytest.mark.parametrize("depth", [0, 2])
def test_a_real_one(depth: int, llm: LLM) -> None:
    """In `generate`, `stream` and the engine's thread, which goes on."""
    ours, other = llm.generate([[5], [6]], [BOMB, PLAIN], depth)
    assert ours.finish_reason == "error" and set(ours.text) == {"a"} and 0 < len(ours.text) < 60
    parts: list[str] = []
    with pytest.raises(ValueError, match=TOO_COMPLEX):
        parts.extend(llm.stream([5], BOMB, depth))
    assert "".join(parts) == ours.text
    assert other.token_ids == llm.generate([[6]], [PLAIN])[0].token_ids
    engine = Engine(llm, EngineConfig(max_model_len=100, speculate=depth))
    try:
        failing, plain = engine.submit([5], BOMB), engine.submit([6], PLAIN)
        last = list(failing)[-1]
        assert last.finish_reason == "error" and last.error == ours.error
        assert tokens_of(list(plain)) == other.token_ids
        assert tokens_of(list(engine.submit([6], PLAIN))) == other.token_ids and engine.is_ready
    finally:
        engine.close()


# ---- One state alone, and several of one grammar ----


@pytest.fixture
def compiler() -> GrammarCompiler:
    return GrammarCompiler(Tokenizer.train([], 261), frozenset({EOS}))


@pytest.fixture(scope="module")
def token() -> int:
    return Tokenizer.train([], 261).encode("a")[0]


def test_a_failure_is_taken_back_with_the_tokens_before_it(compiler: GrammarCompiler, token: int) -> None:
    state, masks = compiler.start(TOO_LARGE), []
    with pytest.raises(GrammarFailure):
        for _ in range(200):
            masks.append(state.mask())
            state.advance(token)
    with pytest.raises(GrammarFailure):
        state.mask()
    with pytest.raises(GrammarFailure):
        state.advance(token)
    length = len(masks)
    for count in (1, 2):
        state.rollback(count)
        length -= count
        assert np.array_equal(state.mask(), masks[length])


def followed(state: GrammarState, token: int, drafts: int = 0) -> int:
    """How often a token may come, each time with so many tried and taken back before."""
    for count in range(200):
        tried = 0
        with suppress(GrammarFailure):
            for _ in range(drafts):
                state.mask()
                state.advance(token)
                tried += 1
        state.rollback(tried)
        try:
            state.mask()
            state.advance(token)
        except GrammarFailure:
            return count
    return 200


def test_a_grammar_that_failed_one_sequence_fails_no_other(compiler: GrammarCompiler, token: int) -> None:
    """Those that run beside it, between their mask and their token too, those that come later, and those that made the
    lexer larger by drafts: each fails where it fails alone."""
    alone = followed(compiler.start(TOO_LARGE), token)
    assert 9 < alone < 200
    compiler._compiled.cache_clear()
    beside = [compiler.start(TOO_LARGE) for _ in range(3)]
    for state in beside[1:]:
        for _ in range(5):
            state.mask()
            state.advance(token)
    beside[2].mask()
    assert followed(compiler.start(TOO_LARGE), token) == alone
    beside[2].advance(token)
    assert [followed(state, token) for state in beside] == [alone, alone - 5, alone - 6]
    assert followed(compiler.start(TOO_LARGE), token, drafts=2) == alone
