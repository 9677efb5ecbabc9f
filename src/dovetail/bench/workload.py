"""The requests of a measurement: when each arrives, how long prompt and answer are, and what it asks.

All of it is drawn from one seed, so that two servers are asked the same. A request is drawn without its prompt. The
prompt is made of the request's number and the seed, as token ids or as words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from dovetail.config import Record, read_text, validate

Arrivals = Literal["poisson", "uniform", "burst"]
FIRST_ID = 64  # ids below are often those of special tokens, which a server may treat in its own way
WARM_UP = 1_000_000  # number of the first request that warms up: its prompts are none of those measured
_TEXT = (
    "river stone light garden window paper silver morning letter market forest bridge winter summer music table door"
    " house road water fire bread glass ship cloud train story voice hand night song field city line color number"
    " circle island mountain valley harbor lantern thread needle button mirror candle basket hammer engine signal"
    " pattern shadow corner village station journey"
)
WORDS = _TEXT.split()
TRACE_EXAMPLE = '{"arrival": 0.5, "input_tokens": 512, "output_tokens": 128, "shared_tokens": 256}'


def _span(value: Any) -> Any:
    """Read "512" as 512 to 512, and "256:768" as it stands."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, str):
        found = re.fullmatch(r"(\d+)(?::(\d+))?", value)
        if found is None:
            raise ValueError(f"{value!r} is neither a number such as 512 nor a range such as 256:768")
        return int(found[1]), int(found[2] or found[1])
    return tuple(value) if isinstance(value, list) else value


def _in_order(value: tuple[int, int]) -> tuple[int, int]:
    if not 1 <= value[0] <= value[1]:
        raise ValueError(f"{value[0]}:{value[1]} has to go from 1 or more up to the same or more")
    return value


Span = Annotated[tuple[int, int], BeforeValidator(_span), AfterValidator(_in_order)]  # tokens, both ends included


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request, without its prompt."""

    index: int
    arrival: float | None  # seconds after the start; None: as soon as a place is free
    input_tokens: int
    shared_tokens: int  # of them, the first ones, which are the same in every request that has any
    output_tokens: int


class Workload(Record):
    """What is drawn. Without `rate` there are no arrivals: requests are sent as earlier ones end."""

    requests: int = Field(default=64, ge=1)
    input_tokens: Span = (512, 512)
    output_tokens: Span = (128, 128)
    shared_prefix: int = Field(default=0, ge=0)  # tokens
    shared_share: float = Field(default=1.0, ge=0, le=1)  # of the requests, that begin with the shared prefix
    rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)  # requests per second
    arrivals: Arrivals = "poisson"
    burst_size: int = Field(default=8, ge=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _prompts_differ(self) -> Workload:
        if self.shared_prefix >= self.input_tokens[0]:
            raise ValueError(
                f"a shared prefix of {self.shared_prefix} tokens leaves nothing of prompts of {self.input_tokens[0]}"
                " tokens to differ in: make --shared-prefix less, or --input-tokens more"
            )
        return self


class TraceLine(Record):
    """One line of a trace: a request and when it comes."""

    arrival: float = Field(ge=0, allow_inf_nan=False)  # seconds after the start
    input_tokens: int = Field(ge=1)
    output_tokens: int = Field(ge=1)
    shared_tokens: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _prompts_differ(self) -> TraceLine:
        if self.shared_tokens >= self.input_tokens:
            raise ValueError(f"shared_tokens {self.shared_tokens} has to be below input_tokens {self.input_tokens}")
        return self


def draw_requests(workload: Workload) -> list[Request]:
    """Draw the requests in order of arrival. Exactly `shared_share` of them, rounded, have the shared prefix."""
    count = workload.requests
    generator = np.random.default_rng([workload.seed, 0])
    inputs, outputs = (
        generator.integers(*span, size=count, endpoint=True) for span in (workload.input_tokens, workload.output_tokens)
    )
    sharing = np.zeros(count, dtype=int)
    sharing[generator.permutation(count)[: round(workload.shared_share * count)]] = workload.shared_prefix
    times = [None] * count if workload.rate is None else arrival_times(workload, generator)
    return [
        Request(
            index=index,
            arrival=times[index],
            input_tokens=int(inputs[index]),
            shared_tokens=int(sharing[index]),
            output_tokens=int(outputs[index]),
        )
        for index in range(count)
    ]


def arrival_times(workload: Workload, generator: np.random.Generator) -> list[float]:
    """Return when requests come, in seconds after the first one. In the long run all three kinds have the same rate.

    "poisson": independent users, gaps of an exponential distribution; "uniform": equal gaps; "burst": `burst_size`
    requests at the same moment, then a pause.
    """
    assert workload.rate is not None
    places = np.arange(workload.requests)
    if workload.arrivals == "poisson":
        gaps = generator.exponential(1 / workload.rate, size=workload.requests)
        return [float(time) for time in np.cumsum(gaps) - gaps[0]]
    if workload.arrivals == "burst":
        places = places // workload.burst_size * workload.burst_size
    return [float(time) for time in places / workload.rate]


def read_trace(path: Path) -> list[Request]:
    """Read the requests of a JSONL file of `TraceLine`, sorted by arrival. Raises ValueError naming file and line."""
    lines = [
        _trace_line(text, f"{path}, line {number}")
        for number, text in enumerate(read_text(path).splitlines(), 1)
        if text.strip()
    ]
    if not lines:
        raise ValueError(f"{path}: holds no request; a line is such as {TRACE_EXAMPLE}")
    lines.sort(key=lambda line: line.arrival)
    return [Request(index=index, **line.model_dump()) for index, line in enumerate(lines)]


def _trace_line(text: str, where: str) -> TraceLine:
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error}; a line is such as {TRACE_EXAMPLE}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{where}: not a JSON object; a line is such as {TRACE_EXAMPLE}")
    return validate(TraceLine, table, where)


def warm_up_requests(requests: Sequence[Request], count: int) -> list[Request]:
    """Return `count` requests of the same lengths with prompts of their own, none of which is shared."""
    return [
        Request(
            index=WARM_UP + place,
            arrival=None,
            input_tokens=like.input_tokens,
            shared_tokens=0,
            output_tokens=like.output_tokens,
        )
        for place, like in ((place, requests[place % len(requests)]) for place in range(count))
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruler:
    """How many tokens a server makes of words: measured by asking it twice."""

    tokens_per_word: float
    tokens_around: float  # of the chat template and the like, in every prompt


def prompt_ids(request: Request, seed: int, vocab_size: int) -> list[int]:
    """Return the prompt as token ids from `FIRST_ID` up to `vocab_size`, which is left out."""
    return _draw(request.shared_tokens, request, seed, request.input_tokens, vocab_size - FIRST_ID, FIRST_ID)


def prompt_text(request: Request, seed: int, ruler: Ruler) -> str:
    """Return the prompt as words, about as many as make the tokens asked for."""
    shared = round(request.shared_tokens / ruler.tokens_per_word)
    words = max(1, shared, round((request.input_tokens - ruler.tokens_around) / ruler.tokens_per_word))
    return words_text(_draw(shared, request, seed, words, len(WORDS), 0))


def words_text(numbers: list[int]) -> str:
    return " ".join(WORDS[number] for number in numbers)


def _draw(shared: int, request: Request, seed: int, count: int, kinds: int, first: int) -> list[int]:
    """Draw `count` numbers from `first`, of `kinds` many; the first `shared` are the same for every request."""
    prefix = np.random.default_rng([seed, 1]).integers(kinds, size=shared)
    own = np.random.default_rng([seed, 2, request.index]).integers(kinds, size=count - shared)
    return [int(number) + first for number in np.concatenate([prefix, own])]
