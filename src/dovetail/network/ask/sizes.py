"""Reads sizes with units, and lists of values, as `--size` and `--sweep` take them."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
MOST_SIZE = 2.0**60  # bytes; times and shares are still far from overflow
MOST_CASES = 64  # in one sweep, or in two that are combined
_SIZE = re.compile(r"\s*([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> float:
    """Return bytes. Raises ValueError for a missing or unknown unit, and for a size other than 0 or 1 to 2^60 bytes."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise ValueError(f"size {text!r}: expected a number and a unit, such as 64MiB")
    number, unit = match.groups()
    if not unit:
        raise ValueError(f"size {text!r} has no unit: write {number}B, {number}KiB, {number}MiB or {number}GiB")
    if unit not in UNITS:
        same = [name for name in UNITS if name.lower() in (unit.lower(), f"{unit}b".lower(), f"{unit}ib".lower())]
        remedy = f"did you mean {' or '.join(same)}?" if same else f"known: {', '.join(UNITS)}"
        raise ValueError(f"size {text!r}: unknown unit {unit!r}; {remedy}")
    try:
        size = float(number) * UNITS[unit]
    except ValueError:
        raise ValueError(f"size {text!r}: {number!r} is not a number") from None
    if size and not 1 <= size <= MOST_SIZE:
        raise ValueError(f"size {text!r}: use 0B, or 1B to {MOST_SIZE / 2**30:.0f}GiB")
    return size


def parse_count(text: str, what: str) -> int:
    """Return a whole number. Raises ValueError, naming `what`, for any other text."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{what}: {text!r} is not a whole number") from None


def parse_values(sweep: str, text: str, read: Callable[[str], float]) -> list[float]:
    """Return the values of "1MiB,64MiB" one by one, or those of "1MiB..1GiB" in doublings.

    Raises ValueError, naming `sweep`, for an empty range and for more than 64 values, and as `read` does.
    """
    low, dots, high = text.partition("..")
    if not dots:
        values = [read(each) for each in text.split(",") if each.strip()]
    else:
        first, last = read(low), read(high)
        if not 0 < first <= last:
            raise ValueError(f"--sweep {sweep}: expected a rising range that starts above 0, such as 1MiB..1GiB")
        count = int(np.log2(last / first) + 1e-9) + 1
        values = [first * 2**step for step in range(min(count, MOST_CASES + 1))]
    if not values:
        raise ValueError(f"--sweep {sweep!r} is empty: give values, such as 1MiB,64MiB, or a range, such as 1MiB..1GiB")
    if len(values) > MOST_CASES:
        raise ValueError(f"--sweep {sweep}: {len(values)} cases or more; give 1 to {MOST_CASES}")
    return values
