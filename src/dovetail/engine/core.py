"""The engine's loop, one step at a time: schedule, decode, compute parts of prompts, hand out tokens.

It belongs to one thread. `llm` runs it for whole calls, `engine` in a thread of its own for requests as they come.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from dovetail.engine import speculative
from dovetail.engine.drawing import described, experts_of, likeliest, pick
from dovetail.engine.scheduling.blocks import BlockPool
from dovetail.engine.scheduling.pace import Pace
from dovetail.engine.scheduling.scheduler import Part, Scheduler
from dovetail.engine.sequence import Drawn, Sequence
from dovetail.engine.steps.cache import PagedCache
from dovetail.engine.steps.rows import Chunk, Short
from dovetail.engine.steps.runner import Chosen, Runner
from dovetail.engine.stream import Output
from dovetail.model.transformer import Transformer

Outputs = list[tuple[Sequence, Output]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How much may be worked on at a time."""

    sequences: int  # together
    positions: int  # of one sequence, prompt and completion
    num_pages: int
    page_size: int = 64
    prompt_tokens: int = 512  # of a step, at most
    shares_prefixes: bool = True  # prompts begin behind pages that others filled
    is_fp8: bool = False  # the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompts:
    """The parts of prompts in a pass; their rows begin at `first`."""

    parts: list[Part]
    sequences: list[Sequence]
    chunks: list[Chunk]
    first: int
    lasts: list[int]  # the last rows of prompts that end here
    wants_all: bool  # hidden states of all rows

    @staticmethod
    def of(parts: list[Part], first: int, depth: int) -> _Prompts:
        sequences, chunks = [_of(part) for part in parts], [_chunk(part) for part in parts]
        ends = accumulate((part.count for part in parts), initial=first)
        lasts = [end - 1 for end, chunk in zip(list(ends)[1:], chunks, strict=True) if not chunk.goes_on]
        describes = any(sequence.params.prompt_logprobs is not None for sequence in sequences)
        return _Prompts(
            parts=parts,
            sequences=sequences,
            chunks=chunks,
            first=first,
            lasts=lasts,
            wants_all=bool(parts) and (depth > 0 or describes),
        )


@dataclass(slots=True)
class Counts:
    """What was done so far."""

    prompt_tokens: int = 0  # computed
    generated_tokens: int = 0
    drafted: list[int] = field(default_factory=list)  # by position
    accepted: list[int] = field(default_factory=list)
    finished: dict[str, int] = field(default_factory=dict)  # by reason
    step_seconds: float = 0.0  # of the last step,
    step_tokens: int = 0  # and its tokens


class Core:
    """`depth` drafts per step, always or, with `is_auto`, where they pay."""

    def __init__(self, model: Transformer, room: Room, depth: int = 0, is_auto: bool = False) -> None:
        parameter = model.embed_tokens.weight
        capacity = room.positions + depth + 1
        dtype = torch.float8_e4m3fn if room.is_fp8 else parameter.dtype
        pages = room.num_pages, room.page_size
        cache = PagedCache(model.spec, room.sequences, capacity, pages, dtype, parameter.device)
        self.room, self.depth, self.is_auto = room, depth, is_auto
        self.runner = Runner(model, cache)
        self.pool = BlockPool(room.num_pages, room.page_size)
        cuts = self.runner.cuts_prompts and room.shares_prefixes
        self.scheduler = Scheduler(self.pool, room.sequences, depth, cuts)
        self.pace, self.counts = Pace(), Counts(drafted=[0] * depth, accepted=[0] * depth)

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def add(self, sequence: Sequence) -> None:
        self.scheduler.add(sequence)

    def cancel(self, sequence: Sequence) -> Output | None:
        """Its last output; None if it had ended."""
        if sequence.finish_reason is not None:
            return None
        if sequence.text is not None:
            sequence.text.finish()
        sequence.finish_reason = "abort"
        self._end(sequence)
        return Output(text="" if sequence.text is None else sequence.text.take(), finish_reason="abort")

    def step(self) -> Outputs:
        """Compute what the scheduler chooses; what it gave each sequence."""
        begin = time.perf_counter()
        decoding = sum(task.is_decoding for task in self.scheduler.running)
        unfinished = len(self.scheduler.running) - decoding + len(self.scheduler.waiting)
        depth = self.depth
        if self.is_auto and depth and decoding:
            depth = self.pace.depth(decoding, depth)
        budget = self.pace.part(decoding, depth, unfinished, self.room.prompt_tokens)
        work = self.scheduler.schedule(depth, budget)
        for slot in work.set_back:
            self.runner.forget(slot)
        for task in self.scheduler.running:
            self.runner.cache.assign(task.slot, task.pages)
        outputs = self._pass(_sequences(work.decode), depth, work.parts) if work else []
        for sequence, output in outputs:
            self.counts.generated_tokens += len(output.tokens)
            if output.finish_reason is not None:
                self._end(sequence)
        self.counts.step_seconds = time.perf_counter() - begin
        self.counts.step_tokens = sum(len(output.tokens) for _, output in outputs)
        return outputs

    def _pass(self, sequences: list[Sequence], depth: int, parts: list[Part]) -> Outputs:
        """Everything in one pass over the weights: a step of the sequences, and parts of prompts."""
        begin = time.perf_counter()
        most = max((len(sequence.hidden) for sequence in sequences), default=0)
        if sequences and depth:
            drafts = speculative.draft(self.runner, sequences, depth)
        else:
            drafts = [[] for _ in sequences]
        prompts = [part for part in parts if part.start < part.task.prompt_tokens]
        again = [part for part in parts if part.start >= part.task.prompt_tokens]
        short = speculative.rows_of(sequences, drafts)
        for part in again:
            _append(short, part)
        batch = _Prompts.of(prompts, len(short.tokens), self.depth)
        chosen: Chosen | None = [] if any(s.params.routed_experts for s in (*sequences, *batch.sequences)) else None
        wanted = None if batch.wants_all or chosen is not None else [*range(len(short.tokens)), *batch.lasts]
        hidden = self.runner.run(short, batch.chunks, wanted, chosen)
        outputs = []
        num_rows = len(sequences) * (depth + 1)
        if sequences:
            results = speculative.conclude(self.runner, sequences, drafts, hidden[:num_rows], chosen)
            outputs += self._extend(sequences, results, depth)
        row = num_rows
        for part in again:
            speculative.keep_hidden(_of(part), hidden[row : row + part.count], 0)
            self.scheduler.commit(part)
            row += part.count
        outputs += self._finish_parts(batch, hidden, chosen)
        seconds = time.perf_counter() - begin
        for sequence in sequences:
            sequence.decode_seconds += seconds
        for sequence in batch.sequences:
            sequence.prefill_seconds += seconds
        tokens = sum(part.count for part in parts)
        self.counts.prompt_tokens += tokens
        if not tokens and (not depth or most <= depth + 1):  # else it made up for steps without drafts
            self.pace.add_step(len(sequences), depth, seconds)
        elif tokens:
            self.pace.add_part(len(sequences), depth, tokens, seconds)
        return outputs

    def _extend(self, sequences: list[Sequence], results: list[tuple[list[Drawn], int]], depth: int) -> Outputs:
        outputs = []
        for sequence, (drawn, num_drafts) in zip(sequences, results, strict=True):
            sequence.computed += len(drawn)
            output = sequence.extend(drawn, num_drafts)
            kept = min(num_drafts, len(output.tokens))
            sequence.steps += 1
            sequence.drafted += depth
            sequence.accepted += kept
            self._count_drafts(depth, kept)
            outputs.append((sequence, output))
        return outputs

    def _count_drafts(self, depth: int, kept: int) -> None:
        if depth:
            self.pace.add_drafts(depth, kept)
        for k in range(depth):
            self.counts.drafted[k] += 1
            self.counts.accepted[k] += kept > k

    def _finish_parts(self, batch: _Prompts, hidden: Tensor, chosen: Chosen | None) -> Outputs:
        """What parts of prompts give: entries of MTP modules, log-probabilities, and first tokens."""
        if not batch.parts:
            return []
        if batch.wants_all or chosen is not None:
            lasts = hidden[batch.lasts]
            own = hidden[batch.first :]
            if self.depth:
                speculative.fill_prompts(self.runner, batch.sequences, batch.chunks, own, self.depth)
            for sequence, chunk, rows in zip(
                batch.sequences, batch.chunks, own.split([part.count for part in batch.parts]), strict=True
            ):
                if sequence.params.prompt_logprobs is not None and not sequence.completion_tokens:
                    self._describe_prompt(sequence, chunk, rows)
        else:
            lasts = hidden[batch.first :]
        logits = iter(self.runner.logits(lasts)) if len(lasts) else iter(())
        rows_of_experts = iter(batch.lasts)
        outputs = []
        for part, sequence, chunk in zip(batch.parts, batch.sequences, batch.chunks, strict=True):
            self.scheduler.commit(part)
            if chunk.goes_on:
                continue
            self.runner.forget(sequence.slot)
            row, at = next(logits), next(rows_of_experts)
            if not sequence.completion_tokens:  # else it was set back, and has its first token
                token = pick(row, int(row.argmax()), sequence, [])
                experts = experts_of(chosen, at) if sequence.params.routed_experts else None
                outputs.append((sequence, sequence.extend([described(token, row, sequence, [], experts)])))
        return outputs

    def _describe_prompt(self, sequence: Sequence, chunk: Chunk, hidden: Tensor) -> None:
        """Log-probabilities of the prompt's tokens that hidden [T, dim] predict."""
        count = sequence.params.prompt_logprobs
        assert count is not None
        if sequence.prompt_logprobs is None or chunk.start == 0:
            sequence.prompt_logprobs = [None]
        for at, row in enumerate(hidden):
            position = chunk.start + at + 1
            if position < sequence.prompt_tokens:
                own = self.runner.logits(row[None])[0].log_softmax(dim=-1)
                own_logprob = float(own[sequence.tokens[position]])
                sequence.prompt_logprobs.append((own_logprob, likeliest(own, count)))

    def _end(self, sequence: Sequence) -> None:
        assert sequence.finish_reason is not None
        if sequence.is_running:
            self.runner.forget(sequence.slot)
        self.scheduler.remove(sequence)
        self.counts.finished[sequence.finish_reason] = self.counts.finished.get(sequence.finish_reason, 0) + 1


def _of(part: Part) -> Sequence:
    assert isinstance(part.task, Sequence)
    return part.task


def _sequences(tasks: Iterable[object]) -> list[Sequence]:
    return [task for task in tasks if isinstance(task, Sequence)]


def _chunk(part: Part) -> Chunk:
    task = part.task
    end = part.start + part.count
    return Chunk(task.slot, part.start, task.tokens[part.start : end], end < task.prompt_tokens)


def _append(short: Short, part: Part) -> None:
    """Tokens that a sequence had generated before it was set back, the way they were computed then."""
    short.tokens.extend(part.task.tokens[part.start : part.start + part.count])
    short.slots.extend([part.task.slot] * part.count)
    short.positions.extend(range(part.start, part.start + part.count))
