"""The answer of POST /v1/completions, streamed or whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from dovetail.engine.stream import Token
from dovetail.server.answered.choice import Choice, Piece, PlainText
from dovetail.server.answered.chunks import ChunkWriter
from dovetail.server.answered.events import event
from dovetail.server.answered.logprobs import for_completion, for_prompt
from dovetail.server.asked.completion import CompletionRequest, Prompt
from dovetail.server.asked.sampling import to_params
from dovetail.server.errors import ApiError
from dovetail.server.served import Served
from dovetail.server.work import Job, Work


def to_tokens(served: Served, prompt: Prompt, *, adds_special: bool) -> list[int]:
    """Return the tokens of a prompt; text goes behind the beginning-of-sequence token. Raises ApiError (400)."""
    if not isinstance(prompt, str):
        return prompt
    served.check_length(prompt, "prompt")
    tokenizer = served.tokenizer
    start = [tokenizer.bos_id] if adds_special and tokenizer.bos_id is not None else []
    try:
        return [*start, *tokenizer.encode(prompt)]
    except ValueError as error:
        raise ApiError(400, f"prompt: {error}", param="prompt") from None


class CompletionAnswer(ChunkWriter):
    """Writes chunks, or the whole."""

    def __init__(self, served: Served, asked: CompletionRequest, seed: int) -> None:
        served.check_model(asked.model)
        super().__init__(served, asked, "cmpl", "text_completion")
        self.asked = asked
        self.is_scored = asked.logprobs is not None or asked.draws > asked.n
        seed = seed if asked.seed is None else asked.seed
        self.jobs = [self._job(served, prompt, seed + i * asked.draws) for i, prompt in enumerate(asked.prompt)]
        self.offsets = dict[int, int]()  # characters sent of each choice

    def _job(self, served: Served, prompt: Prompt, seed: int) -> Job:
        asked = self.asked
        of_prompt = asked.prompt_logprobs
        if asked.echo and asked.logprobs is not None:
            of_prompt = max(asked.logprobs, of_prompt or 0)
        drawn = asked.model_copy(update={"n": asked.draws, "prompt_logprobs": of_prompt, "seed": seed})
        params = to_params(
            drawn,
            served.defaults,
            seed,
            max_tokens=max(asked.max_tokens, 1),  # to score a prompt alone, a token is drawn and left out
            logprobs=(asked.logprobs or 0) if self.is_scored or self.shows_tokens else None,
            grammar=asked.grammar(),
        )
        return Job(
            prompt=to_tokens(served, prompt, adds_special=asked.add_special_tokens),
            params=params,
            parsers=[PlainText() for _ in params],
            priority=asked.priority,
            keeps_tokens=self.is_scored or self.shows_tokens or asked.return_token_ids,
        )

    def piece(self, work: Work, index: int, piece: Piece) -> bytes:
        """Return the chunk of one step of one choice."""
        text = "".join(delta.content for delta in piece.deltas)
        is_first = index not in self.offsets
        offset = self.offsets.get(index, 0)
        of_tokens = self._of_tokens(piece.tokens, offset)
        self.offsets[index] = offset + sum(self.names.length(token.id) for token in piece.tokens)
        if is_first and self.asked.echo:
            text = self._echo(index) + text
        if not text and not of_tokens and piece.finish_reason is None:
            return b""
        choice = {"index": index, "text": text, "logprobs": None, **of_tokens}
        if is_first and self.asked.return_token_ids:
            choice["prompt_token_ids"] = list(self.jobs[index // self.asked.draws].prompt)
        choice |= {"finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}
        return event(self.chunk(work, choice))

    def whole(self, work: Work) -> dict[str, Any]:
        """Return the answer as one object."""
        choices = [self._whole_choice(work, position, index) for position, index in enumerate(self._kept(work.choices))]
        usage = work.usage()
        if self.asked.max_tokens == 0:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return {**self.common(self.kind), "choices": choices, "usage": usage}

    def _kept(self, choices: Sequence[Choice]) -> Iterator[int]:
        """Yield the choices that are given back: of each prompt the `n` with the largest mean log-probability."""
        draws = self.asked.draws
        for start in range(0, len(choices), draws):
            group = range(start, start + draws)
            yield from (
                group if draws == self.asked.n else sorted(group, key=lambda i: -_score(choices[i]))[: self.asked.n]
            )

    def _whole_choice(self, work: Work, position: int, index: int) -> dict[str, Any]:
        asked, choice = self.asked, work.choices[index]
        job, stream = self.jobs[index // asked.draws], work.streams[index]
        tokens = choice.tokens if asked.max_tokens else []
        echo = self._echo(index) if asked.echo else ""
        written: dict[str, Any] = {
            "index": position,
            "text": echo + "".join(choice.content if asked.max_tokens else ()),
            "logprobs": None,
        }
        rows: list[Any] = []
        if asked.echo and asked.logprobs is not None:
            scores = stream.prompt_logprobs or ()
            rows = [(token, *(row or (None, None))) for token, row in zip(job.prompt, scores, strict=True)]
        if tokens:
            written |= self._of_tokens(tokens, 0)
        if asked.logprobs is not None:
            rows += [(token.id, token.logprob, token.top) for token in tokens]
            written["logprobs"] = for_completion(rows, self.names, asked.logprobs, 0)
        if asked.return_token_ids:
            written["prompt_token_ids"] = list(job.prompt)
        if asked.prompt_logprobs is not None:
            scores = stream.prompt_logprobs or ()
            written["prompt_logprobs"] = for_prompt(job.prompt, scores, self.names, asked.prompt_logprobs)
        reason = choice.finish_reason if asked.max_tokens else "length"
        return written | {"finish_reason": reason, "stop_reason": choice.stop_reason if asked.max_tokens else None}

    def _of_tokens(self, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        found = self.of_tokens(tokens)
        if tokens and self.asked.logprobs is not None:
            rows = [(token.id, token.logprob, token.top) for token in tokens]
            found["logprobs"] = for_completion(rows, self.names, self.asked.logprobs, offset)
        return found

    def _echo(self, index: int) -> str:
        prompt = self.asked.prompt[index // self.asked.draws]
        tokenizer = self.served.tokenizer
        if isinstance(prompt, str):
            return prompt
        return tokenizer.decode(token for token in prompt if token < tokenizer.vocab_size)  # a model may have more rows


def _score(choice: Choice) -> float:
    scores = [token.logprob for token in choice.tokens if token.logprob is not None]
    return sum(scores) / len(scores) if scores else -math.inf
