"""The body of POST /v1/responses, for text."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, FailFast, Field, model_validator

from dovetail.server.asked.body import Body
from dovetail.server.asked.chat import ChatRequest, Message, join_parts
from dovetail.server.asked.sampling import ResponseFormat, SchemaFormat
from dovetail.server.errors import Refusal, unsupported

_ITEM_STATE = ("id", "status", "type")  # of a message that came from an earlier response


def _items(value: Any) -> Any:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        return value
    items = []
    for item in value:
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "reasoning":  # an earlier answer's thoughts are no part of the prompt
            continue
        if kind != "message":
            name = kind if isinstance(kind, str) else type(item).__name__
            raise Refusal(unsupported("input", f"an item of type {name[:40]!r}", "only messages are read"))
        items.append({key: each for key, each in item.items() if key not in _ITEM_STATE})
    return items


class TextFormat(Body):
    """What the text has to be: the keys of a schema stand beside its type."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    description: str = ""
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError('schema is given with type "json_schema", and only then')
        return self


class TextOptions(Body):
    """Settings of the text."""

    format: TextFormat = Field(default_factory=TextFormat)
    REFUSED: ClassVar = {"verbosity": "say it in a message"}


class ResponsesRequest(Body):
    """A conversation in the form of OpenAI's newer interface."""

    model: str | None = None
    input: Annotated[list[Message], FailFast(), BeforeValidator(_items), Field(min_length=1)]
    instructions: Annotated[str | None, BeforeValidator(join_parts)] = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    stream: bool = False
    text: TextOptions = Field(default_factory=TextOptions)
    parallel_tool_calls: bool = True  # without tools it says nothing
    tools: list[Any] = Field(default_factory=list, max_length=0)
    tool_choice: Literal["auto", "none"] = "auto"
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    REFUSED: ClassVar = {
        "previous_response_id": "nothing is kept; send the whole conversation as input",
        "conversation": "nothing is kept; send the whole conversation as input",
        "store": "nothing is kept",
        "background": "wait for the answer, or stream it",
        "reasoning": "set what the template knows in chat_template_kwargs",
        "prompt": "templates of prompts are not kept here; give input",
        "include": "nothing beside the text is given",
        "truncation": "a conversation that is too long is refused",
        "top_logprobs": "use /v1/chat/completions",
        "max_tool_calls": "use /v1/chat/completions for tools",
        "stream_options": "usage comes with the last event",
    }

    @model_validator(mode="before")
    @classmethod
    def _no_tools(cls, table: Any) -> Any:
        if isinstance(table, dict) and table.get("tools"):
            raise Refusal(unsupported("tools", "tools", "use /v1/chat/completions"))
        return table

    def to_chat(self) -> ChatRequest:
        """Return the same request for /v1/chat/completions."""
        system = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        asked = self.text.format
        schema = None if asked.schema_ is None else SchemaFormat(name=asked.name, schema=asked.schema_)
        return ChatRequest(
            messages=[*system, *self.input],
            model=self.model,
            temperature=self.temperature,
            top_p=self.top_p,
            stream=self.stream,
            max_completion_tokens=self.max_output_tokens,
            chat_template_kwargs=self.chat_template_kwargs,
            response_format=ResponseFormat(type=asked.type, json_schema=schema),
        )
