"""Reads numbers as people write them: "14.8T" is 1.48e13."""

from __future__ import annotations

UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def amount(text: str, name: str) -> float:
    """Return "14.8T", "2.5B", "4,096" or "1e12" as a number above 0. Raises ValueError that opens with `name`."""
    digits = text.strip().replace(",", "").replace("_", "")
    unit = UNITS.get(digits[-1:].upper(), 0.0)
    try:
        value = float(digits[:-1]) * unit if unit else float(digits)
    except ValueError:
        raise ValueError(f"{name} {text}: expected a number, such as 4096, 14.8T, 2.5B or 1e12") from None
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} {text}: expected more than 0, and a finite number")
    return value


def whole(text: str, name: str) -> int:
    """Return such a text as a whole number. Raises ValueError likewise."""
    value = amount(text, name)
    if value != int(value):
        raise ValueError(f"{name} {text}: expected a whole number; nearest: {round(value)}")
    return int(value)
