import inspect
import json
import re
import textwrap
import threading
import time
from collections.abc import Callable

import jsonschema
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from dovetail.engine.grammar import Grammar, GrammarCompiler, GrammarState
from dovetail.text.tokenizer import Tokenizer, wrap

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["leaf", "tree"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        "inner": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"é": {"type": "boolean"}},
                                               "required": ["é"], "additionalProperties": False}]},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
}  # fmt: skip
EXPRESSION = 'start: term ("+" term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[0-9]{1,3}/'
REGEX = r"(ab?|[c-e]{2,4}|\n- é{1,2})x"
EOS, OTHER_END = 1, 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([inspect.getsource(textwrap) + 'e\n</think>\n\n{"name": ' * 40], 512)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, frozenset({EOS, OTHER_END}))


def is_schema(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


def is_expression(text: str) -> bool:
    if not re.fullmatch(r"[0-9+()]+", text):
        return False
    eval(re.sub(r"\b0+(?=[0-9])", "", text))
    return True


KINDS: list[tuple[Grammar, Callable[[str], object]]] = [
    (Grammar(kind="json_schema", text=json.dumps(SCHEMA)), is_schema),
    (Grammar(kind="json_object"), lambda text: isinstance(json.loads(text), dict)),
    (Grammar(kind="regex", text=REGEX), lambda text: re.fullmatch(REGEX, text)),
    (Grammar(kind="lark", text=EXPRESSION), is_expression),
]


def walk(state: GrammarState, random: np.random.Generator, most: int, text: Callable[[list[int]], str]) -> list[int]:
    """Tokens under the mask: random ones, and from `most` on those that come to an end."""
    tokens: list[int] = []
    while not state.is_finished:
        mask = state.mask()
        if mask[EOS] and (len(tokens) >= most or random.random() < 0.3):
            token = EOS
        else:
            allowed = np.flatnonzero(mask)
            if len(tokens) >= most:  # closing what is open, with as few new things as can be
                allowed = min(([t] for t in allowed), key=lambda t: closing(text(t)))
            token = int(random.choice(allowed))
        state.advance(token)
        tokens.append(token)
        assert len(tokens) < most + 400
    return tokens


def closing(text: str) -> tuple[int, int]:
    order = '"}])1tf:,'
    found = order.find(text[:1])
    return (len(order) + text.isspace() if found < 0 else found, len(text))


@pytest.mark.parametrize(("grammar", "is_match"), KINDS, ids=lambda value: getattr(value, "kind", ""))
def test_a_random_walk_under_the_mask_ends_in_text_that_matches(
    compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: Grammar, is_match: Callable[[str], object]
) -> None:
    texts = set()
    for seed in range(40):
        state = compiler.start(grammar)
        text = tokenizer.decode(walk(state, np.random.default_rng(seed), 25, tokenizer.decode))
        assert is_match(text), text
        texts.add(text)
    assert len(texts) > 10


@settings(deadline=None, max_examples=60)
@given(data=st.data(), which=st.sampled_from(range(len(KINDS))), after=st.sampled_from(["", "</think>"]))
def test_rolled_back_is_as_if_never_advanced(
    compiler: GrammarCompiler, data: st.DataObject, which: int, after: str
) -> None:
    grammar = KINDS[which][0].model_copy(update={"after": after})
    state, kept = compiler.start(grammar), list[int]()
    seed = data.draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)

    def go_on(count: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < count and not state.is_finished:
            allowed = np.flatnonzero(state.mask())
            wanted = [i for i in compiler.tokens.tokenize_str("</think>") if i in allowed]
            token = int(random.choice(wanted if wanted and random.random() < 0.8 else allowed))
            state.advance(token)
            taken.append(token)
        return taken

    for _ in range(data.draw(st.integers(1, 4))):
        kept += go_on(data.draw(st.integers(0, 6)))
        drafts = go_on(data.draw(st.integers(0, 6)))
        number = data.draw(st.integers(0, len(drafts)))
        state.rollback(number)
        kept += drafts[: len(drafts) - number]
        fresh = compiler.start(grammar)
        for token in kept:
            fresh.advance(token)
        assert (state.mask() == fresh.mask()).all()
        assert state.is_finished == fresh.is_finished


def test_end_tokens_are_allowed_where_the_text_may_end(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    state = compiler.start(Grammar(kind="regex", text="ab?"))
    assert {a}.issubset(np.flatnonzero(state.mask())) and not state.mask()[[EOS, OTHER_END]].any()
    state.advance(a)
    assert set(np.flatnonzero(state.mask())) == {EOS, OTHER_END, b} and not state.is_finished
    state.advance(OTHER_END)
    assert state.is_finished and not state.mask().any()
    state.rollback(1)
    state.advance(b)
    assert state.is_finished and set(np.flatnonzero(state.mask())) == {EOS, OTHER_END}
    state.advance(EOS)
    state.rollback(2)  # the end token, and the one that completed the text
    assert set(np.flatnonzero(state.mask())) == {EOS, OTHER_END, b}


def test_a_token_that_is_not_allowed_changes_nothing(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    state = compiler.start(Grammar(kind="regex", text="ab"))
    for token in (b, EOS, 0, 10_000):
        with pytest.raises(ValueError, match=rf"token {token} may not come next"):
            state.advance(token)
    state.advance(a)
    state.advance(b)
    for token in (a, b):
        with pytest.raises(ValueError, match="may not come next"):
            state.advance(token)
    state.advance(EOS)
    with pytest.raises(ValueError, match="may not come next"):
        state.advance(EOS)


def test_ids_without_text_are_never_allowed(tokenizer: Tokenizer) -> None:
    """Special tokens, added tokens, gaps, and an end token that the model has beyond the tokenizer's ids."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_tokens([AddedToken("<\uff5cUser\uff5c>", normalized=False)])
    compiler = GrammarCompiler(wrap(backend, {}), [520])
    state = compiler.start(Grammar(kind="regex", text=r"[^q]{2}"))
    assert len(state.mask()) == 521
    assert not state.mask()[[0, 1, 2, 3, 4, *range(512, 521)]].any()
    for token in tokenizer.encode("zu"):
        state.advance(token)
    assert np.flatnonzero(state.mask()).tolist() == [520]


def test_before_the_marker_text_is_free(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    state = compiler.start(Grammar(kind="regex", text="ab", after="</think>"))
    assert not state.mask()[[EOS, OTHER_END]].any()  # it may not end before
    for token in tokenizer.encode("x </thin</th"):
        assert state.mask()[token]
        state.advance(token)
    *inside, last = (tokenizer.encode(character)[0] for character in "ink>")
    for token in inside:
        state.advance(token)
    assert state.mask()[last] and state.mask()[tokenizer.encode("b")[0]]
    state.advance(last)
    assert {tokenizer.decode([i]) for i in np.flatnonzero(state.mask())} <= {"a", "ab"}
    state.rollback(1)
    assert state.mask()[tokenizer.encode("b")[0]]


def test_the_marker_ends_in_the_middle_of_a_block_of_drafts(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    state = compiler.start(Grammar(kind="regex", text="abc", after="</think>"))
    drafts = [tokenizer.encode(character)[0] for character in "k</think>abz"]
    for token in drafts[:-1]:
        state.advance(token)
    with pytest.raises(ValueError, match="may not come next"):
        state.advance(drafts[-1])
    state.rollback(4)  # into the reasoning again
    for token in tokenizer.encode("</think>"):
        assert state.mask()[token]
        state.advance(token)
    assert not state.mask()[EOS] and state.mask()[tokenizer.encode("ab")[0]]


def test_a_token_that_goes_on_beyond_the_marker_waits(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    long = [i for i in range(512) if re.match(r">\s", tokenizer.decode([i]))]
    assert long  # ">\n\n" is one token
    state = compiler.start(Grammar(kind="json_object", after="</think>"))
    assert state.mask()[long].all()
    for character in "</think":
        state.advance(tokenizer.encode(character)[0])
    assert not state.mask()[long].any() and state.mask()[tokenizer.encode(">")[0]]
    with pytest.raises(ValueError, match="may not come next"):
        state.advance(long[0])


def schema(text: str) -> Grammar:
    return Grammar(kind="json_schema", text=text)


def chain(length: int) -> str:
    links = {f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(length)}
    return json.dumps({"$ref": "#/$defs/a0", "$defs": links | {f"a{length}": {"type": "string"}}})


def rules(count: int) -> str:
    return "\n".join(["start: A0", *(f'A{i}: (A{i + 1} "x"?)*' for i in range(count)), f'A{count}: "y"'])


def nested(depth: int) -> str:
    return '{"type":"array","items":' * depth + "{}" + "}" * depth


BAD = {
    "no regex": (Grammar(kind="regex", text="(("), r"regex cannot be followed: .*unclosed group"),
    "look-ahead": (Grammar(kind="regex", text="a(?=b)"), "look-ahead"),
    "no JSON": (Grammar(kind="json_schema", text='{"type"'), "json_schema cannot be followed: Expecting"),
    "type": (Grammar(kind="json_schema", text='{"type": "strin"}'), "strin"),
    "keyword": (Grammar(kind="json_schema", text='{"type": "array", "uniqueItems": true}'), "uniqueItems"),
    "address": (Grammar(kind="json_schema", text='{"$ref": "http://example.com/x"}'), "example.com"),
    "lark": (Grammar(kind="lark", text="start: missing"), "missing"),
    "deep": (schema(nested(200)), "recursion"),
    "very deep": (schema(nested(2_000)), "recursion"),
    "long": (schema(json.dumps({"enum": [f"value {i}" for i in range(40_000)]})), "at most 65,536"),
    "doubling": (schema(json.dumps({"$ref": "#/$defs/a0", "$defs": {
        f"a{i}": {"allOf": [{"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2}] * 2} for i in range(30)
    } | {"a30": {"type": "string"}}})), "too large"),
    "chain": (schema(chain(251)), "252 references is too large: at most 250"),
    "spelt otherwise": (schema(chain(251).replace("$ref", r"\u0024\u0072ef")), "252 references"),
    "chain in lark": (Grammar(kind="lark", text=f"start: %json {chain(251)}"), "252 references"),
    "rules": (Grammar(kind="lark", text=rules(500)), "502 lines is too large: at most 500"),
    "long regex": (Grammar(kind="regex", text="a?" * 5_001), "10,002 characters"),
    "object with text": (Grammar(kind="json_object", text="{}"), "json_object of 2 characters"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_followed_is_refused_soon_in_one_line(compiler: GrammarCompiler, case: str) -> None:
    grammar, problem = BAD[case]
    start = time.perf_counter()
    with pytest.raises(ValueError, match=problem) as error:
        compiler.start(grammar)
    assert time.perf_counter() - start < 5
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


BOMBS = [
    "(a+)+b", "(a|aa)+$", "((((a{0,99}){0,99}){0,99}){0,99})", "[ab]*a[ab]{25}c",
    r"(.*a.{200}){40}b|" * 50 + r"(\w{1,900}\d{1,900}){900}", "a?" * 5_000,
]  # fmt: skip


@pytest.mark.parametrize("regex", BOMBS, ids=lambda regex: regex[:12])
def test_a_regex_that_backtracking_would_not_survive_takes_bounded_time(
    compiler: GrammarCompiler, tokenizer: Tokenizer, regex: str
) -> None:
    """It is followed, or said to be too complex."""
    token, start = tokenizer.encode("a")[0], time.perf_counter()
    state = compiler.start(Grammar(kind="regex", text=regex))
    try:
        for _ in range(100):
            assert state.mask()[token]
            state.advance(token)
    except ValueError as error:
        assert re.fullmatch("the grammar cannot be followed any further: .*too (many|complex).*", str(error))
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("grammar", [schema(chain(249)), Grammar(kind="lark", text=rules(498))])
def test_the_longest_chains_leave_the_process_alive(compiler: GrammarCompiler, grammar: Grammar) -> None:
    """In a thread, whose stack is the smallest there is; eight times as long, they end the process."""
    masks: list[np.ndarray] = []
    thread = threading.Thread(target=lambda: masks.append(compiler.start(grammar).mask()))
    thread.start()
    thread.join()
    assert masks[0].any()


def test_states_of_one_grammar_are_apart(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar = Grammar(kind="regex", text="ab|b")
    one, two = compiler.start(grammar), compiler.start(grammar)
    one.advance(tokenizer.encode("b")[0])
    assert one.is_finished and not two.is_finished and two.mask()[tokenizer.encode("a")[0]]
