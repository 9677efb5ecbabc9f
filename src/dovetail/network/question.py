"""What a user asks of a network: sizes with units, how many GPUs, which routing, what fails, and what is swept."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dovetail.catalog.fabrics import load_fabric
from dovetail.config import near_matches
from dovetail.network.demands import COLLECTIVES
from dovetail.network.failures import parse_failure, random_links
from dovetail.network.routing import Adaptive, Ecmp, Policy, Static
from dovetail.network.simulation import Change
from dovetail.network.topology import Fabric, build

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
ROUTINGS = ("adaptive", "ecmp", "static")
_SIZE = re.compile(r"\s*([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")
_SWEEP_LIMIT = 64  # cases


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One collective on one fabric or several, for each of `sizes` and `gpu_counts`; lists of one are no sweep."""

    fabrics: tuple[str, ...]  # of the catalog, or .toml files
    collective: str = "all-to-all"
    sizes: tuple[float, ...]  # bytes
    gpu_counts: tuple[int | None, ...] = (None,)  # None: all that the fabric has
    routing: str = "adaptive"
    queue_pairs: int = 1
    channels: int | None = None  # rings side by side; None: one for each NIC of a node
    seed: int = 0  # of ECMP's hash and of what fails at random
    failures: tuple[str, ...] = ()
    random_failures: tuple[str, ...] = ()  # such as 1%
    trials: int = 1  # of random failures, with seed, seed + 1, ...
    reroute_seconds: float = 0.0  # from a failure until routes avoid it
    endpoints: int | None = None  # build the fabrics for so many GPUs; None: as in the catalog

    def __post_init__(self) -> None:
        """Raises ValueError, one line, for what no fabric could make right."""
        if not self.fabrics:
            raise ValueError("no fabric: give --fabric once or more")
        if self.collective not in COLLECTIVES:
            raise ValueError(f"no collective {self.collective!r}; {near_matches(self.collective, COLLECTIVES)}")
        if self.routing not in ROUTINGS:
            raise ValueError(f"no routing {self.routing!r}; {near_matches(self.routing, ROUTINGS)}")
        if self.queue_pairs != 1 and self.routing != "ecmp":
            raise ValueError(f"queue_pairs = {self.queue_pairs} is for routing ecmp, not {self.routing}: leave it out")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"channels = {self.channels}: use 1 or more")
        if self.trials < 1 or (self.trials > 1 and not self.random_failures):
            raise ValueError(f"trials = {self.trials}: use 1, or 2 and more with --fail-random")
        if self.seed < 0:
            raise ValueError(f"seed = {self.seed}: use 0 or more")
        if not 0 <= self.reroute_seconds < np.inf:
            raise ValueError(f"reroute_seconds = {self.reroute_seconds}: must be finite and not negative")
        if self.queue_pairs < 1:
            raise ValueError(f"queue_pairs = {self.queue_pairs}: a connection has at least 1")

    @property
    def policy(self) -> Policy:
        if self.routing == "ecmp":
            return Ecmp(queue_pairs=self.queue_pairs, seed=self.seed)
        return Adaptive() if self.routing == "adaptive" else Static()

    @property
    def has_failures(self) -> bool:
        return bool(self.failures or self.random_failures)

    @property
    def swept(self) -> str:
        """What differs between cases: "sizes", "gpus", or nothing."""
        return "sizes" if len(self.sizes) > 1 else "gpus" if len(self.gpu_counts) > 1 else ""


def parse_size(text: str) -> float:
    """Bytes. Raises ValueError for a size without a unit, with another, or below 0."""
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
        raise ValueError(f"size {text!r}: {number!r} is no number") from None
    if not 0 <= size < np.inf:
        raise ValueError(f"size {text!r}: must be finite and not negative")
    return size


def with_sweep(question: Question, sweep: str | None) -> Question:
    """`question` for each of the sizes "1MiB,64MiB", of the doublings "1MiB..1GiB", or of "gpus=16,32" or
    "gpus=16..128". Raises ValueError for another form, for an empty range and for more than 64 cases."""
    if sweep is None:
        return question
    if sweep.startswith("gpus="):
        counts = _values(sweep, sweep.removeprefix("gpus="), _whole_number)
        return replace(question, gpu_counts=tuple(int(count) for count in counts))
    return replace(question, sizes=tuple(_values(sweep, sweep.removeprefix("size="), parse_size)))


def _whole_number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--sweep gpus: {text!r} is no whole number") from None


def _values(sweep: str, text: str, read: Callable[[str], float]) -> list[float]:
    low, dots, high = text.partition("..")
    if not dots:
        values = [read(each) for each in text.split(",") if each.strip()]
    else:
        first, last = read(low), read(high)
        if not 0 < first <= last:
            raise ValueError(f"--sweep {sweep}: expected a range from above 0 upwards, such as 1MiB..1GiB")
        count = int(np.log2(last / first) + 1e-9) + 1
        values = [first * 2**step for step in range(min(count, _SWEEP_LIMIT + 1))]
    if not 1 <= len(values) <= _SWEEP_LIMIT:
        raise ValueError(f"--sweep {sweep}: {len(values)} cases or more; give 1 to {_SWEEP_LIMIT}")
    return values


def build_fabrics(question: Question) -> list[Fabric]:
    """All fabrics of `question`, wired. Raises ValueError for an unknown one, for one that cannot be built, and where
    one has fewer GPUs than are asked for."""
    fabrics = [build(load_fabric(name, question.endpoints)) for name in question.fabrics]
    for index, fabric in enumerate(fabrics):
        if fabric.name in [other.name for other in fabrics[:index]]:
            raise ValueError(f"two fabrics are named {fabric.name}: give each once")
        for gpus in question.gpu_counts:
            check_gpus(fabric, gpus)
    return fabrics


def check_gpus(fabric: Fabric, gpus: int | None) -> int:
    """How many GPUs take part. Raises ValueError for fewer than 2 and for more than there are."""
    count = fabric.endpoints if gpus is None else gpus
    if count > fabric.endpoints:
        raise ValueError(
            f"gpus = {count}: {fabric.name} has {fabric.endpoints}; use at most {fabric.endpoints}, or build it larger "
            f"with --endpoints"
        )
    if count < 2:
        raise ValueError(f"gpus = {count}: a collective takes 2 or more")
    return count


def changes_of(question: Question, fabric: Fabric, trial: int = 0) -> tuple[Change, ...]:
    """What fails on this fabric in one trial, and when. Raises ValueError for parts that it does not have."""
    found = [parse_failure(text, fabric) for text in question.failures]
    for number, text in enumerate(question.random_failures):
        share, at, time = text.partition("@")
        try:
            percent, seconds = float(share.strip().removesuffix("%")), float(time) if at else 0.0
        except ValueError:
            percent = seconds = np.nan
        if not (share.strip().endswith("%") and 0 <= percent <= 100 and 0 <= seconds < np.inf):
            raise ValueError(f"--fail-random {text}: expected a share of the cables in percent, such as 1% or 1%@0.5")
        seed = question.seed + trial * len(question.random_failures) + number
        found.append(Change(seconds=seconds, links=random_links(fabric, percent / 100, seed)))
    return tuple(found)


def changes_text(question: Question) -> str:
    """What fails, as it was asked for."""
    return ", ".join([*question.failures, *(f"{share} of the cables" for share in question.random_failures)])
