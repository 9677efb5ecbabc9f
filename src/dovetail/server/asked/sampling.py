"""The fields that chat and completions share: how tokens are chosen, when to stop, what comes back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from dovetail.engine.grammar import Grammar
from dovetail.engine.sampler import SamplingParams
from dovetail.server.asked.body import Body
from dovetail.server.errors import ApiError, Refusal, from_validation

MOST_CHOICES = 128  # of one request
MOST_LOGPROBS = 20
_MOST_STOPS = 64
_MOST_WORDS = 1024  # to choose from
_SEEDS = 2**63


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StopStrings = Annotated[list[str], BeforeValidator(_listed), Field(max_length=_MOST_STOPS)]


class StreamOptions(Body):
    """What a stream has beside the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SchemaFormat(Body):
    """OpenAI's name around a JSON schema."""

    name: str = ""
    description: str = ""
    schema_: dict[str, Any] | bool = Field(default_factory=dict, alias="schema")
    strict: bool = True  # the answer matches either way


class ResponseFormat(Body):
    """What the whole answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema is given with type "json_schema", and only then')
        return self

    def grammar(self) -> Grammar | None:
        """Return what the text has to match."""
        if self.json_schema is not None:
            return Grammar(kind="json_schema", text=json.dumps(self.json_schema.schema_))
        return Grammar(kind="json_object") if self.type == "json_object" else None


class StructuredOutputs(Body):
    """vLLM's way to ask for text of a form: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = Field(default=None, min_length=1, max_length=_MOST_WORDS)
    grammar: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError("give exactly one of json, json_object, regex, choice, grammar")
        return self

    def to_grammar(self) -> Grammar | None:
        """Return what the text has to match."""
        if self.json_ is not None:
            return Grammar(
                kind="json_schema", text=self.json_ if isinstance(self.json_, str) else json.dumps(self.json_)
            )
        if self.choice is not None:
            options = " | ".join(json.dumps(each, ensure_ascii=False) for each in self.choice)
            return Grammar(kind="lark", text=f"start: {options}")
        if self.regex is not None:
            return Grammar(kind="regex", text=self.regex)
        if self.grammar is not None:
            return Grammar(kind="lark", text=self.grammar)
        return Grammar(kind="json_object") if self.json_object else None


class Generating(Body):
    """The common part of a request that generates."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=MOST_CHOICES)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(default=None, ge=-1)  # -1 and 0: all
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = Field(default=None, max_length=1024)
    seed: int | None = None
    stop: StopStrings | None = None
    stop_token_ids: list[int] | None = Field(default=None, max_length=_MOST_STOPS)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = Field(default=0, ge=0)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(default=None, min_length=1, max_length=_MOST_WORDS)
    guided_grammar: str | None = None
    priority: int = Field(default=0, ge=-(2**31), lt=2**31)
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    token_details: bool = False
    routed_experts: bool = False

    @model_validator(mode="after")
    def _check_common(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise Refusal(ApiError(400, "stream_options is only allowed with stream = true", param="stream_options"))
        if self.prompt_logprobs is not None and self.stream:
            raise Refusal(ApiError(400, "prompt_logprobs needs stream = false", param="prompt_logprobs"))
        self.grammar()
        return self

    def grammar(self) -> Grammar | None:
        """Return what the text has to match. Raises ValueError where several forms are asked for."""
        guided = {name: getattr(self, f"guided_{name}") for name in ("json", "regex", "choice", "grammar")}
        given = {name: value for name, value in guided.items() if value is not None}
        forms = [StructuredOutputs.model_validate({name: value}).to_grammar() for name, value in given.items()]
        forms += [] if self.response_format is None else [self.response_format.grammar()]
        forms += [] if self.structured_outputs is None else [self.structured_outputs.to_grammar()]
        asked = [form for form in forms if form is not None]
        if len(asked) > 1:
            raise ValueError(
                "several forms of the answer are asked for (response_format, structured_outputs, guided_*)"
            )
        return asked[0] if asked else None


def to_params(asked: Generating, defaults: Mapping[str, Any], seed: int, **more: Any) -> list[SamplingParams]:
    """Return how each of the request's `n` choices is drawn; choice i has the seed plus i.

    `defaults` holds where the request says nothing, `seed` where it has none, and `more` goes over both. Raises
    ApiError (400) for a value out of range.
    """
    first = seed if asked.seed is None else asked.seed % _SEEDS
    names = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    given = {name: getattr(asked, name) for name in (*names, "stop", "stop_token_ids")}
    if asked.top_k == -1:
        given["top_k"] = 0
    if asked.logit_bias is not None:
        given["logit_bias"] = _bias(asked.logit_bias)
    table = {
        **defaults,
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
            if value is not None
        },
        "include_stop": asked.include_stop_str_in_output,
        "ignore_eos": asked.ignore_eos,
        "min_tokens": asked.min_tokens,
        "prompt_logprobs": asked.prompt_logprobs,
        "routed_experts": asked.routed_experts,
        **more,
    }
    try:
        return [SamplingParams(**{**table, "seed": (first + i) % _SEEDS}) for i in range(asked.n)]
    except ValidationError as error:
        raise from_validation(error, SamplingParams) from None


def _bias(asked: Mapping[str, float]) -> dict[int, float]:
    bias = {}
    for key, value in asked.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise ApiError(400, f"logit_bias: {key[:40]!r} is not a token id", param="logit_bias")
        if not -100 <= value <= 100:
            raise ApiError(400, f"logit_bias: {value} for token {key} is outside -100 to 100", param="logit_bias")
        bias[int(key)] = value
    return bias
