"""The log of a comparison: one JSON object per pair of steps.

A loss that is not finite is null there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One step of both models. Losses are nats per token on the same batch, MTP apart; NaN where not finite."""

    seed: int
    step: int  # counted from 1
    tokens: int  # consumed by each model, this step included
    base_loss: float
    loss: float  # of the recipe that is held against the base
    base_skipped: bool  # a loss or gradient was not finite, and the weights stayed as they were
    skipped: bool
    base_seconds: float
    seconds: float

    @property
    def difference(self) -> float:
        """Of the losses, relative to the base's."""
        return (self.loss - self.base_loss) / self.base_loss


def line(pair: Pair) -> str:
    record = {name: None if math.isnan(value) else value for name, value in asdict(pair).items()}
    return json.dumps(record, allow_nan=False) + "\n"


def read_pairs(path: Path) -> list[Pair]:
    """All pairs of a log in order; a torn last line is left out. Raises ValueError naming a bad line."""
    pairs = []
    lines = path.read_text("utf-8").splitlines(keepends=True)
    for number, text in enumerate(lines, start=1):
        try:
            pairs.append(_pair(json.loads(text)))
        except (ValueError, TypeError, AttributeError):
            if number < len(lines) or text.endswith("\n"):
                raise ValueError(f"{path}: line {number} is not of a comparison: {text[:60]!r}; delete it") from None
    return pairs


def _pair(record: dict[str, Any]) -> Pair:
    fields: dict[str, Any] = {name: math.nan if value is None else value for name, value in record.items()}
    return Pair(**fields)


def whole_seeds(pairs: Iterable[Pair], num_steps: int) -> dict[int, list[Pair]]:
    """Pairs by seed, of the seeds that have steps 1 to `num_steps` and no others."""
    found: dict[int, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(pair.seed, []).append(pair)
    every = list(range(1, num_steps + 1))
    return {seed: each for seed, each in found.items() if [pair.step for pair in each] == every}
