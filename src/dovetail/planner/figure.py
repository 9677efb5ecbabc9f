"""A number of a plan with its band, unit, formula, inputs and sources."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dovetail.config import near_matches
from dovetail.spec.band import Band


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One input of a formula: a figure, or a value with its source."""

    name: str
    value: str
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number. `key` is the name that --explain takes; `band` is in `unit`."""

    key: str
    title: str
    band: Band
    unit: str
    formula: str
    inputs: tuple[Input, ...] = ()

    @property
    def text(self) -> str:
        """The value with its unit, as it is printed."""
        return f"{number(self.band.value)} {self.unit}".rstrip()

    @property
    def interval(self) -> str:
        if self.band.low == self.band.high:
            return "exact"
        return f"{number(self.band.low)} to {number(self.band.high)}"


def number(value: float) -> str:
    """Return four digits, with thousands separated."""
    if value and abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def find_figure(figures: Sequence[Figure], key: str) -> Figure:
    """Return the figure `key`. Raises ValueError with near matches for a key that no figure has."""
    for figure in figures:
        if figure.key == key:
            return figure
    raise ValueError(f"no figure {key!r} to explain; {near_matches(key, (figure.key for figure in figures))}")


def explanation(figure: Figure) -> Iterable[str]:
    """Yield the lines that `--explain` prints."""
    yield f"{figure.title} ({figure.key}): {figure.text} ({figure.interval})"
    yield f"  = {figure.formula}"
    for each in figure.inputs:
        yield f"  {each.name} = {each.value}" + (f"  [{each.source}]" if each.source else "")
