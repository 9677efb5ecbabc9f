"""Measures one server: probes it, warms it up, sends the requests, and writes down each as it ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import httpx
from pydantic import Field, model_validator

from dovetail.bench.load import Heard, Send, closed_loop, open_loop
from dovetail.bench.outcome import Outcome
from dovetail.bench.probe import probe
from dovetail.bench.wire import Target, body_of, open_client, send
from dovetail.bench.workload import FIRST_ID, Request, Workload, draw_requests, read_trace, warm_up_requests
from dovetail.config import Record

DEFAULT_CONCURRENCY = 8
Say = Callable[[str], None]


class Question(Record):
    """Which server is measured, and with what."""

    url: str
    model: str | None = None  # None: the only one that it serves
    api: Literal["completions", "chat"] = "completions"
    api_key: str | None = None
    workload: Workload = Workload()
    trace: Path | None = None  # in place of what the workload draws, but for prompts and their seed
    concurrency: int | None = Field(default=None, ge=1)
    warmup: int = Field(default=4, ge=0)  # requests before the measured ones
    temperature: float = Field(default=0.0, ge=0)
    ignore_eos: bool = True
    vocab_size: int = Field(default=1024, gt=FIRST_ID + 8)
    timeout: float = Field(default=600.0, gt=0)  # seconds that a server may be silent

    @model_validator(mode="after")
    def _one_pace(self) -> Question:
        given = [
            name
            for name, value in (
                ("--concurrency", self.concurrency),
                ("--rate", self.workload.rate),
                ("--trace", self.trace),
            )
            if value is not None
        ]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each say when requests are sent; give one of them")
        return self

    def requests(self) -> list[Request]:
        return draw_requests(self.workload) if self.trace is None else read_trace(self.trace)


def bench_serve(question: Question, heard: Heard, say: Say, rows: Path | None = None) -> tuple[Target, list[Outcome]]:
    """Measure a server; return how it was asked, and the outcomes in the order in which they ended.

    `heard` is told each outcome, `say` each remark. `rows` gets a line of JSON for each outcome at once, so that an
    interrupted measurement leaves its rows. Raises ValueError for a server that cannot be measured.
    """
    requests = question.requests()
    outcomes: list[Outcome] = []
    with nullcontext() if rows is None else rows.open("w", encoding="utf-8") as file:

        def take(outcome: Outcome) -> None:
            outcomes.append(outcome)
            if file is not None:
                print(json.dumps(asdict(outcome)), file=file, flush=True)
            heard(outcome)

        target = asyncio.run(_measure(question, requests, take, say))
    return target, outcomes


async def _measure(question: Question, requests: Sequence[Request], take: Heard, say: Say) -> Target:
    async with open_client(question.url, question.api_key, question.timeout) as client:
        target, remarks = await probe(client, question.model, question.api, question.vocab_size, question.ignore_eos)
        for remark in remarks:
            say(remark)
        concurrency = question.concurrency or DEFAULT_CONCURRENCY
        warm = warm_up_requests(requests, question.warmup)
        warmed: list[Outcome] = []
        await closed_loop(warm, concurrency, _sender(client, target, question, warm), warmed.append)
        failed = [outcome for outcome in warmed if outcome.error is not None]
        if failed:
            say(f"{len(failed)} of {len(warm)} requests to warm up failed: {failed[0].error}: {failed[0].message}")
        send_one = _sender(client, target, question, requests)
        if requests[0].arrival is None:
            await closed_loop(requests, concurrency, send_one, take)
        else:
            await open_loop(requests, send_one, take)
    return target


def _sender(client: httpx.AsyncClient, target: Target, question: Question, requests: Sequence[Request]) -> Send:
    """Return what sends one of `requests`; their bodies are made now, so that no time is spent on them later."""
    seed, temperature = question.workload.seed, question.temperature
    bodies = {request.index: body_of(request, target, seed, temperature) for request in requests}

    async def send_one(request: Request, start: float) -> Outcome:
        return await send(client, target, request, bodies[request.index], start)

    return send_one
