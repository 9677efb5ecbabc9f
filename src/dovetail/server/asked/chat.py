"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, FailFast, Field, model_validator

from dovetail.server.asked.body import Body
from dovetail.server.asked.sampling import MOST_LOGPROBS, Generating
from dovetail.server.asked.tools import MOST_TOOLS, Tool, ToolCall, ToolChoice
from dovetail.server.errors import ApiError, Refusal, unsupported

_TEXT_PARTS = ("text", "input_text", "output_text")


def join_parts(content: Any) -> Any:
    """Return the text of a list of text parts. Raises for a picture, a sound or a file, by name."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS:
            name = kind if isinstance(kind, str) else type(part).__name__
            raise Refusal(unsupported("messages", f"a content part of type {name[:40]!r}", "only text is read"))
        if not isinstance(part.get("text"), str):
            raise ValueError("a text part without text")
        texts.append(part["text"])
    return "".join(texts)


class Message(Body):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(join_parts)] = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # vLLM's name of the same
    tool_calls: list[ToolCall] | None = Field(default=None, max_length=MOST_TOOLS)
    tool_call_id: str | None = None
    REFUSED: ClassVar = {
        "audio": "only text is generated",
        "refusal": "send it as content",
        "function_call": "use tool_calls",
    }

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError(f"a message of role {self.role} needs content")
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content or self.reasoning):
            raise ValueError(f"role {self.role} has no tool_calls and no reasoning; only assistant has")
        return self

    def to_template(self) -> dict[str, Any]:
        """Return the message as chat templates expect it."""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content,
        }
        if thought := self.reasoning_content or self.reasoning:
            message["reasoning_content"] = thought
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        named = {"name": self.name, "tool_call_id": self.tool_call_id}
        return message | {key: value for key, value in named.items() if value is not None}


class ChatRequest(Generating):
    """A conversation to go on with."""

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)  # OpenAI's newer name, which wins
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    tools: list[Tool] | None = Field(default=None, max_length=MOST_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    include_reasoning: bool = True
    REFUSED: ClassVar = {
        "audio": "only text is generated",
        "modalities": "only text is generated",
        "function_call": "use tool_choice",
        "functions": "use tools",
        "prediction": "drafts come from the model's own MTP modules",
        "web_search_options": "nothing is fetched",
        "reasoning_effort": 'set what the template knows in chat_template_kwargs, such as {"thinking": true}',
        "verbosity": "say it in a message",
        "best_of": "use n, or /v1/completions",
        "echo": "use /v1/completions",
        "suffix": "use /v1/completions with a prompt that holds the tokens of fill-in-the-middle",
        "chat_template": "templates are given where the server is started",
        "documents": "put their text into a message",
        "store": "nothing is kept",
    }

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise Refusal(ApiError(400, "top_logprobs needs logprobs = true", param="top_logprobs"))
        if self.tools is not None and not self.tools:
            raise Refusal(ApiError(400, "tools is an empty list: leave it out, or name a tool", param="tools"))
        self._check_choice()
        if (
            self.continue_final_message
            and "add_generation_prompt" in self.model_fields_set
            and self.add_generation_prompt
        ):
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ValueError("continue_final_message needs a last message of role assistant")
        return self

    def _check_choice(self) -> None:
        choice = self.tool_choice
        if choice is None or choice.mode == "none":
            return
        if not self.tools:
            raise Refusal(ApiError(400, "tool_choice needs tools", param="tool_choice"))
        known = [tool.function.name for tool in self.tools]
        if choice.name is not None and choice.name not in known:
            message = f"tool_choice names {choice.name[:80]!r}, which is none of tools: {', '.join(known)[:200]}"
            raise Refusal(ApiError(400, message, param="tool_choice"))
        if choice.is_forced and self.grammar() is not None:
            raise ValueError("tool_choice forces a call, and another form of the answer is asked for; leave one out")

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model may call."""
        is_off = self.tool_choice is not None and self.tool_choice.mode == "none"
        return [] if is_off else list(self.tools or ())

    def most_tokens(self) -> int | None:
        """Return the bound on new tokens, if the client gave one."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
