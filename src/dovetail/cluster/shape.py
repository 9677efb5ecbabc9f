"""What a cluster inside one machine is made of, as a user gives it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dovetail import threads

RATES = {"kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8}  # bytes per second
TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
SLOWEST, FASTEST = 1e5 / 8, 1e11 / 8  # bytes per second; nothing ends below, and no CPU keeps up above
LONGEST = 1.0  # seconds of latency
MOST_NODES, MOST_RANKS = 64, 64  # of one node; each rank is a process on the same cores
_QUANTITY = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]+)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    nodes: int
    ranks: int  # of each node
    nic: float  # bytes per second of each node's link, in each direction
    latency: float = 0.0  # seconds from one node to another, beside those that the bytes take

    def __post_init__(self) -> None:
        for name, count, most in (("nodes", self.nodes, MOST_NODES), ("ranks", self.ranks, MOST_RANKS)):
            if not 1 <= count <= most:
                raise ValueError(f"--{name} {count}: give 1 to {most}")

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks

    @property
    def threads(self) -> int:
        """Threads of each rank: its share of this machine's cores, or of OMP_NUM_THREADS, and at least one."""
        return max(1, threads.num_threads() // self.world_size)


def parse_rate(text: str) -> float:
    """Return bytes per second. Raises ValueError for anything but 0.1 Mbit to 100 Gbit (per second)."""
    rate = _quantity(text, RATES, "--nic", "a rate in bits per second, such as 200Mbit or 1Gbit")
    if not SLOWEST <= rate <= FASTEST:
        raise ValueError(f"--nic {text!r}: give 100kbit to 100Gbit")
    return rate


def parse_latency(text: str) -> float:
    """Return seconds. Raises ValueError for anything but 0 to one second, with its unit."""
    latency = _quantity(text, TIMES, "--latency", "a time, such as 0.2ms or 50us")
    if latency > LONGEST:
        raise ValueError(f"--latency {text!r}: give at most {LONGEST:g}s")
    return latency


def _quantity(text: str, units: dict[str, float], option: str, expected: str) -> float:
    match = _QUANTITY.fullmatch(text)
    unit = match and match[2].lower()
    if not match or unit not in units:
        raise ValueError(f"{option} {text!r}: expected {expected}")
    return float(match[1]) * units[unit]
