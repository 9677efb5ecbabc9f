"""Measurements of single operations on a GPU: matrix products, attention, exchanges of tokens.

The catalog holds them as these records, each figure with its band. None is of a whole system.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from dovetail.config import Record
from dovetail.spec.band import Band

Format = Literal["fp8", "bf16", "fp32"]
Layout = Literal["dense", "contiguous", "masked"]  # how the rows of several experts lie [DeepGEMM]
AttentionKind = Literal["prefill", "backward", "decode"]  # expanded heads forward and backward; absorbed heads
# Kinds of memory-bound work that may be measured separately.
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
FORMATS: tuple[Format, ...] = ("fp8", "bf16", "fp32")  # the narrowest first
OPERAND_BYTES = {"fp8": 1, "bf16": 2, "fp32": 4}
OUTPUT_BYTES = {"fp8": 2, "bf16": 2, "fp32": 4}  # a product of FP8 operands is written in BF16


class Estimate(Record):
    """A figure that was reached, the interval it is expected in, and who measured it."""

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
    """A measured matrix product: [m, k] times [k, n] in each of `groups` groups, 2 groups m n k FLOP in all."""

    format: Format
    layout: Layout = "dense"
    m: PositiveInt
    n: PositiveInt
    k: PositiveInt
    groups: PositiveInt = 1
    tflops: PositiveFloat  # reached by all groups together
    low: PositiveFloat | None = None  # the band of tflops, where measurements differ
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
        """The bytes of operands and result, once each and without scales, as DeepGEMM's tables count their GB/s."""
        read = (self.m + self.n) * self.k * OPERAND_BYTES[self.format]
        return float(self.groups * (read + self.m * self.n * OUTPUT_BYTES[self.format]))

    @property
    def speed(self) -> Band:
        """The speed in FLOP/s."""
        return Band(self.tflops, self.low or self.tflops, self.high or self.tflops) * 1e12


class GemmSweep(Record):
    """Matrix products that differ only in their rows, and the time of each."""

    format: Format
    layout: Layout = "dense"
    groups: PositiveInt = 1
    n: PositiveInt
    k: PositiveInt
    m: tuple[PositiveInt, ...] = Field(min_length=1)  # rows of one group; the mean where groups differ
    microseconds: tuple[PositiveFloat, ...]

    @model_validator(mode="after")
    def _one_time_each(self) -> GemmSweep:
        if len(self.m) != len(self.microseconds):
            raise ValueError(
                f"{len(self.m)} values of m, but {len(self.microseconds)} of microseconds: give one for each"
            )
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
    """Attention cores that differ only in the length of their sequences; `cost.ops.ops.Attention` counts the FLOP."""

    kind: AttentionKind
    batch: PositiveInt  # sequences
    heads: PositiveInt
    length: tuple[PositiveInt, ...] = Field(min_length=1)  # keys of each sequence
    tflops: tuple[PositiveFloat, ...]

    @model_validator(mode="after")
    def _one_speed_each(self) -> AttentionSweep:
        if len(self.length) != len(self.tflops):
            raise ValueError(
                f"{len(self.length)} values of length, but {len(self.tflops)} of tflops: give one for each"
            )
        return self

    @property
    def rows(self) -> int:
        """The heads of all sequences together, which run side by side."""
        return self.batch * self.heads


class ExchangePoint(Record):
    """One measured exchange of tokens between the ranks that hold experts [DeepEP]."""

    kind: Literal["dispatch", "combine"]
    mode: Literal["normal", "low-latency"]
    ranks: PositiveInt
    tokens: PositiveInt  # per rank
    bytes_per_token: PositiveFloat  # of one copy
    copies: PositiveFloat | None = None  # copies of a token that `gbs` counts; None: one per node of its experts
    gbs: PositiveFloat  # per rank, as the source counts it
    microseconds: PositiveFloat | None = None  # if the source gives the time itself
    over: Literal["scale-up", "scale-out"]  # the link whose speed `gbs` is
    link_gbs: PositiveFloat  # the datasheet's figure of that link on the machine that was measured
    source: str = Field(min_length=1)


def merged(points: Iterable[GemmPoint]) -> tuple[GemmPoint, ...]:
    """Return one point for each shape: the last of its measurements, in a band that covers all of them."""
    found: dict[tuple[object, ...], GemmPoint] = {}
    for point in points:
        shape = (point.format, point.layout, point.groups, point.m, point.n, point.k)
        found[shape] = _together(found[shape], point) if shape in found else point
    return tuple(found.values())


def _together(earlier: GemmPoint, later: GemmPoint) -> GemmPoint:
    ends = [end for point in (earlier, later) for end in (point.tflops, point.low, point.high) if end is not None]
    return later.model_copy(update={"low": min(ends), "high": max(ends)})


def moved_seconds(seconds: float, ratio: float, share: float, best: float) -> float:
    """Return the seconds of a product on another GPU or in another format, where its roofline is `ratio` times as long.

    The product takes `seconds` and reaches `share` of its roofline; the best product reaches `best`. The part
    share / best of its time is taken to follow the roofline, the rest to be latencies, which stay as they are.
    """
    return seconds * (1 + (ratio - 1) * min(1.0, share / best))
