"""The measures of a server as rows of a table, lines of text, and plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dovetail.bench.measures import Limits, Measures, Spread
from dovetail.bench.outcome import Counting, Outcome
from dovetail.bench.serve import DEFAULT_CONCURRENCY, Question
from dovetail.bench.wire import Target

HEADER = ("milliseconds", ">mean", ">median", ">p90", ">p95", ">p99", ">most")
LATE = 0.010  # seconds; a request sent later than this after its time is worth a word
COUNTED: dict[Counting, str] = {
    "usage of every chunk": "tokens counted by the usage in every chunk",
    "usage at the end": "tokens counted by the usage at the end, divided evenly among an answer's chunks",
    "one token a chunk": "no usage: every chunk taken for one token",
}


def title(question: Question, target: Target, outcomes: Sequence[Outcome]) -> str:
    kind = "chat" if target.api == "chat" else "completions"
    return f"{question.url}, {target.model}: {len(outcomes)} {kind}, {pace(question)}, seed {question.workload.seed}"


def pace(question: Question) -> str:
    workload = question.workload
    if question.trace is not None:
        return f"as in {question.trace}"
    if workload.rate is None:
        return f"{question.concurrency or DEFAULT_CONCURRENCY} at once"
    kind = f"bursts of {workload.burst_size}" if workload.arrivals == "burst" else workload.arrivals
    return f"{workload.rate:g} per second ({kind})"


def printed_rows(measures: Measures) -> list[tuple[str, ...]]:
    named = {
        "time to first token": measures.ttft,
        "inter-token": measures.inter_token,
        "between chunks": measures.gap,
        "end to end": measures.end_to_end,
    }
    return [(name, *_milliseconds(spread)) for name, spread in named.items()]


def _milliseconds(spread: Spread) -> tuple[str, ...]:
    return tuple("-" if math.isnan(second) else f"{second * 1e3:.1f}" for second in asdict(spread).values())


def notes(measures: Measures, limits: Limits | None, outcomes: Sequence[Outcome]) -> list[str]:
    """Return the lines below the table; errors are always among them."""
    lines = [
        f"{measures.completed} of {measures.requests} requests in {measures.seconds:.2f} s:"
        f" {measures.requests_per_s:.2f} requests/s, {measures.input_tokens_per_s:.1f} tokens/s in,"
        f" {measures.output_tokens_per_s:.1f} tokens/s out; {measures.mean_under_way:.1f} under way on average",
        _lengths(measures),
    ]
    if limits is not None:
        share = (measures.good or 0) / measures.requests
        lines.append(f"goodput {measures.goodput:.2f} requests/s: {measures.good} ({share:.0%}) kept {limits}")
    lines += [text for counting, text in COUNTED.items() if counting in measures.counting]
    if measures.latest_sending > LATE:
        lines.append(f"a request was sent {measures.latest_sending * 1e3:.0f} ms late: this client was too slow")
    lines.append(f"errors: {sum(measures.errors.values()) or 'none'}")
    for kind, count in measures.errors.items():
        first = next(outcome.message for outcome in outcomes if outcome.error == kind)
        lines.append(f"  {count} x {kind}: {first}")
    return lines


def _lengths(measures: Measures) -> str:
    cached = f" ({measures.cached_tokens} from its prefix cache)" if measures.cached_tokens else ""
    text = f"{measures.prompt_tokens} tokens in{cached}, {measures.generated_tokens} out"
    return text + (f"; {measures.shorter} answers shorter than asked for" if measures.shorter else "")


def as_json(question: Question, target: Target, measures: Measures, limits: Limits | None) -> dict[str, Any]:
    """Return plain data in seconds, with null for what there is none of. The key is left out."""
    return {
        "question": question.model_dump(mode="json", exclude={"api_key"}),
        "target": asdict(target),
        "limits": None if limits is None else asdict(limits),
        "measures": _without_nan(asdict(measures)),
    }


def _without_nan(table: dict[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return _without_nan(value)
        return None if isinstance(value, float) and math.isnan(value) else value

    return {key: plain(value) for key, value in table.items()}
