"""The engine's loop, one step at a time: schedule, decode, compute parts of prompts, hand out tokens.

It belongs to one thread. `llm` runs it for whole calls, `engine` in a thread of its own for requests as they come.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dovetail.engine import speculative
from dovetail.engine.drawing import described, experts_of, likeliest, pick
from dovetail.engine.pace import Pace
from dovetail.engine.scheduling.blocks import BlockPool
from dovetail.engine.scheduling.scheduler import Part, Scheduler
from dovetail.engine.sequence import Sequence
from dovetail.engine.steps.cache import PagedCache
from dovetail.engine.steps.prompts import Chunk
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
        cache = PagedCache(
            model.spec, room.sequences, capacity, room.num_pages, room.page_size, parameter.dtype, parameter.device
        )
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
        depth = self.depth
        if self.is_auto and depth and decoding:
            depth = self.pace.depth(decoding, depth)
        budget = self.pace.part(decoding, depth, self.room.prompt_tokens)
        work = self.scheduler.schedule(depth, budget)
        for slot in work.set_back:
            self.runner.forget(slot)
        for task in self.scheduler.running:
            self.runner.cache.assign(task.slot, task.pages)
        outputs = self._decode(_sequences(work.decode), depth) if work.decode else []
        outputs += self._compute(work.parts)
        for sequence, output in outputs:
            self.counts.generated_tokens += len(output.tokens)
            if output.finish_reason is not None:
                self._end(sequence)
        self.counts.step_seconds = time.perf_counter() - begin
        self.counts.step_tokens = sum(len(output.tokens) for _, output in outputs)
        return outputs

    def _decode(self, sequences: list[Sequence], depth: int) -> Outputs:
        begin = time.perf_counter()
        most = max(len(sequence.hidden) for sequence in sequences)
        results = speculative.step(self.runner, sequences, depth)
        seconds = time.perf_counter() - begin
        if most <= depth + 1:  # else it made up for steps without drafts
            self.pace.add_step(len(sequences), depth, seconds)
        outputs = []
        for sequence, (drawn, num_drafts) in zip(sequences, results, strict=True):
            sequence.computed += len(drawn)
            output = sequence.extend(drawn, num_drafts)
            sequence.steps += 1
            sequence.drafted += depth
            sequence.decode_seconds += seconds
            kept = min(num_drafts, len(output.tokens))
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

    def _compute(self, parts: list[Part]) -> Outputs:
        prompts = [part for part in parts if part.start < _of(part).prompt_tokens]
        outputs = self._prompts(prompts) if prompts else []
        for part in parts:
            if part.start >= _of(part).prompt_tokens:
                self._again(part)
        return outputs

    def _again(self, part: Part) -> None:
        """Tokens that a sequence had generated before it was set back, the way they were computed then."""
        sequence = _of(part)
        positions = list(range(part.start, part.start + part.count))
        tokens = sequence.tokens[part.start : part.start + part.count]
        rows = (
            torch.tensor(each, device=self.runner.device) for each in (tokens, [sequence.slot] * part.count, positions)
        )
        speculative.keep_hidden(sequence, self.runner.step(*rows), 0)
        self.scheduler.commit(part)

    def _prompts(self, parts: list[Part]) -> Outputs:
        begin = time.perf_counter()
        sequences = [_of(part) for part in parts]
        chunks = [_chunk(part) for part in parts]
        ends = torch.tensor([part.count for part in parts]).cumsum(0).tolist()
        lasts = [end - 1 for end, chunk in zip(ends, chunks, strict=True) if not chunk.goes_on]
        wants_all = self.depth > 0 or any(sequence.params.prompt_logprobs is not None for sequence in sequences)
        chosen: Chosen | None = [] if any(sequence.params.routed_experts for sequence in sequences) else None
        hidden = self.runner.prompt(chunks, None if wants_all or chosen is not None else lasts, chosen)
        if self.depth:
            speculative.fill_prompts(self.runner, sequences, chunks, hidden, self.depth)
        if len(hidden) == len(lasts):
            rows = list(range(len(lasts)))
        else:
            rows = lasts
        for sequence, chunk, end in zip(sequences, chunks, ends, strict=True):
            if sequence.params.prompt_logprobs is not None and not sequence.completion_tokens:
                self._describe_prompt(sequence, chunk, hidden[end - len(chunk.tokens) : end])
        logits = self.runner.logits(hidden[rows]) if rows else hidden[:0]
        outputs = []
        number = 0
        seconds = time.perf_counter() - begin
        for part, sequence, chunk, end in zip(parts, sequences, chunks, ends, strict=True):
            self.scheduler.commit(part)
            sequence.prefill_seconds += seconds
            if chunk.goes_on:
                continue
            self.runner.forget(sequence.slot)
            row, number = logits[number], number + 1
            if sequence.completion_tokens:  # it was set back, and has its first token
                continue
            token = pick(row, int(row.argmax()), sequence, [])
            experts = experts_of(chosen, end - 1) if sequence.params.routed_experts else None
            outputs.append((sequence, sequence.extend([described(token, row, sequence, [], experts)])))
        self.counts.prompt_tokens += ends[-1]
        self.pace.add_prompt(ends[-1], time.perf_counter() - begin)
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
