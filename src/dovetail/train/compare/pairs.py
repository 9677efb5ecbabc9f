"""The log of a comparison: one JSON object per pair of steps, and per measurement on held-out text.

A number that is not finite is null there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SideStep:
    """One step of one side. Losses are nats per token of that step's batch, or NaN if they were not finite."""

    tokens: int  # consumed so far, this step included
    loss: float
    mtp: list[float]  # loss of each MTP depth
    skipped: bool  # a loss or gradient was not finite, and the weights stayed as they were
    seconds: float

    @property
    def losses(self) -> list[float]:
        """The main model's loss, and after it that of each MTP depth."""
        return [self.loss, *self.mtp]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The same step of both sides. A side that takes fewer steps has None at the end."""

    seed: int  # of A
    step: int  # counted from 1
    a: SideStep | None
    b: SideStep | None

    @property
    def difference(self) -> float:
        """The difference of the two losses, relative to A's."""
        if self.a is None or self.b is None:
            return math.nan
        return relative(self.a.loss, self.b.loss)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutPair:
    """Both sides measured on one held-out text, after their last step."""

    seed: int
    text: str  # its name
    a: float  # bits per byte
    b: float


Record = Pair | HeldOutPair


def relative(a: float, b: float) -> float:
    return (b - a) / a


def line(record: Record) -> str:
    return json.dumps(_finite(asdict(record)), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_records(path: Path) -> list[Record]:
    """Read all records of a log. A torn last line is left out. Raises ValueError that names a bad line."""
    records = []
    lines = path.read_text("utf-8").splitlines(keepends=True)
    for number, text in enumerate(lines, start=1):
        try:
            records.append(_record(json.loads(text)))
        except (ValueError, TypeError, AttributeError, KeyError):
            if number < len(lines) or text.endswith("\n"):
                raise ValueError(f"{path}: line {number} is not of a comparison: {text[:60]!r}; delete it") from None
    return records


def _record(table: dict[str, Any]) -> Record:
    if "text" in table:
        numbers = {side: math.nan if table[side] is None else table[side] for side in "ab"}
        return HeldOutPair(**{**table, **numbers})
    return Pair(**{**table, **{side: _side(table[side]) for side in "ab" if side in table}})


def _side(table: dict[str, Any] | None) -> SideStep | None:
    if table is None:
        return None
    losses = {"loss": [table["loss"]], "mtp": table["mtp"]}
    loss, mtp = ([math.nan if each is None else each for each in values] for values in losses.values())
    return SideStep(**{**table, "loss": loss[0], "mtp": mtp})


def whole_seeds(records: Iterable[Record], steps: int, texts: Sequence[str]) -> dict[int, list[Record]]:
    """Return the records by seed, of those seeds that have all `steps` and then a measurement on each of `texts`."""
    found: dict[int, list[Record]] = {}
    for record in records:
        found.setdefault(record.seed, []).append(record)
    every = [*range(1, steps + 1), *texts]
    return {
        seed: each
        for seed, each in found.items()
        if [record.step if isinstance(record, Pair) else record.text for record in each] == every
    }
