"""The engine's loop, one step at a time: schedule, decode, compute parts of prompts, hand out tokens.

It belongs to one thread. `llm` runs it for whole calls, `engine` in a thread of its own for requests as they come.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from dovetail.engine import speculative
from dovetail.engine.drawing import draw, likeliest
from dovetail.engine.room import Room, positions_of
from dovetail.engine.scheduling.blocks import BlockPool
from dovetail.engine.scheduling.pace import Pace
from dovetail.engine.scheduling.scheduler import Part, Scheduler, Task
from dovetail.engine.sequence import Sequence
from dovetail.engine.steps.cache import PagedCache
from dovetail.engine.steps.rows import Chunk, Short
from dovetail.engine.steps.runner import Chosen, Runner
from dovetail.engine.stream import Output, Token
from dovetail.model.transformer import Transformer

Outputs = list[tuple[Sequence, Output]]
DESCRIBED = 64  # positions of a prompt whose logits are there at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompts:
    """The parts of prompts in a pass; their rows begin at `first`."""

    parts: list[Part]
    sequences: list[Sequence]
    chunks: list[Chunk]
    first: int
    lasts: list[int]  # the last rows of prompts that end here
    wants_all: bool  # hidden states of all rows

    @property
    def pairs(self) -> list[tuple[Sequence, Chunk]]:
        return list(zip(self.sequences, self.chunks, strict=True))

    @staticmethod
    def of(parts: list[Part], first: int, depth: int) -> _Prompts:
        sequences, chunks = [_sequence(part.task) for part in parts], [_chunk(part) for part in parts]
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
        dtype = torch.float8_e4m3fn if room.is_fp8 else parameter.dtype
        pages = room.num_pages, room.page_size
        cache = PagedCache(
            model.spec, room.sequences, positions_of(room.positions, depth), pages, dtype, parameter.device
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
        output = sequence.abort()
        self._end(sequence)
        return output

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
        for task in work.placed:
            self.runner.cache.assign(task.slot, task.pages)
        outputs = self._pass([_sequence(task) for task in work.decode], depth, work.parts) if work else []
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
        row = len(sequences) * (depth + 1)
        if sequences:
            results = speculative.conclude(self.runner, sequences, drafts, hidden[:row], chosen)
            outputs += self._extend(sequences, results, depth)
        for part in again:
            speculative.keep_hidden(_sequence(part.task), hidden[row : row + part.count], 0)
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

    def _extend(self, sequences: list[Sequence], results: list[list[Token]], depth: int) -> Outputs:
        outputs = []
        for sequence, drawn in zip(sequences, results, strict=True):
            sequence.computed += len(drawn)
            output = sequence.extend(drawn)
            kept = sum(token.is_draft for token in output.tokens)
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
        own = hidden[batch.first :]
        if batch.wants_all or chosen is not None:
            lasts = hidden[batch.lasts]
            self._use_all(batch, own)
        else:
            lasts = own
        for part in batch.parts:
            self.scheduler.commit(part)
        ended = [sequence for sequence, chunk in batch.pairs if not chunk.goes_on]
        outputs = []
        if ended:
            logits = self.runner.logits(lasts)
            for sequence, at, row in zip(ended, batch.lasts, logits, strict=True):
                self.runner.forget(sequence.slot)
                if not sequence.completion_tokens:  # else it was set back, and has its first token
                    drawn = draw(row[None], [int(row.argmax())], sequence, [], chosen, at)
                    outputs.append((sequence, sequence.extend(drawn)))
        return outputs

    def _use_all(self, batch: _Prompts, hidden: Tensor) -> None:
        """What is made of the hidden states of all rows."""
        if self.depth:
            speculative.fill_prompts(self.runner, batch.sequences, batch.chunks, hidden, self.depth)
        sizes = [part.count for part in batch.parts]
        for (sequence, chunk), rows in zip(batch.pairs, hidden.split(sizes), strict=True):
            if sequence.params.prompt_logprobs is not None and not sequence.completion_tokens:
                self._describe_prompt(sequence, chunk, rows)

    def _describe_prompt(self, sequence: Sequence, chunk: Chunk, hidden: Tensor) -> None:
        """Log-probabilities of the prompt's tokens that hidden [T, dim] predict."""
        count = sequence.params.prompt_logprobs
        assert count is not None
        if sequence.prompt_logprobs is None or chunk.start == 0:
            sequence.prompt_logprobs = [None]
        followers = sequence.tokens[chunk.start + 1 : min(chunk.range.stop + 1, sequence.prompt_tokens)]
        for begin in range(0, len(followers), DESCRIBED):
            tokens = followers[begin : begin + DESCRIBED]
            logits = self.runner.logits(hidden[begin : begin + len(tokens)])
            for token, own in zip(tokens, logits.log_softmax(dim=-1), strict=True):
                sequence.prompt_logprobs.append((float(own[token]), likeliest(own, count)))

    def _end(self, sequence: Sequence) -> None:
        assert sequence.finish_reason is not None
        if sequence.is_running:
            self.runner.forget(sequence.slot)
        self.scheduler.remove(sequence)
        self.counts.finished[sequence.finish_reason] = self.counts.finished.get(sequence.finish_reason, 0) + 1


def _sequence(task: Task) -> Sequence:
    assert isinstance(task, Sequence)
    return task


def _chunk(part: Part) -> Chunk:
    task = part.task
    end = part.start + part.count
    return Chunk(task.slot, part.start, task.tokens[part.start : end], end < task.prompt_tokens)


def _append(short: Short, part: Part) -> None:
    """Tokens that a sequence had generated before it was set back, the way they were computed then."""
    short.tokens.extend(part.task.tokens[part.start : part.start + part.count])
    short.slots.extend([part.task.slot] * part.count)
    short.positions.extend(range(part.start, part.start + part.count))
