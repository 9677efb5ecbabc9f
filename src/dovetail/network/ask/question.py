"""A user's question about networks: a collective, the GPUs, the routing, failures, and sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np

from dovetail.catalog.fabrics import load_fabric
from dovetail.config import near_matches
from dovetail.network.ask.sizes import MOST_CASES, parse_count, parse_size, parse_values
from dovetail.network.demands.collectives import COLLECTIVES, RINGS
from dovetail.network.demands.experts import MODES
from dovetail.network.fabric.topology import Fabric, build
from dovetail.network.flows.failures import parse_failure, random_links
from dovetail.network.flows.simulation import Change
from dovetail.network.routing.route import Policy, policy_of

EXPERTS = ("dispatch", "combine")
SIZED = (*COLLECTIVES, "pipeline", "kv-transfer")
KNOWN = (*SIZED, *EXPERTS)
BESIDE = (*KNOWN, "host-copy", "node-all-gather")
MOST_SEED = 2**63 - 1  # hashes have 64 bits
MOST_SKEW = 10  # with more, all tokens choose the same experts
_ONLY_FOR = {  # options that only some collectives have
    "sizes": SIZED,
    "tokens": EXPERTS,
    "model": EXPERTS,
    "precision": EXPERTS,
    "mode": EXPERTS,
    "skew": EXPERTS,
    "recorded": EXPERTS,
    "channels": RINGS,
    "stages": ("pipeline",),
    "both_ways": ("pipeline",),
    "prefill_gpus": ("kv-transfer",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One collective on one or several fabrics, for each of `sizes` (or `tokens`) and of `gpu_counts`.

    A list of one is no sweep. None and empty mean that an option was not given.
    """

    fabrics: tuple[str, ...]  # names of the catalog, or .toml files
    collective: str = "all-to-all"
    sizes: tuple[float, ...] = ()  # bytes
    tokens: tuple[int, ...] = ()  # per GPU, for dispatch and combine in place of sizes
    gpu_counts: tuple[int | None, ...] = (None,)  # None: all that the fabric has
    model: str | None = None  # the experts' model, as `catalog.presets.find_model` takes it
    precision: str | None = None  # the recipe with the formats that tokens are sent in
    mode: str | None = None  # normal or low-latency, for dispatch and combine
    skew: float | None = None  # Zipf exponent of the experts' popularity
    recorded: str | None = None  # .npy file of the experts that tokens go to
    channels: int | None = None  # rings side by side; None: one for each NIC of a node
    stages: int | None = None  # of a pipeline
    both_ways: bool = False  # a pipeline's stages also send backwards
    prefill_gpus: int | None = None  # number of GPUs that send caches; None: half
    beside: str | None = None  # what else runs at the same time, such as host-copy:1GiB
    routing: str = "adaptive"
    queue_pairs: int = 1
    seed: int = 0  # for ECMP's hash, random failures and tokens
    failures: tuple[str, ...] = ()
    random_failures: tuple[str, ...] = ()  # such as 1%
    trials: int = 1  # of random failures, with seed, seed + 1, ...
    reroute_seconds: float = 0.0  # from a failure until routes avoid it
    endpoints: int | None = None  # build the fabrics for this many GPUs; None: as in the catalog

    @classmethod
    def of(cls, options: Mapping[str, Any], sweeps: Sequence[str] = ()) -> Question:
        """Make a question of those `options`, as typed, that are its own and were given. Raises ValueError."""
        names = {each.name for each in fields(cls)}
        given = {name: value for name, value in options.items() if name in names and value is not None}
        given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
        for name, option in (("failures", "fail"), ("random_failures", "fail_random")):
            given[name] = tuple(options.get(option) or ())
        if options.get("size") is not None:
            given["sizes"] = (parse_size(options["size"]),)
        if options.get("tokens") is not None:
            given["tokens"] = (options["tokens"],)
        return with_sweeps(cls(**given, gpu_counts=(options.get("gpus"),)), sweeps)

    def __post_init__(self) -> None:
        """Raise ValueError, one line, for a mistake that does not depend on the fabric."""
        if not self.fabrics:
            raise ValueError("no fabric: give --fabric once or more")
        if self.collective not in KNOWN:
            raise ValueError(f"no collective {self.collective!r}; {near_matches(self.collective, KNOWN)}")
        self._check_numbers()
        self._check_fitting()
        self._check_experts()
        if self.beside is not None and self.has_failures:
            raise ValueError("--beside together with failures is not simulated: ask for one of them at a time")
        if self.stages is None and "pipeline" in (self.collective, *(self.other or ())[:1]):
            raise ValueError("pipeline: give --stages, the number of stages the GPUs form, such as --stages 16")

    def _check_numbers(self) -> None:
        if self.queue_pairs != 1 and self.routing != "ecmp":
            raise ValueError(f"queue_pairs = {self.queue_pairs} is for routing ecmp, not {self.routing}: leave it out")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"channels = {self.channels}: use 1 or more")
        if self.trials < 1 or (self.trials > 1 and not self.random_failures):
            raise ValueError(f"trials = {self.trials}: use 1, or more with --fail-random, such as --fail-random 1%")
        if not 0 <= self.seed <= MOST_SEED:
            raise ValueError(f"seed = {self.seed}: use 0 to {MOST_SEED}")
        if not 0 <= self.reroute_seconds < np.inf:
            raise ValueError(f"reroute_seconds = {self.reroute_seconds}: must be finite and not negative")
        if self.reroute_seconds and not self.has_failures:
            raise ValueError("--reroute-seconds is for failures: add --fail or --fail-random, or leave it out")
        policy_of(self.routing, self.queue_pairs, self.seed)
        if any(tokens < 0 for tokens in self.tokens):
            raise ValueError(f"tokens = {min(self.tokens)}: use 0 or more")

    def _check_fitting(self) -> None:
        """Raise ValueError for an option that neither the collective nor what runs beside it has."""
        asked = {self.collective, self.other[0] if self.other else self.collective}
        for name, takers in _ONLY_FOR.items():
            if name in ("sizes", "tokens"):
                fits = self.collective in takers
            else:
                fits = bool(asked & set(takers))
            if getattr(self, name) not in (None, (), False) and not fits:
                option = "--" + {"sizes": "size"}.get(name, name).replace("_", "-")
                instead = {"sizes": "give --tokens", "tokens": "give --size"}.get(name, "leave it out")
                raise ValueError(f"{option} is for {', '.join(takers)}, not for {self.collective}: {instead}")

    def _check_experts(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(f"no mode {self.mode!r}; {near_matches(self.mode, MODES)}")
        if self.skew is not None and not 0 <= self.skew <= MOST_SKEW:
            raise ValueError(f"skew = {self.skew:g}: use 0 (all experts alike) to {MOST_SKEW}; 1 is Zipf's law")
        for name in ("skew", "tokens") if self.recorded is not None else ():
            if getattr(self, name) not in (None, ()):
                raise ValueError(
                    f"--{name} with --recorded: the recording already says which tokens go where; leave it out"
                )

    @property
    def policy(self) -> Policy:
        return policy_of(self.routing, self.queue_pairs, self.seed)

    @property
    def has_failures(self) -> bool:
        return bool(self.failures or self.random_failures)

    @property
    def is_sprayed_to_all(self) -> bool:
        """Whether it is an all-to-all over all paths, in which flows are alike."""
        return self.collective == "all-to-all" and self.routing == "adaptive"

    @property
    def is_of_experts(self) -> bool:
        """Whether it is asked for tokens and not for bytes."""
        return self.collective in EXPERTS

    @property
    def other(self) -> tuple[str, float] | None:
        """What runs beside the collective, and its bytes or tokens per GPU. Raises ValueError for another form."""
        if self.beside is None:
            return None
        name, colon, amount = self.beside.partition(":")
        if name not in BESIDE:
            raise ValueError(f"--beside {self.beside}: no {name!r}; {near_matches(name, BESIDE)}")
        if not colon:
            example = "4096 (tokens per GPU)" if name in EXPERTS else "1GiB"
            raise ValueError(f"--beside {self.beside}: say how much, such as {name}:{example}")
        if name not in EXPERTS:
            return name, parse_size(amount)
        tokens = parse_count(amount, f"--beside {self.beside}, tokens per GPU")
        if tokens < 0:
            raise ValueError(f"--beside {self.beside}: use 0 tokens or more")
        return name, float(tokens)

    @property
    def swept(self) -> str:
        """The x-axis of its picture: "sizes", "tokens" or "gpus", or "" without a sweep."""
        several = {"sizes": self.sizes, "tokens": self.tokens, "gpus": self.gpu_counts}
        return next((name for name, values in several.items() if len(values) > 1), "")


def with_sweeps(question: Question, sweeps: Sequence[str]) -> Question:
    """Add `sweeps` to `question`; several are combined in all ways.

    A sweep is a list of sizes "1MiB,64MiB", a range of doublings "1MiB..1GiB", "gpus=16..128" or "tokens=128..4096".
    Raises ValueError for another form, an empty range, more than 64 cases, and an option that is also given itself.
    """
    for sweep in sweeps:
        what, is_named, text = sweep.partition("=")
        what, text = (what, text) if is_named else ("tokens" if question.is_of_experts else "size", sweep)
        known = {"size": "sizes", "tokens": "tokens", "gpus": "gpu_counts"}
        if what not in known:
            raise ValueError(f"--sweep {sweep}: no {what!r}; {near_matches(what, known)}")
        if getattr(question, known[what]) not in ((), (None,)):
            raise ValueError(f"--sweep {sweep}: --{what} is given already, or swept twice; leave one out")
        if what == "size":
            question = replace(question, sizes=tuple(parse_values(sweep, text, parse_size)))
            continue
        counts = tuple(map(int, parse_values(sweep, text, partial(parse_count, what=f"--sweep {what}"))))
        question = replace(question, tokens=counts) if what == "tokens" else replace(question, gpu_counts=counts)
    cases = max(len(question.sizes), len(question.tokens), 1) * len(question.gpu_counts)
    if cases > MOST_CASES:
        raise ValueError(f"--sweep {' --sweep '.join(sweeps)}: {cases} cases; give {MOST_CASES} at most")
    return question


def build_fabrics(question: Question) -> list[Fabric]:
    """Build all fabrics of `question`.

    Raises ValueError for an unknown one, one that cannot be built, and one with fewer GPUs than are asked for.
    """
    fabrics = [build(load_fabric(name, question.endpoints)) for name in question.fabrics]
    for index, fabric in enumerate(fabrics):
        if fabric.name in [other.name for other in fabrics[:index]]:
            raise ValueError(f"two fabrics are named {fabric.name}: give each once, or give the file another name")
        for gpus in question.gpu_counts:
            check_gpus(fabric, gpus)
    return fabrics


def check_gpus(fabric: Fabric, gpus: int | None) -> int:
    """Return the number of GPUs that take part. Raises ValueError for fewer than 2 and for more than there are."""
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
    """Return what fails on this fabric in one trial, and when. Raises ValueError for parts that it does not have."""
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
    """Return what fails, in the words of the question."""
    return ", ".join([*question.failures, *(f"{share} of the cables" for share in question.random_failures)])
