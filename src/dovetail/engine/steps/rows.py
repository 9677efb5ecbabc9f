"""What is computed in one pass: rows, each one position of one slot of the cache.

Short rows come first: the newest token of a sequence and the drafts after it, as many for each. Then come chunks of
prompts.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chunk:
    """Positions start .. start + len(tokens) - 1 of a slot."""

    slot: int
    start: int
    tokens: list[int]
    goes_on: bool = False  # more of the prompt is to come

    @property
    def range(self) -> range:
        return range(self.start, self.start + len(self.tokens))


@dataclass(frozen=True, slots=True)
class Short:
    """Rows of any slots; those of one slot are adjacent, and their positions ascend by one."""

    tokens: list[int]
    slots: list[int]
    positions: list[int]


NONE = Short([], [], [])


def joined(short: Short, chunks: list[Chunk]) -> Short:
    """Tokens, slots and positions of all rows of a pass."""
    return Short(
        [*short.tokens, *(token for chunk in chunks for token in chunk.tokens)],
        [*short.slots, *(chunk.slot for chunk in chunks for _ in chunk.tokens)],
        [*short.positions, *(position for chunk in chunks for position in chunk.range)],
    )
