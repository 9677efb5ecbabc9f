"""Forced calls: what the grammar admits is what the reader of the stream takes apart, however it is cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dovetail.engine.grammar import Grammar, GrammarCompiler
from dovetail.server.answered.calls import ForcedCalls
from dovetail.server.answered.choice import PlainText
from dovetail.server.asked.sampling import StructuredOutputs
from dovetail.server.asked.tools import Tool, call_grammar
from dovetail.server.conversation import Conversation
from dovetail.text.tokenizer import Tokenizer

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "array"}}, "required": ["city"]}
TOOLS = [
    Tool.model_validate({"type": "function", "function": {"name": name, "parameters": schema}})
    for name, schema in (("look", CITY), ("go-on.2", {"type": "object"}))
]


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, [1])


def matches(compiler: GrammarCompiler, grammar: Grammar, text: str) -> bool:
    state = compiler.start(grammar)
    for data in text.encode():
        token = compiler.pieces.index(bytes([data]), 5)
        if not state.mask()[token]:
            return False
        state.advance(token)
    return bool(state.mask()[1])


def read(text: str, name: str | None, size: int) -> list[tuple[str, str]]:
    reader, calls = ForcedCalls(PlainText(), name), list[list[str]]()
    for start in range(0, len(text), size):
        for delta in reader.push(0, text[start : start + size]):
            assert delta.call is not None and not delta.content
            if delta.id:
                assert delta.call == len(calls)
                calls.append([delta.name, ""])
            calls[delta.call][1] += delta.arguments
    assert reader.finish("") == []
    return [(each[0], each[1]) for each in calls]


@pytest.mark.parametrize(
    "arguments",
    [
        ['{"city": "Ulm"}'],
        ['{"city": "a}]\\"{,[\\\\", "days": [1, {"x": "]"}, []]}', '{"city": ""}'],
        ['{"city": "Ü\\n"}', '{"city": "x", "more": null}'],
    ],
)
def test_calls_that_the_grammar_admits_are_read(compiler: GrammarCompiler, arguments: list[str]) -> None:
    text = "[" + ", ".join(f'{{"name": "look", "arguments": {each}}}' for each in arguments) + "]"
    grammar = Grammar(kind="lark", text=call_grammar(TOOLS, None, is_parallel=True))
    assert matches(compiler, grammar, text)
    for size in (1, 2, 3, 7, 1000):
        assert read(text, None, size) == [("look", each) for each in arguments]
    alone = Grammar(kind="lark", text=call_grammar(TOOLS, None, is_parallel=False))
    assert matches(compiler, alone, text) == (len(arguments) == 1)
    named = Grammar(kind="lark", text=call_grammar(TOOLS[:1], "look", is_parallel=True))
    assert matches(compiler, named, arguments[0]) and read(arguments[0], "look", 2) == [("look", arguments[0])]


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        "hello",
        '[{"name": "other", "arguments": {}}]',
        '[{"name": "look", "arguments": {}}]',  # without the city
        '[{"name": "go-on.2", "arguments": 3}]',
        '[ {"name": "go-on.2", "arguments": {}}]',
        '[{"name": "go-on.2", "arguments": { }}]',
    ],
)
def test_what_is_no_call_is_not_admitted(compiler: GrammarCompiler, text: str) -> None:
    grammar = Grammar(kind="lark", text=call_grammar(TOOLS, None, is_parallel=True))
    assert not matches(compiler, grammar, text)
    assert matches(compiler, grammar, '[{"name": "go-on.2", "arguments": {}}]')


def test_a_choice_is_spelt_as_it_is(compiler: GrammarCompiler) -> None:
    words = ["yes", 'say "no"\\', "line\nbreak", "日本"]
    grammar = StructuredOutputs(choice=words).to_grammar()
    assert grammar is not None
    assert all(matches(compiler, grammar, word) for word in words) and not matches(compiler, grammar, "ye")


def test_a_grammar_begins_behind_the_thought(build: Callable[..., Any]) -> None:
    site = build(engine={"text": "So.</think>{}"})
    body = {"messages": [{"role": "user", "content": "hi"}], "response_format": {"type": "json_object"}}
    for kwargs, after in (({}, ""), ({"thinking": True}, "</think>")):
        site.engine.asked.clear()
        site.post("/v1/chat/completions", chat_template_kwargs=kwargs, **body)
        assert site.engine.asked[0][1].grammar.after == after
    refused = site.post("/v1/chat/completions", chat_template_kwargs={"tools": []}, **body)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "chat_template_kwargs"


def test_a_real_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    conversation = Conversation.load(tmp_path, None, tokenizer)
    options = {"tools": [tool.to_template() for tool in TOOLS], "thinking": True}
    prompt = conversation.prompt([{"role": "user", "content": "hi"}], options)
    assert prompt.tokens[0] == tokenizer.bos_id and prompt.after == "</think>"
    call = {"name": "look", "arguments": {"city": "Ulm"}}
    text = f"Hm.</think>Let me see.\n<tool_call>\n{json.dumps(call)}\n</tool_call>"
    for reads_calls in (True, False):
        parser = prompt.new_parser(reads_calls=reads_calls)
        deltas = [delta for token in tokenizer.encode(text) for delta in parser.push(token, tokenizer.decode([token]))]
        deltas += parser.finish("")
        assert "".join(delta.reasoning for delta in deltas) == "Hm."
        if reads_calls:
            assert [delta.name for delta in deltas if delta.id] == ["look"]
            assert "".join(delta.arguments for delta in deltas) == '{"city": "Ulm"}'
        else:
            assert "<tool_call>" in "".join(delta.content for delta in deltas)
