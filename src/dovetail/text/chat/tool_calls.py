"""The ways in which models write calls of tools, and how one call is read.

DeepSeek's formats have tokens of their own. In the default template a call is a JSON object between two tags, as Hermes
models have it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from json import JSONDecodeError
from typing import Literal, NoReturn

ToolFormat = Literal["deepseek-v3", "deepseek-v3.1", "hermes"]

CALLS_BEGIN, CALLS_END = "<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581calls\u2581end\uff5c>"
CALL_BEGIN, CALL_END = "<\uff5ctool\u2581call\u2581begin\uff5c>", "<\uff5ctool\u2581call\u2581end\uff5c>"
SEPARATOR = "<\uff5ctool\u2581sep\uff5c>"

_SPACE = re.compile(r"\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tags:
    """What stands around each call, and around all of them."""

    begin: str
    end: str
    around: tuple[str, ...] = ()


DEEPSEEK = Tags(begin=CALL_BEGIN, end=CALL_END, around=(CALLS_BEGIN, CALLS_END))
TAGS: dict[ToolFormat, Tags] = {
    "deepseek-v3": DEEPSEEK,
    "deepseek-v3.1": DEEPSEEK,
    "hermes": Tags(begin="<tool_call>", end="</tool_call>"),
}


def read_call(body: str, tool_format: ToolFormat) -> tuple[str, str] | None:
    """Return name and arguments of the call between the tags, arguments as they were written; None for a malformed one.

    Arguments are a JSON object.
    """
    if tool_format == "hermes":
        call = _read_object(body)
    else:
        name, separator, arguments = body.partition(SEPARATOR)
        if tool_format == "deepseek-v3":  # function SEPARATOR name, then fenced JSON
            kind, (name, fence, arguments) = name, arguments.partition("```json")
            is_whole = kind.strip() == "function" and fence and arguments.rstrip().endswith("```")
            separator, arguments = separator if is_whole else "", arguments.rstrip().removesuffix("```")
        call = (name.strip(), arguments.strip()) if separator else None
    is_good = call is not None and re.fullmatch(r"\S+", call[0]) and isinstance(_json(call[1]), dict)
    return call if is_good else None


def _read_object(text: str) -> tuple[str, str] | None:
    """Return the values of {"name": "...", "arguments": ...}, the second one as it is written."""
    text = text.strip()
    call = _json(text)
    if not (isinstance(call, dict) and call.keys() == {"name", "arguments"} and isinstance(call["name"], str)):
        return None
    decoder, position, arguments = json.JSONDecoder(), 1, ""
    for _ in call:  # behind "{" or ","
        key, position = decoder.raw_decode(text, _behind_space(text, position))
        start = _behind_space(text, _behind_space(text, position) + 1)  # behind ":"
        _, end = decoder.raw_decode(text, start)
        if key == "arguments":
            arguments = text[start:end]
        position = _behind_space(text, end) + 1
    return (call["name"], arguments) if position == len(text) else None  # else a key stands there twice


def _behind_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    assert found is not None  # it matches nothing as well
    return found.end()


def _json(text: str) -> object:
    """Return the value, or None for what is no JSON."""
    try:
        return json.loads(text, parse_constant=_refuse)  # NaN and Infinity are no JSON
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> NoReturn:
    raise JSONDecodeError(f"{constant} is no JSON", constant, 0)
