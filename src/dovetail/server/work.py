"""The generation behind one request: submitted in a thread, read by the event loop, and cancelled."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import anyio

from dovetail.engine.engine import Draining, Full
from dovetail.engine.sampler import SamplingParams
from dovetail.engine.stream import Stream
from dovetail.server.answered.choice import Choice, Piece
from dovetail.server.errors import ApiError
from dovetail.server.metrics import Metrics
from dovetail.server.served import Parser, Served

Emit = Callable[[int, Piece], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One prompt, how each of its choices is drawn, and what reads them."""

    prompt: Sequence[int]
    params: Sequence[SamplingParams]
    parsers: Sequence[Parser]  # one per choice
    priority: int = 0
    names_calls: bool = True
    keeps_tokens: bool = False


class Work:
    """All choices of one request. Leaving it, as a context, cancels what still runs."""

    def __init__(self, served: Served, metrics: Metrics) -> None:
        self.served, self.metrics = served, metrics
        self.arrived = time.monotonic()
        self.streams: list[Stream] = []
        self.choices: list[Choice] = []
        self.groups: list[int] = []  # choices of each prompt
        self.lock = threading.Lock()
        self.is_cancelled = False
        self.has_ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.has_ended:
            self.cancel()

    def cancel(self) -> None:
        """End every choice, and at once what is submitted later. May be called from any thread, and twice."""
        with self.lock:
            self.is_cancelled = True
            streams = list(self.streams)
        for stream in streams:
            stream.cancel()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Hand the jobs to the engine, in a thread. Raises ApiError; leaving the context ends what was handed over."""
        for job in jobs:
            try:
                streams = self.served.engine.submit_group(job.prompt, job.params, priority=job.priority)
            except Full as error:
                raise ApiError(429, str(error), code="full", retry_after=math.ceil(error.retry_after) or 1) from None
            except Draining:
                raise ApiError(503, "the server is stopping", code="stopping", retry_after=5) from None
            except ValueError as error:
                raise ApiError(400, str(error)) from None
            with self.lock:
                self.streams += streams
                is_late = self.is_cancelled
            self.groups.append(len(streams))
            self.choices += [
                Choice(parser=parser, names_calls=job.names_calls, keeps_tokens=job.keeps_tokens)
                for parser in job.parsers
            ]
            if is_late:
                self.cancel()

    async def drive(self, emit: Emit) -> None:
        """Read every choice to its end and give each piece to `emit`. Raises ApiError where the engine fails."""
        failures: list[Exception] = []

        async def read(index: int) -> None:
            try:
                await self._read(index, emit)
            except Exception as error:
                failures.append(error)
                readers.cancel_scope.cancel()

        async with anyio.create_task_group() as readers:
            for index in range(len(self.streams)):
                readers.start_soon(read, index)
        if failures:
            raise failures[0]
        self.has_ended = True
        self.metrics.request_ended(time.monotonic() - self.arrived)

    async def _read(self, index: int, emit: Emit) -> None:
        choice, first, last = self.choices[index], 0.0, 0.0
        async for output in self.streams[index]:
            now = time.monotonic()
            if output.finish_reason == "error":
                raise ApiError(500, f"generation failed: {_one_line(output.error)}")
            if output.finish_reason == "abort":
                raise ApiError(503, "generation was ended before the answer was whole; the server may be stopping")
            if output.tokens and not last:
                first = now
                self.metrics.first_token(now - self.arrived, self.streams[index].prompt_tokens)
            elif output.tokens:
                self.metrics.next_tokens(now - last)
            last = now if output.tokens else last
            await emit(index, choice.feed(output))
        if choice.finish_reason is None:
            raise ApiError(500, "generation ended without a reason")
        if choice.num_tokens > 1:
            self.metrics.per_token((last - first) / (choice.num_tokens - 1))

    def usage(self) -> dict[str, object]:
        """Return what was read and written so far, in tokens: each prompt once, all of its choices."""
        firsts = [self.streams[sum(self.groups[:i])] for i in range(len(self.groups))]
        prompt = sum(stream.prompt_tokens for stream in firsts)
        written = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": sum(stream.cached_tokens for stream in firsts)},
            "completion_tokens_details": {"reasoning_tokens": sum(choice.num_reasoning for choice in self.choices)},
        }


def _one_line(text: str | None) -> str:
    lines = (text or "").strip().splitlines()
    return lines[-1][:200] if lines else "the server's log says why"
