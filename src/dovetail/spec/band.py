"""A number with the interval it is expected in, and arithmetic with such numbers.

Intervals are carried through as worst cases: a sum is as wide as its parts together. That is right where the parts
share a cause (the same efficiency, the same link), as they mostly do here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Band:
    """`value` is the prediction; the truth is expected between `low` and `high`. All three have the same unit."""

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        assert self.low <= self.value <= self.high, f"low <= value <= high does not hold for {self}"

    @staticmethod
    def exact(value: float) -> Band:
        return Band(value, value, value)

    def __add__(self, other: Band | float) -> Band:
        if isinstance(other, Band):
            return Band(self.value + other.value, self.low + other.low, self.high + other.high)
        return Band(self.value + other, self.low + other, self.high + other)

    __radd__ = __add__

    def __sub__(self, other: Band | float) -> Band:
        if isinstance(other, Band):
            return Band(self.value - other.value, self.low - other.high, self.high - other.low)
        return Band(self.value - other, self.low - other, self.high - other)

    def __rsub__(self, other: float) -> Band:
        return Band(other - self.value, other - self.high, other - self.low)

    def __mul__(self, other: Band | float) -> Band:
        """Multiply; the other factor must not be negative."""
        if isinstance(other, Band):
            assert other.low >= 0, f"a band is multiplied by a negative one: {other}"
            # A negative lower end gets lowest with the largest factor.
            low = self.low * (other.low if self.low >= 0 else other.high)
            high = self.high * (other.high if self.high >= 0 else other.low)
            return Band(self.value * other.value, low, high)
        assert other >= 0, f"a band is multiplied by a negative number: {other}"
        return Band(self.value * other, self.low * other, self.high * other)

    __rmul__ = __mul__

    def __truediv__(self, other: Band | float) -> Band:
        """Divide; the divisor must be positive."""
        if isinstance(other, Band):
            return self * other.inverse()
        assert other > 0, f"a band is divided by {other}"
        return Band(self.value / other, self.low / other, self.high / other)

    def __rtruediv__(self, other: float) -> Band:
        return self.inverse() * other

    def inverse(self) -> Band:
        """Return 1 / self; all of self must be positive."""
        assert self.low > 0, f"the inverse of {self} is not bounded"
        return Band(1 / self.value, 1 / self.high, 1 / self.low)

    def widened(self, factor: float) -> Band:
        """Return the same value with `low` divided and `high` multiplied by `factor`, which is at least 1."""
        assert factor >= 1, f"a band is widened by {factor}"
        return Band(self.value, self.low / factor, self.high * factor)


def spread(value: float, low_factor: float, high_factor: float) -> Band:
    """Return `value` with its ends at these multiples of it: spread(10, 0.9, 1.2) is 10 (9 to 12)."""
    return Band(value, value * low_factor, value * high_factor)


def sum_bands(bands: Iterable[Band]) -> Band:
    """Return the sum, which is exactly 0 without bands."""
    value = low = high = 0.0
    for band in bands:
        value, low, high = value + band.value, low + band.low, high + band.high
    return Band(value, low, high)


def largest(*bands: Band) -> Band:
    """Return the largest of at least one band, which is the time of several things that run at once."""
    assert bands, "the largest of no bands"
    return Band(max(b.value for b in bands), max(b.low for b in bands), max(b.high for b in bands))
