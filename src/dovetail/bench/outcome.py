"""What became of one request: when its tokens came, how many, and what went wrong."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Counting = Literal["usage of every chunk", "usage at the end", "one token a chunk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One request as it went. Times are seconds after the measurement's start.

    `chunks` are those that brought tokens: when each came, and its tokens. A server that puts usage into every chunk
    says these exactly. Where usage comes only at the end, the answer's tokens are divided evenly among its chunks;
    where there is none, a chunk is taken for one token. `counting` says which of these it was.
    """

    index: int
    arrival: float | None  # when it was to be sent; None: as soon as a place was free
    sent: float
    end: float
    input_tokens: int  # asked for
    output_tokens: int  # asked for
    prompt_tokens: int | None  # as the server counted them
    cached_tokens: int | None  # of the prompt, from the server's prefix cache, if it says so
    chunks: tuple[tuple[float, float], ...]
    counting: Counting
    finish_reason: str | None
    error: str | None  # its kind; None if all went well
    message: str  # what the server or the system said of the error

    @property
    def generated_tokens(self) -> float:
        return sum(tokens for _, tokens in self.chunks)

    @property
    def first_token_seconds(self) -> float:
        """From sending to the first token; there has to be one."""
        return self.chunks[0][0] - self.sent

    @property
    def whole_seconds(self) -> float:
        return self.end - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between chunks."""
        return [later - earlier for (earlier, _), (later, _) in pairwise(self.chunks)]

    @property
    def token_seconds(self) -> list[tuple[float, float]]:
        """Inter-token latencies: (seconds per token, tokens) of every chunk after the first.

        A chunk of k tokens that came g seconds after the one before counts as k latencies of g / k.
        """
        tokens = [tokens for _, tokens in self.chunks[1:]]
        return [(gap / count, count) for gap, count in zip(self.gaps, tokens, strict=True)]

    @property
    def mean_token_seconds(self) -> float:
        """Mean of the inter-token latencies; 0 where all tokens came at once."""
        tokens = sum(count for _, count in self.chunks[1:])
        return (self.chunks[-1][0] - self.chunks[0][0]) / tokens if tokens else 0.0
