"""What was measured on hardware, as written in the catalog: figures with their band, products of matrices, attention,
exchanges of tokens. Each is of one operation, never of a whole system."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from dovetail.config import Record
from dovetail.spec.band import Band

Format = Literal["fp8", "bf16", "fp32"]
Layout = Literal["dense", "contiguous", "masked"]  # of the rows of several experts [DeepGEMM]
AttentionKind = Literal["prefill", "backward", "decode"]  # expanded heads forward and backward; absorbed heads
# Memory-bound work that hardware may have been measured at on its own.
ElementwiseKind = Literal[
    "other",
    "norm",
    "norm gradient",
    "swiglu",
    "swiglu gradient",
    "expand",
    "reduce",
    "heads",
    "heads gradient",
    "choice",
    "choice gradient",
    "loss",
    "quantise",
    "quantise weight",
    "requantise",
    "square sum",
    "optimizer",
]
FORMATS: tuple[Format, ...] = ("fp8", "bf16", "fp32")  # from the narrowest
OPERAND_BYTES = {"fp8": 1, "bf16": 2, "fp32": 4}
OUTPUT_BYTES = {"fp8": 2, "bf16": 2, "fp32": 4}  # a product of FP8 operands is written in BF16


class Estimate(Record):
    """A figure that was reached, the interval it is taken to lie in, and who measured it."""

    value: PositiveFloat
    low: PositiveFloat
    high: PositiveFloat
    source: str = Field(min_length=1)

    @model_validator(mode="after")
    def _value_lies_in_its_band(self) -> Estimate:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"expected low <= value <= high, got {self.low} <= {self.value} <= {self.high}")
        return self

    @property
    def band(self) -> Band:
        return Band(self.value, self.low, self.high)


class GemmPoint(Record):
    """One measured matrix product, per group [m, k] times [k, n], of `groups` alike; FLOP are 2 groups m n k."""

    format: Format
    layout: Layout = "dense"
    m: PositiveInt
    n: PositiveInt
    k: PositiveInt
    groups: PositiveInt = 1
    tflops: PositiveFloat  # reached, all groups together
    low: PositiveFloat | None = None  # of tflops, where measurements differ
    high: PositiveFloat | None = None

    @model_validator(mode="after")
    def _value_lies_in_its_band(self) -> GemmPoint:
        low, high = self.low or self.tflops, self.high or self.tflops
        if not low <= self.tflops <= high:
            raise ValueError(f"expected low <= tflops <= high, got {low} <= {self.tflops} <= {high}")
        return self

    @property
    def flop(self) -> float:
        return 2.0 * self.groups * self.m * self.n * self.k

    @property
    def bytes(self) -> float:
        """Read and written once each, without scales: so the GB/s of DeepGEMM's tables are counted."""
        read = (self.m + self.n) * self.k * OPERAND_BYTES[self.format]
        return float(self.groups * (read + self.m * self.n * OUTPUT_BYTES[self.format]))

    @property
    def speed(self) -> Band:
        """FLOP/s."""
        return Band(self.tflops, self.low or self.tflops, self.high or self.tflops) * 1e12


class GemmSweep(Record):
    """Products that differ in their rows only, each with the time it took."""

    format: Format
    layout: Layout = "dense"
    groups: PositiveInt = 1
    n: PositiveInt
    k: PositiveInt
    m: tuple[PositiveInt, ...] = Field(min_length=1)  # of one group; the mean where groups differ
    microseconds: tuple[PositiveFloat, ...]

    @model_validator(mode="after")
    def _one_time_each(self) -> GemmSweep:
        if len(self.m) != len(self.microseconds):
            raise ValueError(f"{len(self.m)} values of m, but {len(self.microseconds)} of microseconds: one each")
        return self

    @property
    def points(self) -> tuple[GemmPoint, ...]:
        fixed = {key: getattr(self, key) for key in ("format", "layout", "groups", "n", "k")}
        per_row = 2.0 * self.groups * self.n * self.k
        return tuple(
            GemmPoint(**fixed, m=m, tflops=per_row * m / microseconds / 1e6)
            for m, microseconds in zip(self.m, self.microseconds, strict=True)
        )


class AttentionSweep(Record):
    """Attention cores that differ in the length of their sequences only. FLOP as `cost.ops.ops.Attention` counts
    them."""

    kind: AttentionKind
    batch: PositiveInt  # sequences
    heads: PositiveInt
    length: tuple[PositiveInt, ...] = Field(min_length=1)  # keys of each sequence
    tflops: tuple[PositiveFloat, ...]

    @model_validator(mode="after")
    def _one_speed_each(self) -> AttentionSweep:
        if len(self.length) != len(self.tflops):
            raise ValueError(f"{len(self.length)} values of length, but {len(self.tflops)} of tflops: one each")
        return self

    @property
    def rows(self) -> int:
        """Heads of all sequences: what runs side by side."""
        return self.batch * self.heads


class ExchangePoint(Record):
    """One measured exchange of tokens between the ranks that hold experts [DeepEP]."""

    kind: Literal["dispatch", "combine"]
    mode: Literal["normal", "low-latency"]
    ranks: PositiveInt
    tokens: PositiveInt  # per rank
    bytes_per_token: PositiveFloat  # of one copy
    copies: PositiveFloat | None = None  # of a token that `gbs` counts; None: one for each distinct node of its experts
    gbs: PositiveFloat  # per rank, as its source counts
    microseconds: PositiveFloat | None = None  # where the source gives the time itself
    over: Literal["scale-up", "scale-out"]  # the link that `gbs` is of
    link_gbs: PositiveFloat  # datasheet of that link where it was measured: says nothing about others
    source: str = Field(min_length=1)


def merged(points: Iterable[GemmPoint]) -> tuple[GemmPoint, ...]:
    """One point of each shape: of several measurements the last counts, and all are its band."""
    found: dict[tuple[object, ...], GemmPoint] = {}
    for point in points:
        shape = (point.format, point.layout, point.groups, point.m, point.n, point.k)
        found[shape] = _together(found[shape], point) if shape in found else point
    return tuple(found.values())


def _together(earlier: GemmPoint, later: GemmPoint) -> GemmPoint:
    ends = [end for point in (earlier, later) for end in (point.tflops, point.low, point.high) if end is not None]
    return later.model_copy(update={"low": min(ends), "high": max(ends)})


def moved_seconds(seconds: float, ratio: float, share: float, best: float) -> float:
    """What a product of `seconds` takes where its roofline is `ratio` times as long, on another GPU or in another
    format. `share` is what it reaches of its roofline, `best` what the best product reaches: in as far as it falls
    behind, it waits for latencies that stay."""
    return seconds * (1 + (ratio - 1) * min(1.0, share / best))
