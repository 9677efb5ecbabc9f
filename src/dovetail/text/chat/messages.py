"""Checks the messages of a conversation, and makes what they hold harmless inside a template.

A template writes special tokens as text, and messages are text as well. So every spelling of a special token inside
a message is broken by a mark, which no template writes: afterwards an unbroken spelling comes from the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dovetail.text.stream import pending

ROLES = ("system", "developer", "user", "assistant", "tool")
THINKING = ("<think>", "</think>")  # an assistant's own: templates cut at them

# Code points that are no characters, and that no text exchanges. A message's own ones are spelt with the second.
BREAK, ESCAPE = "\ufdd0", "\ufdd1"
MARKS = re.compile("[\ufdd0-\ufdd4]")


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages as templates expect them: content as one text, no empty tool_calls, developer as system.

    Raises ValueError (one line) that names the message.
    """
    if not messages:
        raise ValueError("messages is empty; give at least one")
    return [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _check_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is a {type(message).__name__}, not an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}.role is {role!r:.60}; it is one of {', '.join(ROLES)}")
    checked = {**message, "role": "system" if role == "developer" else role}
    calls = message.get("tool_calls")
    checked.pop("tool_calls", None)
    if calls:
        if role != "assistant":
            raise ValueError(f"{where}.tool_calls: only an assistant calls tools, and this is the {role}")
        checked["tool_calls"] = _check_calls(calls, f"{where}.tool_calls")
    checked["content"] = _check_content(message.get("content"), f"{where}.content")
    if checked["content"] is None and not calls:
        raise ValueError(f"{where}.content is missing; give a text")
    return checked


def _check_content(content: Any, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{where} is a {type(content).__name__}, not a text or a list of text parts")
    for i, part in enumerate(content):
        if not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"{where}[{i}] of type {kind!r:.60} is no text part; only text is read")
    return "".join(part["text"] for part in content)


def _check_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return the calls with `arguments` as text."""
    if not isinstance(calls, list):
        raise ValueError(f"{where} is a {type(calls).__name__}, not a list")
    checked = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not (isinstance(function, Mapping) and isinstance(function.get("name"), str)):
            raise ValueError(f"{where}[{i}] has no function with a name")
        arguments = function.get("arguments", "{}")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        checked.append({"type": "function", **call, "function": {**function, "arguments": text}})
    return checked


def parse_arguments(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with the `arguments` of calls as objects. Raises ValueError for what is no JSON."""
    parsed = []
    for i, message in enumerate(messages):
        calls = []
        for call in message.get("tool_calls", ()):
            try:
                arguments = json.loads(call["function"]["arguments"] or "{}")
            except ValueError as error:
                raise ValueError(f"messages[{i}].tool_calls: arguments of a call are no JSON: {error}") from None
            calls.append({**call, "function": {**call["function"], "arguments": arguments}})
        parsed.append({**message, **({"tool_calls": calls} if calls else {})})
    return parsed


class Guard:
    """Breaks the spellings of `special` tokens in text."""

    def __init__(self, special: Sequence[str]) -> None:
        self._all = _Spellings(special)
        self._without_thinking = _Spellings([spelling for spelling in special if spelling not in THINKING])

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return messages in which no text spells a special token. An assistant's content may have <think>."""
        guarded = []
        for message in messages:
            harmless = self.value({key: value for key, value in message.items() if key != "role"})
            if message["role"] == "assistant" and message["content"]:
                harmless["content"] = self._without_thinking.broken(message["content"])
            guarded.append({"role": message["role"], **harmless})
        return guarded

    def value(self, value: Any) -> Any:
        """Return JSON in which no text, nor name of a key, spells a special token."""
        if isinstance(value, str):
            return self._all.broken(value)
        if isinstance(value, Mapping):
            return {self.value(key): self.value(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(each) for each in value]
        return value


class _Spellings:
    def __init__(self, special: Sequence[str]) -> None:
        self.special = [spelling for spelling in special if len(spelling) > 1]
        self.longest = max((len(spelling) for spelling in self.special), default=0)
        rests: dict[str, list[str]] = {}
        for spelling in self.special:
            rests.setdefault(spelling[0], []).append(re.escape(spelling[1:]))
        places = [f"(?<={re.escape(first)})(?={'|'.join(group)})" for first, group in rests.items()]
        self.inside = re.compile("|".join(places) or r"(?!)")

    def broken(self, text: str) -> str:
        """Return `text` with a break in every spelling, and behind one that what follows might complete."""
        text = self.inside.sub(BREAK, MARKS.sub(lambda mark: f"{ESCAPE}{ord(mark[0]) - ord(BREAK)}", text))
        end = text[-self.longest :]
        return text + BREAK if any(pending(end, spelling) for spelling in self.special) else text


def unmark(text: str) -> str:
    """Return the text without marks, and a message's own code points as they were."""
    plain = re.sub(f"(?!{ESCAPE}){MARKS.pattern}", "", text)
    return re.sub(f"{ESCAPE}([0-4])", lambda match: chr(ord(BREAK) + int(match[1])), plain)
