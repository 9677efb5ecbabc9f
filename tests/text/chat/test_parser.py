import json
from collections.abc import Sequence
from itertools import count

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dovetail.text.chat.parser import (
    CallArguments,
    CallStart,
    ChatParser,
    Content,
    Delta,
    Reasoning,
    Thought,
    hidden_tags,
)
from dovetail.text.chat.tool_calls import ToolFormat
from dovetail.text.tokenizer import Tokenizer, wrap

BEGIN, END = "<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581calls\u2581end\uff5c>"
CALL, CALLED = "<\uff5ctool\u2581call\u2581begin\uff5c>", "<\uff5ctool\u2581call\u2581end\uff5c>"
SEP = "<\uff5ctool\u2581sep\uff5c>"
V31_CALL = f'{CALL}weather{SEP}{{"city": "Paris"}}{CALLED}'
V3_CALL = f'{CALL}function{SEP}weather\n```json\n{{"city": "Paris"}}\n```{CALLED}'
HERMES_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
PARIS = ("weather", '{"city": "Paris"}')


def joined(deltas: Sequence[Delta]) -> list[object]:
    """Neighbours of one kind as one; a call as its name and arguments."""
    parts: list[object] = []
    for delta in deltas:
        match delta:
            case CallStart(index, call_id, name):
                assert call_id == f"id-{index}"
                parts.append((name, ""))
            case CallArguments(_, text):
                name, before = parts.pop()
                parts.append((name, before + text))
            case Content(text) | Thought(text) if parts and isinstance(parts[-1], type(delta)):
                parts[-1] = type(delta)(parts[-1].text + text)
            case _:
                parts.append(delta)
    return parts


def parsed(
    pieces: Sequence[str], tools: ToolFormat | None, reasoning: Reasoning = "off", rest: str = ""
) -> list[object]:
    ids = count()
    parser = ChatParser(tools, reasoning, new_id=lambda: f"id-{next(ids)}")
    deltas = [delta for piece in pieces for delta in parser.push(0, piece)]
    return joined([*deltas, *parser.finish(rest)])


ANSWERS: list[tuple[str, ToolFormat | None, Reasoning, list[object]]] = [
    ("Hello <b>\n", None, "off", [Content("Hello <b>\n")]),
    ("<think>\na\n</think>\n\nb", None, "tagged", [Thought("a"), Content("b")]),
    ("\n <think>a</think>b", None, "tagged", [Thought("a"), Content("b")]),
    ("b <think>a</think>", None, "tagged", [Content("b <think>a</think>")]),
    ("<think>a</think>b", None, "off", [Content("<think>a</think>b")]),
    ("\na </thin k>\n</think>b</think>", None, "open", [Thought("a </thin k>"), Content("b</think>")]),
    ("<think>a</think>", None, "open", [Thought("a")]),
    ("never closed <", None, "open", [Thought("never closed <")]),
    ("<thi", None, "tagged", [Content("<thi")]),
    ("", None, "open", []),
    (f"Now.\n{BEGIN}{V31_CALL}{V31_CALL}{END}", "deepseek-v3.1", "off", [Content("Now."), PARIS, PARIS]),
    (f"a</think>\n\n{BEGIN}{V31_CALL}{END}\n", "deepseek-v3.1", "open", [Thought("a"), PARIS]),
    (f"{BEGIN}{V3_CALL}\n{V3_CALL}{END}", "deepseek-v3", "off", [PARIS, PARIS]),
    (f"{HERMES_CALL}\n{HERMES_CALL}", "hermes", "off", [PARIS, PARIS]),
    (f"{HERMES_CALL}\nDone. ", "hermes", "off", [PARIS, Content("Done. ")]),
    (f"{BEGIN}{V31_CALL}{END}", None, "off", [Content(f"{BEGIN}{V31_CALL}{END}")]),
    # A tag inside of a string of the arguments, quotes escaped and not.
    ('<tool_call>{"arguments": {"a" : "\\\\\\"</tool_call>"} , "name":"f"}</tool_call>', "hermes", "off",
     [("f", '{"a" : "\\\\\\"</tool_call>"}')]),
    (f'{BEGIN}{CALL}f{SEP}{{"a": "{CALLED}"}}{CALLED}{END}', "deepseek-v3.1", "off", [("f", f'{{"a": "{CALLED}"}}')]),
]  # fmt: skip

MALFORMED: list[tuple[str, ToolFormat]] = [
    ("<tool_call>", "hermes"),
    ("a \n<tool_call>{\n", "hermes"),
    ('<tool_call>{"name": "f"}</tool_call>', "hermes"),
    ('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', "hermes"),
    ('<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', "hermes"),
    ('<tool_call>{"name": "f", "arguments": {}, "arguments": 1}</tool_call> b', "hermes"),
    ('<tool_call>{"name": "f g", "arguments": {}}</tool_call>', "hermes"),
    ("<tool_call>" + '{"name": "f", "arguments": ' + '{"a":' * 5_000 + "</tool_call>", "hermes"),
    (f"a\n{BEGIN}\n{CALL}f{{}}{CALLED}{END}", "deepseek-v3.1"),
    (f"{BEGIN}{CALL}f{SEP}{{}}", "deepseek-v3.1"),
    (f"{BEGIN}{CALL}f{SEP}[]{CALLED}{END}", "deepseek-v3.1"),
    (f"{BEGIN}{CALL}function{SEP}f\n{{}}{CALLED}{END}", "deepseek-v3"),
    (f"{BEGIN}{CALL}f{SEP}f\n```json\n{{}}\n```{CALLED}{END}", "deepseek-v3"),
    (f"{BEGIN} and no call {END}", "deepseek-v3"),
    (END, "deepseek-v3"),
]


@pytest.mark.parametrize(("text", "tools", "reasoning", "expected"), ANSWERS)
def test_an_answer_is_taken_apart(
    text: str, tools: ToolFormat | None, reasoning: Reasoning, expected: list[object]
) -> None:
    assert parsed([text], tools, reasoning) == expected
    assert parsed(list(text), tools, reasoning) == expected
    assert parsed([], tools, reasoning, rest=text) == expected


@pytest.mark.parametrize(("text", "tools"), MALFORMED)
def test_a_malformed_call_comes_back_as_content(text: str, tools: ToolFormat) -> None:
    assert parsed([text], tools) == [Content(text)]
    assert parsed(list(text), tools) == [Content(text)]


def test_after_a_malformed_call_a_good_one_counts() -> None:
    text = f"{BEGIN}{CALL}bad{CALLED}{V31_CALL}{END}b"
    assert parsed(list(text), "deepseek-v3.1") == [Content(f"{BEGIN}{CALL}bad{CALLED}"), PARIS, Content("b")]


PARTS = ["<think>", "</think>", "<tool_call>", "</tool_call>", BEGIN, END, CALL, CALLED, SEP, V31_CALL, V3_CALL,
         HERMES_CALL, '{"', '": ', "}", "\\", "\n", " ", "a", "<", "```json", "\u4e2d"]  # fmt: skip


@settings(deadline=None, max_examples=400)
@given(
    parts=st.lists(st.sampled_from(PARTS), max_size=12),
    cuts=st.lists(st.integers(0, 400), max_size=30),
    tools=st.sampled_from([None, "hermes", "deepseek-v3", "deepseek-v3.1"]),
    reasoning=st.sampled_from(["off", "tagged", "open"]),
)
@example(parts=["<think>", "</think>", "<tool_call>"], cuts=list(range(30)), tools="hermes", reasoning="tagged")
def test_the_stream_is_the_whole_answer_however_the_text_is_cut(
    parts: list[str], cuts: list[int], tools: ToolFormat | None, reasoning: Reasoning
) -> None:
    text = "".join(parts)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in zip(places, places[1:], strict=False)]
    whole = parsed([text], tools, reasoning)
    assert parsed(pieces, tools, reasoning) == whole
    assert parsed(pieces[:-1], tools, reasoning, rest="".join(pieces[-1:])) == whole
    # Nothing is lost but tags and white space beside them; arguments are JSON.
    kept = "".join(part.text if isinstance(part, Content | Thought) else "".join(part) for part in whole)
    assert all(isinstance(json.loads(part[1]), dict) for part in whole if isinstance(part, tuple))
    assert kept.count("\u4e2d") == text.count("\u4e2d")


@settings(deadline=None, max_examples=200)
@given(text=st.text("<>/thinkol_ca\n \u4e2d", max_size=60), reasoning=st.sampled_from(["off", "tagged", "open"]))
def test_text_without_tags_comes_back_whole(text: str, reasoning: Reasoning) -> None:
    kept = "".join(part.text for part in parsed(list(text), "hermes", reasoning))
    if not any(tag in text for tag in ("<think>", "</think>", "<tool_call>")):
        assert kept == (text.lstrip() if reasoning == "open" else text)


def test_text_comes_out_as_soon_as_it_is_sure() -> None:
    parser = ChatParser("hermes", "open")
    steps = [("I", [Thought("I")]), (" see", [Thought(" see")]), ("\n", []), ("</thi", []), ("nk>\n", []),
             ("So", [Content("So")]), (" <", []), ("b>", [Content(" <b>")])]  # fmt: skip
    for text, deltas in steps:
        assert parser.push(0, text) == deltas
    assert parser.finish() == []


def test_several_tags_in_one_piece() -> None:
    text = f"a</think>b{HERMES_CALL}{HERMES_CALL}c"
    assert parsed([text], "hermes", "open") == [Thought("a"), Content("b"), PARIS, PARIS, Content("c")]


def test_every_call_has_an_id_of_its_own() -> None:
    parser = ChatParser("hermes", "off")
    starts = [delta for delta in parser.push(0, HERMES_CALL * 2) if isinstance(delta, CallStart)]
    assert [start.index for start in starts] == [0, 1]
    assert len({start.id for start in starts}) == 2
    assert all(start.id.startswith("chatcmpl-tool-") for start in starts)


def test_a_tag_that_is_a_special_token_has_no_text_and_is_seen(tokenizer: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens(["</think>"])
    backend.add_tokens(["<tool_call>"])  # not special: it has text
    special = wrap(backend, {})
    hidden = hidden_tags(special, "hermes")
    assert hidden == {512: "</think>"}
    parser = ChatParser("hermes", "open", hidden)
    assert [*parser.push(70, "a"), *parser.push(512, ""), *parser.push(71, "b")] == [Thought("a"), Content("b")]


def test_a_long_call_takes_linear_time() -> None:
    arguments = json.dumps({"text": '</tool_call>\\"' * 3_000})
    pieces = ['<tool_call>{"name": "f", "arguments": ', *arguments, "}</tool_call>"]
    assert parsed(pieces, "hermes") == [("f", arguments)]
