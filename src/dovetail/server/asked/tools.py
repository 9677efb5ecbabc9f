"""Tools that a client offers, calls of them in a conversation, and which the model has to call."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, model_validator

from dovetail.engine.grammar import JSON_FORM
from dovetail.server.asked.body import Body

MOST_TOOLS = 256  # offered, and calls of one message
_NAME = r"^[A-Za-z0-9_.-]{1,64}$"


class Function(Body):
    """What a tool is called, what it does, and a JSON schema of its arguments."""

    name: str = Field(pattern=_NAME)
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False  # forced calls match the schema either way


class Tool(Body):
    """A function that the client can run."""

    type: Literal["function"]
    function: Function

    def to_template(self) -> dict[str, Any]:
        """Return the tool as chat templates expect it."""
        return {"type": "function", "function": self.function.model_dump(exclude={"strict"})}


class CalledFunction(Body):
    """Its arguments are JSON in a string."""

    name: str = Field(pattern=_NAME)
    arguments: str = ""


class ToolCall(Body):
    """A call that the model made in an earlier turn."""

    id: str = ""
    type: Literal["function"] = "function"
    index: int | None = None  # clients that sum up a stream leave it in
    function: CalledFunction


class ToolChoice(Body):
    """Whether the model calls tools: of its own accord (auto), not (none), at least one (required), or the named."""

    mode: Literal["auto", "none", "required", "named"]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, str) and value in ("auto", "none", "required"):
            return {"mode": value}
        if isinstance(value, dict) and value.keys() == {"type", "function"} and value["type"] == "function":
            function = value["function"]
            if isinstance(function, dict) and function.keys() == {"name"} and isinstance(function["name"], str):
                return {"mode": "named", "name": function["name"]}
        raise ValueError('expected "none", "auto", "required" or {"type": "function", "function": {"name": ...}}')

    @property
    def is_forced(self) -> bool:
        """Whether the answer has to be a call."""
        return self.mode in ("required", "named")


def call_grammar(tools: list[Tool], name: str | None, *, is_parallel: bool) -> str:
    """Return the lark grammar of a JSON list of calls: [{"name": "f", "arguments": {...}}, ...].

    Names and punctuation are spelt in one way only, so that a stream of it can be cut into calls without a JSON parser.
    With `name`, the one tool's, only its arguments are written.
    """
    if name is not None:
        return f"start: %json {_schema(tools[0])}"
    calls = [
        f"call_{i}: {json.dumps(_prefix(tool.function.name))} arguments_{i} {json.dumps('}')}\n"
        f"arguments_{i}: %json {_schema(tool)}"
        for i, tool in enumerate(tools)
    ]
    more = ' (", " call)*' if is_parallel else ""
    either = " | ".join(f"call_{i}" for i in range(len(tools)))
    return "\n".join([f'start: "[" call{more} "]"', f"call: {either}", *calls])


def _schema(tool: Tool) -> str:
    return json.dumps({"x-guidance": JSON_FORM, **tool.function.parameters})


def _prefix(name: str) -> str:
    return f'{{"name": "{name}", "arguments": '
