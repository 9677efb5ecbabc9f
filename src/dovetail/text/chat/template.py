"""Renders a conversation as the prompt that a model was trained on, and encodes it.

A template is a Jinja file: the checkpoint's own, one of the built-in ones, or one that the user names. It writes all
special tokens, the first one included, so nothing is added when its text is encoded. What messages hold never becomes a
special token, however it is spelt (`messages.Guard`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from dovetail.config import near_matches, read_json, read_text
from dovetail.text.chat.environment import CLOSE, OPEN, compile_template, one_line
from dovetail.text.chat.messages import BREAK, Guard, check_messages, parse_arguments, unmark
from dovetail.text.chat.parser import END_THINK, THINK, Reasoning
from dovetail.text.chat.tool_calls import ToolFormat
from dovetail.text.tokenizer import Tokenizer

BUILT_IN = ("deepseek-v3", "deepseek-v3.1", "deepseek-r1", "dovetail")
DEFAULT = "dovetail"
CONTINUE = "\ufdd4"  # behind the final message that is to be continued; it is no character
RESERVED = ("messages", "tools", "bos_token", "eos_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a template wrote."""

    text: str
    marked: str = field(repr=False)  # with marks: what a message may not spell, and where an assistant writes
    reasoning: Reasoning  # what the text of the model begins with


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Tokens of a prompt, and whether an assistant writes them."""

    ids: tuple[int, ...]
    is_generated: bool


class ChatTemplate:
    """A template, with the special tokens of the tokenizer that it writes for."""

    def __init__(self, source: str, origin: str, tokenizer: Tokenizer) -> None:
        """`origin` says in errors where `source` is from. Raises ValueError for a syntax error."""
        self.source, self.origin, self.tokenizer = source, origin, tokenizer
        self._compiled, self.takes_tools = compile_template(source, origin)
        added = tokenizer.backend.get_added_tokens_decoder()
        # Some tokenizers have runs of white space and single letters among their added tokens: those are text.
        self.special = {t.content: i for i, t in added.items() if len(t.content) > 1 and not t.content.isspace()}
        self._guard = Guard(list(self.special))
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self._tokens = {name: tokenizer.backend.id_to_token(i) for name, i in ids.items() if i is not None}

    @staticmethod
    def load(directory: str | Path, tokenizer: Tokenizer, override: str | None = None) -> ChatTemplate:
        """Return `override`, a built-in name or the path of a file; else the checkpoint's own; else the default.

        Raises ValueError for a name that is neither, and for a file that is no template.
        """
        source, origin = _find(Path(directory), override)
        return ChatTemplate(source, origin, tokenizer)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> Prompt:
        """Return the prompt for an answer to `messages`, in OpenAI's form.

        `continue_final_message`: the prompt ends in the last message, an assistant's, which the model goes on with.
        `variables` are what else the template reads, such as `thinking`. Raises ValueError (one line) for messages
        that are malformed, or that the template refuses.
        """
        if reserved := sorted({*variables} & {*RESERVED}):
            raise ValueError(f"{reserved[0]} is no variable of a template that can be given; leave it out")
        if tools and not self.takes_tools:
            raise ValueError(f"{self.origin} does not write tools; choose a template that does: {', '.join(BUILT_IN)}")
        given = variables | {"tools": tools or None}
        try:
            written = self._harmless(check_messages(messages))
            given = {key: self._guard.value(value) for key, value in given.items()}
            given["add_generation_prompt"] = add_generation_prompt and not continue_final_message
            if continue_final_message:
                _mark_end(written[-1])
            marked = self._write(written, given)
        except RecursionError:
            raise ValueError("messages or tools are nested too deeply") from None
        if continue_final_message:
            marked = self._cut(marked)
        text = unmark(marked)
        return Prompt(text=text, marked=marked, reasoning=self._reasoning(text))

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the tokens of a prompt. Raises ValueError for a lone surrogate, which is no character."""
        return [token for span in self.spans(prompt) for token in span.ids]

    def spans(self, prompt: Prompt) -> list[Span]:
        """Return the tokens in parts: what an assistant writes, its end token included, and what stands between.

        Together they are what `encode` returns. An assistant's parts are those in the template's generation blocks.
        """
        pattern = "|".join(re.escape(spelling) for spelling in sorted(self.special, key=len, reverse=True))
        parts = re.split(
            f"({pattern}|[{OPEN}{CLOSE}{BREAK}])" if pattern else f"([{OPEN}{CLOSE}{BREAK}])", prompt.marked
        )
        texts = self.tokenizer.encode_batch([unmark(text) for text in parts[::2]])
        spans, ids, is_generated = list[Span](), list[int](), False
        for text_ids, mark in zip(texts, [*parts[1::2], ""], strict=True):
            ids += text_ids
            if mark in (OPEN, CLOSE):
                spans.append(Span(ids=tuple(ids), is_generated=is_generated))
                ids, is_generated = [], mark == OPEN
            elif mark in self.special:
                ids.append(self.special[mark])
        spans.append(Span(ids=tuple(ids), is_generated=is_generated))
        return [span for span in spans if span.ids]

    @property
    def tool_format(self) -> ToolFormat:
        """How the model writes calls of tools, by what the template shows it."""
        if "<\uff5ctool\u2581sep\uff5c>" not in self.source:
            return "hermes"
        return "deepseek-v3" if "```json" in self.source else "deepseek-v3.1"

    @cached_property
    def _takes_objects(self) -> bool:
        """Whether arguments of calls have to be objects: text would be quoted once more, or is refused."""
        call = {"type": "function", "id": "x", "function": {"name": "f", "arguments": '{"probe": 1}'}}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]

        def is_written(text: str, messages: list[dict[str, Any]]) -> bool:
            try:
                return text in self._compiled.render(messages=messages, tools=None, **self._tokens)
            except Exception:  # whatever an expression of a template can raise
                return False

        return not is_written('{"probe": 1}', messages) and is_written("probe", parse_arguments(messages))

    def _harmless(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self._guard.messages(parse_arguments(messages) if self._takes_objects else messages)

    def _write(self, messages: list[dict[str, Any]], given: Mapping[str, Any]) -> str:
        try:
            return self._compiled.render(messages=messages, **self._tokens, **given)
        except RecursionError:
            raise
        except jinja2.TemplateError as error:
            raise ValueError(f"the template refuses the conversation: {one_line(error)}") from None
        except Exception as error:  # whatever an expression of a template can raise
            raise ValueError(f"{self.origin} cannot write this conversation: {one_line(error)}") from None

    def _cut(self, marked: str) -> str:
        start, _, end = marked.rpartition(CONTINUE)
        if CONTINUE not in marked:
            raise ValueError(f"{self.origin} does not write the final message, so it cannot be continued")
        return start if end.startswith(" ") else start.rstrip()

    def _reasoning(self, text: str) -> Reasoning:
        end = text.rstrip()
        if END_THINK not in self.source or end.endswith(END_THINK):
            return "off"
        # A template that only takes reasoning away is for a model that always begins with it [R1].
        return "open" if end.endswith(THINK) or THINK not in self.source else "tagged"


def _mark_end(last: dict[str, Any]) -> None:
    if last["role"] != "assistant" or not last["content"]:
        raise ValueError("continue_final_message needs a last message of role assistant with some content")
    last["content"] += f"{CONTINUE} "


def _find(directory: Path, override: str | None) -> tuple[str, str]:
    """Return a template's source, and where it is from."""
    if override is not None:
        if override in BUILT_IN:
            return _built_in(override)
        if not override.endswith((".jinja", ".jinja2", ".j2")):
            hint = near_matches(override, BUILT_IN)
            raise ValueError(f"chat template {override!r} is neither a .jinja file nor a built-in one; {hint}")
        return read_text(override), override
    if (file := directory / "chat_template.jinja").is_file():
        return read_text(file), str(file)
    if (file := directory / "tokenizer_config.json").is_file():
        given = read_json(file).get("chat_template")
        if isinstance(given, list):  # named ones
            named = {each.get("name"): each.get("template") for each in given if isinstance(each, dict)}
            given = named.get("default", next(iter(named.values()), None))
        if given is not None and not isinstance(given, str):
            raise ValueError(f"{file}: chat_template is a {type(given).__name__}, not a text; choose another template")
        if given:
            return given, f"{file}: chat_template"
    return _built_in(DEFAULT)


def _built_in(name: str) -> tuple[str, str]:
    file = resources.files("dovetail.text.chat") / "templates" / f"{name}.jinja"
    return file.read_text("utf-8"), f"template {name}"
