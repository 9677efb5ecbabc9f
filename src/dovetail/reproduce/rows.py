"""A published number beside ours, and the verdict on the two.

    exact       Ours is counted or follows by arithmetic, so it has to give the printed digits. If it starts from
                numbers that are themselves printed with few digits, its band is what their rounding leaves open, and
                some value in the band has to give the digits.
    predicted   Ours comes from measurements of single operations, with their band. Its value has to be within the
                target, whatever the band.

A row without a published number is there for comparison with others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dovetail.spec.band import Band

Printed = Literal["rounded", "cut off", "to hundreds"]  # how the paper shortened its digits
Verdict = Literal["exact", "yes", "yes, in hindsight", "paper inconsistent", "NO", "MISSED", ""]
SLACK = 1e-9  # relative rounding error of sums in floating point


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One number. `paper` has the printed digits, "20 to 22" for a range, or "" for none. `within` is the target of a
    prediction, such as "5 %" or "2 points", or None for a row that has to be exact."""

    subject: str
    quantity: str
    ours: Band
    source: str
    paper: str = ""
    printed: Printed = "rounded"
    within: str | None = None
    is_inconsistent: bool = False  # the paper contradicts itself here; `note` says how
    is_hindsight: bool = False  # it depends on an effect that was added after this number had been missed
    note: str = ""
    cause: str = ""  # the likely cause of a miss

    @property
    def published(self) -> tuple[float, float]:
        """The ends of the published range, which are the same for a single number."""
        ends = [float(end) for end in self.paper.split(" to ")]
        return ends[0], ends[-1]

    @property
    def is_in_points(self) -> bool:
        return self.within is not None and self.within.endswith("points")

    @property
    def difference(self) -> float | None:
        """The difference to the nearer published end, relative or in points; None if nothing is published."""
        if not self.paper:
            return None
        low, high = self.published
        nearest = min(max(self.ours.value, low), high)
        return self.ours.value - nearest if self.is_in_points else self.ours.value / nearest - 1

    @property
    def gives_digits(self) -> bool:
        """Whether some value in our band, rounded as in the paper, gives the printed digits."""
        low, high = self.published
        unit = 100.0 if self.printed == "to hundreds" else 10.0 ** -len(self.paper.partition(".")[2])
        below, above = (0.0, unit) if self.printed == "cut off" else (unit / 2, unit / 2)
        slack = SLACK * abs(self.ours.value)
        return low - below <= self.ours.high + slack and self.ours.low <= high + above + slack

    @property
    def is_in_band(self) -> bool:
        """Whether the published number is in our band, which is not a target."""
        low, high = self.published
        return low <= self.ours.high and self.ours.low <= high

    @property
    def is_reproduced(self) -> bool:
        """Whether ours gives the published number; True if none is published.

        It is False if the paper contradicts itself and ours agrees with its other number.
        """
        if self.difference is None:
            return True
        if self.within is None:
            return self.gives_digits
        limit = float(self.within.split()[0])
        return abs(self.difference) <= (limit if self.is_in_points else limit / 100)

    @property
    def verdict(self) -> Verdict:
        if not self.paper:
            return ""
        if self.within is not None:
            met: Verdict = "yes, in hindsight" if self.is_hindsight else "yes"
            return met if self.is_reproduced else "MISSED"
        if self.is_inconsistent:
            return "paper inconsistent"
        return "exact" if self.is_reproduced else "NO"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table that `dovetail reproduce` knows by `name`. `remarks` come with our numbers, notes with the rows."""

    name: str
    title: str
    source: str
    rows: tuple[Row, ...]
    remarks: tuple[str, ...] = ()

    @property
    def is_reproduced(self) -> bool:
        """Whether every row is reproduced, except those where the paper contradicts itself."""
        return all(row.is_reproduced or row.is_inconsistent for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Our numbers by (subject, quantity), and the remarks on them."""

    values: Mapping[tuple[str, str], Band]
    remarks: tuple[str, ...] = ()


def rounded(value: float, unit: float) -> Band:
    """Return a printed number with the band that its rounding to multiples of `unit` leaves open."""
    return Band(value, value - unit / 2, value + unit / 2)
