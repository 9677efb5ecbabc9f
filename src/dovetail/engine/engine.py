"""The engine as a service: a thread that runs the model, and requests that come and go while it does.

    submit          a prompt -> a `Stream` of what is generated
    submit_group    several completions of one prompt, which is computed once
    statistics      what is running, how full the cache is, what was done so far
    drain, close    the end

Everything but the thread's own loop may be called from any thread. What a request gets does not depend on the others
(see `steps.runner`); when it gets it does.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field

from dovetail.engine.core import Core
from dovetail.engine.loaded import LoadedModel
from dovetail.engine.room import EngineConfig, plan_room
from dovetail.engine.sampler import SamplingParams
from dovetail.engine.sequence import Sequence
from dovetail.engine.stream import Output, Stream
from dovetail.numerics.cpu.process import leave_threads, settle_process

SECONDS_GUESSED = 1.0  # of a request, before one has ended


class Full(RuntimeError):
    """The waiting room is full."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests wait already; ask again in {retry_after:.0f} s")
        self.retry_after = retry_after


class Draining(RuntimeError):
    """The engine is ending, and takes nothing new."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """A look at the engine."""

    running: int
    waiting: int
    cache_usage: float  # share of the pages that sequences hold
    prompt_tokens: int  # computed so far
    generated_tokens: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    drafted: tuple[int, ...]  # by position in the draft
    accepted: tuple[int, ...]
    finished: dict[str, int]  # by reason
    speculation: str  # a line: where drafts pay, and where not
    step_seconds: float  # of the last step
    step_tokens: int


@dataclass(frozen=True, slots=True)
class _Arrival:
    sequences: list[Sequence]
    streams: list[Stream]


@dataclass(frozen=True, slots=True)
class _Leave:
    sequence: Sequence


@dataclass(slots=True)
class _Shared:
    """What the thread and its callers both touch, under a lock."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    waiting: int = 0  # arrived, and not yet with a first output
    seconds: float = SECONDS_GUESSED  # a request takes on average
    is_draining: bool = False
    failure: str | None = None


class Engine:
    """Raises `ValueError` for what `plan_room` refuses."""

    def __init__(self, llm: LoadedModel, config: EngineConfig | None = None) -> None:
        config = config or EngineConfig()
        self.llm, self.config = llm, config
        self.tokenizer = llm.tokenizer
        self.room = plan_room(llm.spec, config, llm.model.embed_tokens.weight.element_size())
        self.max_model_len = self.room.positions
        self.num_drafts = config.drafts(llm.spec)
        self.weights_version = "0"
        self._inbox: queue.SimpleQueue[_Arrival | _Leave | None] = queue.SimpleQueue()
        self._shared = _Shared()
        self._streams: dict[Sequence, Stream] = {}
        self._begins: dict[Sequence, float] = {}
        self._core: Core | None = None
        self._settled, self._idle = threading.Event(), threading.Event()  # settled: ready, or failed
        self._idle.set()
        leave_threads()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether kernels are compiled, the cache is there, and nothing has failed since."""
        return self._settled.is_set() and self._shared.failure is None

    def wait_until_ready(self, timeout: float | None = None) -> bool:
        """Until it is ready, or for so many seconds. Raises `RuntimeError` where it has failed."""
        self._settled.wait(timeout)
        if self._shared.failure:
            raise RuntimeError(self._shared.failure)
        return self.is_ready

    def submit(self, prompt: Sequences[int], params: SamplingParams, *, priority: int = 0) -> Stream:
        """A prompt of token ids. Smaller priorities go first. Raises `ValueError` for a request that cannot be met, and
        `Full`."""
        return self.submit_group(prompt, [params], priority=priority)[0]

    def submit_group(
        self, prompt: Sequences[int], params: Sequences[SamplingParams], *, priority: int = 0
    ) -> list[Stream]:
        """One completion for each of params, of one prompt that is computed once; all or none is admitted."""
        tokens = self.llm.prompt_tokens(prompt, max_length=self.max_model_len)
        sequences = [self.llm.sequence(list(tokens), each, self.max_model_len) for each in params]
        for sequence in sequences[1:]:
            sequence.leader = sequences[0]
        for sequence in sequences:
            sequence.priority = priority
        streams = [Stream(len(tokens), self._canceller(sequence)) for sequence in sequences]
        self._enter(_Arrival(sequences, streams))
        return streams

    def statistics(self) -> Statistics:
        core = self._core
        if core is None:
            return Statistics(
                running=0, waiting=self._shared.waiting, cache_usage=0.0, prompt_tokens=0, generated_tokens=0,
                prefix_queried_tokens=0, prefix_hit_tokens=0, preemptions=0, drafted=(), accepted=(), finished={},
                speculation="not measured yet", step_seconds=0.0, step_tokens=0,
            )  # fmt: skip
        counts, scheduler = core.counts, core.scheduler
        return Statistics(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            cache_usage=1 - core.pool.num_free / core.pool.num_pages,
            prompt_tokens=counts.prompt_tokens,
            generated_tokens=counts.generated_tokens,
            prefix_queried_tokens=scheduler.queried,
            prefix_hit_tokens=scheduler.hit,
            preemptions=scheduler.set_backs,
            drafted=tuple(counts.drafted),
            accepted=tuple(counts.accepted),
            finished=dict(counts.finished),
            speculation=core.pace.explain(self.num_drafts),
            step_seconds=counts.step_seconds,
            step_tokens=counts.step_tokens,
        )

    def drain(self, timeout: float) -> bool:
        """Take nothing new; True when all that was taken has ended."""
        with self._shared.lock:
            self._shared.is_draining = True
        return self._idle.wait(timeout)

    def close(self) -> None:
        """End at once: whatever is unfinished ends with the reason "abort"."""
        with self._shared.lock:
            self._shared.is_draining = True
        self._inbox.put(None)
        self._thread.join()

    def _enter(self, arrival: _Arrival) -> None:
        count = len(arrival.sequences)
        with self._shared.lock:  # what is taken in before the end is in the inbox before it too
            if self._shared.failure:
                raise RuntimeError(self._shared.failure)
            if self._shared.is_draining:
                raise Draining("the server is ending, and takes nothing new")
            waiting = self._shared.waiting
            if waiting + count > self.config.max_waiting + self.config.max_sequences:
                rounds = math.ceil(waiting / self.config.max_sequences)
                raise Full(waiting, max(1.0, rounds * self._shared.seconds))
            self._shared.waiting += count
            self._idle.clear()
            self._inbox.put(arrival)

    def _canceller(self, sequence: Sequence) -> Callable[[], None]:
        return lambda: self._inbox.put(_Leave(sequence))

    def _run(self) -> None:
        try:
            settle_process()
            self.llm.warm_up(self.num_drafts)
            self._core = Core(self.llm.drawn_from, self.room, self.num_drafts, self.config.speculate == "auto")
            self._settled.set()
            while self._take_messages():
                for sequence, output in self._core.step() if self._core.has_work else ():
                    self._put(sequence, output)
            for sequence in list(self._streams):
                self._cancel(sequence)
            self._end_all(Output(finish_reason="abort"))
        except BaseException as error:
            self._shared.failure = f"the engine failed: {type(error).__name__}: {error}"
            self._settled.set()
            self._core = None  # it may be in the middle of anything
            self._end_all(Output(finish_reason="error", error=self._shared.failure))
            raise

    def _take_messages(self) -> bool:
        """All that have come, or the next one where there is nothing to do; False for the end."""
        assert self._core is not None
        while True:
            is_idle = not self._core.has_work
            with self._shared.lock:
                if is_idle and not self._shared.waiting:
                    self._idle.set()
            try:
                message = self._inbox.get(block=is_idle)
            except queue.Empty:
                return True
            if message is None:
                return False
            if isinstance(message, _Leave):
                self._cancel(message.sequence)
            else:
                for sequence, stream in zip(message.sequences, message.streams, strict=True):
                    self._streams[sequence], self._begins[sequence] = stream, time.perf_counter()
                    self._core.add(sequence)

    def _cancel(self, sequence: Sequence) -> None:
        assert self._core is not None
        output = self._core.cancel(sequence)
        if output is not None and sequence in self._streams:
            self._put(sequence, output)

    def _put(self, sequence: Sequence, output: Output) -> None:
        stream = self._streams[sequence]
        if not stream.has_begun:
            stream.has_begun = True
            stream.cached_tokens, stream.prompt_logprobs = sequence.cached, sequence.prompt_logprobs
            with self._shared.lock:
                self._shared.waiting -= 1
        if output.finish_reason is not None:
            del self._streams[sequence]
            took = time.perf_counter() - self._begins.pop(sequence)
            self._shared.seconds += 0.1 * (took - self._shared.seconds)
        stream.put(output)

    def _end_all(self, output: Output) -> None:
        for stream in self._streams.values():
            stream.put(output)
        self._streams.clear()
        with self._shared.lock:
            while not self._inbox.empty():
                message = self._inbox.get()
                if isinstance(message, _Arrival):
                    for stream in message.streams:
                        stream.put(output)
            self._shared.waiting = 0
        self._idle.set()
