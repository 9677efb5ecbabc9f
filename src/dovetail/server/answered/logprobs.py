"""Log-probabilities, tokens and their experts, as each endpoint writes them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from dovetail.engine.stream import Token
from dovetail.text.tokenizer import Tokenizer

_LEAST = -9999.0  # stands for minus infinity, which JSON does not have
PromptLogprobs = Sequence[tuple[float, tuple[tuple[int, float], ...]] | None]


class TokenNames:
    """How single tokens are written."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False) -> None:
        self.tokenizer, self.as_ids = tokenizer, as_ids

    def data(self, token_id: int) -> bytes:
        """Return the bytes of a token; a special one has those of its name."""
        pieces = self.tokenizer.piece_bytes
        if pieces is not None and token_id < len(pieces) and pieces[token_id]:
            return pieces[token_id]
        if pieces is None:
            return self.tokenizer.decode([token_id]).encode()
        return (self.tokenizer.backend.id_to_token(token_id) or "").encode()

    def name(self, token_id: int) -> str:
        r"""Return its text; half a character is written as OpenAI writes it ("bytes:\xe4\xb8")."""
        if self.as_ids:
            return f"token_id:{token_id}"
        data = self.data(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def length(self, token_id: int) -> int:
        """Return how many characters begin in the token; one without text, such as a special one, has none."""
        pieces = self.tokenizer.piece_bytes
        if pieces is None:
            return len(self.tokenizer.decode([token_id]))
        data = pieces[token_id] if token_id < len(pieces) else b""
        return sum(byte & 0xC0 != 0x80 for byte in data)


def _number(logprob: float | None) -> float | None:
    if logprob is None:
        return None
    return logprob if math.isfinite(logprob) else _LEAST


def for_chat(tokens: Iterable[Token], names: TokenNames, count: int) -> dict[str, Any]:
    """Return the `logprobs` of a chat choice, with the `count` likeliest tokens of each position."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": names.name(token_id),
            "logprob": _number(logprob),
            "bytes": list(names.data(token_id)),
        }

    rows = [
        {**entry(token.id, token.logprob), "top_logprobs": [entry(*each) for each in token.top[:count]]}
        for token in tokens
    ]
    return {"content": rows, "refusal": None}


def for_completion(
    rows: Iterable[tuple[int, float | None, Sequence[tuple[int, float]] | None]],
    names: TokenNames,
    count: int,
    offset: int,
) -> dict[str, Any]:
    """Return the `logprobs` of a completion from (id, log-probability, likeliest) of each token.

    Beside the `count` likeliest, the token itself is always in its map. `offset` is the characters before the first.
    """
    written: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token_id, logprob, top in rows:
        own = {names.name(token_id): _number(logprob)}
        likeliest = None if top is None else {names.name(each): _number(value) for each, value in top[:count]}
        written["tokens"].append(names.name(token_id))
        written["token_logprobs"].append(_number(logprob))
        written["top_logprobs"].append(None if likeliest is None else {**likeliest, **own})
        written["text_offset"].append(offset)
        offset += names.length(token_id)
    return written


def for_prompt(prompt: Sequence[int], logprobs: PromptLogprobs, names: TokenNames, count: int) -> list[Any]:
    """Return vLLM's `prompt_logprobs`: for each token a map from ids to log-probabilities; None for the first."""
    rows: list[dict[str, Any] | None] = []
    for token_id, row in zip(prompt, logprobs, strict=True):
        if row is None:
            rows.append(None)
            continue
        top: dict[int, tuple[float, int | None]] = {}
        top |= {each: (value, rank) for rank, (each, value) in enumerate(row[1][:count], start=1)}
        top.setdefault(token_id, (row[0], None))
        rows.append(
            {
                str(each): {"logprob": _number(value), "rank": rank, "decoded_token": names.name(each)}
                for each, (value, rank) in top.items()
            }
        )
    return rows


def details(tokens: Iterable[Token]) -> list[dict[str, Any]]:
    """Return what only this engine tells of each token."""
    return [
        {
            "id": token.id,
            "text": token.text,
            "logprob": _number(token.logprob),
            "sampler_logprob": _number(token.sampler_logprob),
            "is_draft": token.is_draft,
            "experts": token.experts,
        }
        for token in tokens
    ]
