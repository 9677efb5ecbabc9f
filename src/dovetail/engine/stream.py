"""What comes out of the engine, token by token, and the way from its thread to whoever waits."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]
TopLogprobs = tuple[tuple[int, float], ...]  # token, log-probability; likeliest first
Experts = tuple[tuple[int, ...], ...]  # per MoE layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of a completion."""

    id: int
    text: str = ""  # what became sure with it: nothing while a character or a possible stop string is unfinished
    logprob: float | None = None  # log-softmax of the model's own logits
    sampler_logprob: float | None = None  # in the distribution that it was drawn from
    top: TopLogprobs = ()
    is_draft: bool = False  # proposed by an MTP module, and accepted
    experts: Experts | None = None  # of the position that it was drawn at


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What one step gave one sequence."""

    tokens: tuple[Token, ...] = ()
    text: str = ""  # after the tokens' texts: what became sure because the sequence ended
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token; None for an end-of-sequence token
    error: str | None = None


PromptLogprobs = list[tuple[float, TopLogprobs] | None]


class Stream:
    """One completion while it is generated: iterate over its `Output`s, in a thread or in an event loop."""

    def __init__(self, prompt_tokens: int, cancel: Callable[[], None]) -> None:
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0  # of the prompt, found in the cache; final with the first output
        self.prompt_logprobs: PromptLogprobs | None = None  # with the first output
        self.has_begun = False
        self._cancel = cancel
        self._outputs: deque[Output] = deque()
        self._changed = threading.Condition()
        self._wake: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def cancel(self) -> None:
        """Stop it, from any thread, at any time. It ends with the reason "abort", unless it has ended already."""
        self._cancel()

    def put(self, output: Output) -> None:
        """The engine's side."""
        with self._changed:
            self._outputs.append(output)
            self._changed.notify_all()
            if self._wake is not None:
                loop, event = self._wake
                with suppress(RuntimeError):  # the loop is closed, and nobody waits
                    loop.call_soon_threadsafe(event.set)

    def __iter__(self) -> Iterator[Output]:
        while True:
            with self._changed:
                while not self._outputs:
                    self._changed.wait()
                output = self._outputs.popleft()
            yield output
            if output.finish_reason is not None:
                return

    async def __aiter__(self) -> AsyncIterator[Output]:
        event = asyncio.Event()
        with self._changed:
            self._wake = asyncio.get_running_loop(), event
            if self._outputs:
                event.set()
        while True:
            await event.wait()
            event.clear()
            while self._outputs:
                output = self._outputs.popleft()
                yield output
                if output.finish_reason is not None:
                    return
