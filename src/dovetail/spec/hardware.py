"""Accelerators, links and clusters as data: what the datasheet says and what is reached, two fields, each with its
source.

Records mirror the TOML that a user writes, so their keys carry the datasheet's units (gbs = 10^9 bytes/s one way,
tflops = 10^12 FLOP/s, us = 10^-6 s); the properties give base units (bytes, seconds, FLOP/s) to those that compute.

A reached figure comes from measuring one operation (a product by shape, attention, an exchange, a copy), never from
the step time or throughput of a whole system: those are for the planner to predict.
"""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from dovetail.config import Record
from dovetail.spec.band import Band
from dovetail.spec.measurements import (
    FORMATS,
    OPERAND_BYTES,
    OUTPUT_BYTES,
    AttentionKind,
    AttentionSweep,
    ElementwiseKind,
    Estimate,
    ExchangePoint,
    Format,
    GemmPoint,
    GemmSweep,
    merged,
)

RUNTIME_BYTES = 2e9  # CUDA's context, communicators and their buffers; unverified. Processors have none of it


class Link(Record):
    """One GPU's connection to others, one way."""

    gbs: PositiveFloat  # datasheet
    achieved_gbs: Estimate
    latency_us: Estimate  # end to end, a small message

    @model_validator(mode="after")
    def _achieved_is_possible(self) -> Link:
        if self.achieved_gbs.high > self.gbs * 1.0001:
            raise ValueError(f"achieved_gbs up to {self.achieved_gbs.high:g} is more than the datasheet's {self.gbs:g}")
        return self

    @property
    def bandwidth(self) -> Band:
        """Bytes/s one way, achieved."""
        return self.achieved_gbs.band * 1e9

    @property
    def latency(self) -> Band:
        """Seconds."""
        return self.latency_us.band * 1e-6


class Efficiency(Record):
    """What operations reach on one GPU. Shares are of the datasheet's figures."""

    gemms: tuple[GemmPoint, ...] = ()
    sweeps: tuple[GemmSweep, ...] = ()  # later than `gemms`
    gemm_source: str = Field(min_length=1)
    # Formats without points of their own run at this share of the speed that the nearest measured format's share
    # gives them; for formats that are not listed, at the same share.
    gemm_relative: dict[Format, Estimate] = {}
    memory: Estimate  # of the bandwidth, streaming; above 1 where what was measured stays in caches
    # Kinds of memory-bound work with a share of their own. A GPU's are much alike; on a CPU an exponential or a
    # rounding takes longer than its bytes.
    elementwise: dict[ElementwiseKind, Estimate] = {}
    # Where `attention` has sweeps of a kind, the kind's share follows them by shape, and of the estimate here only the
    # ratios of its ends to its value count: what other kernels are to those that were measured.
    attention_prefill: Estimate  # of the BF16 peak: forward, queries and keys of one length, expanded heads
    attention_backward: Estimate  # of the BF16 peak
    attention_decode_flop: Estimate  # of the BF16 peak: absorbed heads, few queries against a cache
    attention: tuple[AttentionSweep, ...] = ()
    attention_decode_memory: Estimate  # of the bandwidth
    launch_us: Estimate  # what an operation takes beside its work: the gap to the one before it
    exchanges: tuple[ExchangePoint, ...] = ()
    borrowed_from: str | None = None  # the GPU whose shares these are, widened, where there are no own measurements

    @field_validator("attention_prefill", "attention_backward", "attention_decode_flop")
    @classmethod
    def _is_a_share(cls, estimate: Estimate) -> Estimate:
        if estimate.high > 1:
            raise ValueError(f"is a share of the datasheet's figure, at most 1, and goes up to {estimate.high:g}")
        return estimate

    @model_validator(mode="after")
    def _has_products(self) -> Efficiency:
        if not self.gemms and not self.sweeps:
            raise ValueError("has no measured products: give gemms or sweeps, or borrow another GPU's")
        return self

    @property
    def products(self) -> tuple[GemmPoint, ...]:
        """`gemms` and the points of `sweeps`, one of each shape."""
        return merged((*self.gemms, *(point for sweep in self.sweeps for point in sweep.points)))

    def memory_estimate(self, kind: ElementwiseKind) -> Estimate:
        """Share of the bandwidth."""
        return self.elementwise.get(kind, self.memory)

    def attention_estimate(self, kind: AttentionKind) -> Estimate:
        """Of all shapes."""
        if kind == "decode":
            return self.attention_decode_flop
        return self.attention_prefill if kind == "prefill" else self.attention_backward


class PeakTflops(Record):
    """Dense peaks, no sparsity; a format that is left out is one the hardware has no products in."""

    fp8: PositiveFloat | None = None
    bf16: PositiveFloat
    fp32: PositiveFloat


class Gpu(Record):
    """One accelerator, or the processors of one machine."""

    name: str = Field(min_length=1)
    source: str = Field(min_length=1)
    peak_tflops: PeakTflops
    memory_bytes: PositiveFloat
    runtime_bytes: NonNegativeFloat = RUNTIME_BYTES  # of them; what plans have left is `usable_bytes`
    bandwidth_gbs: PositiveFloat
    multiprocessors: PositiveInt
    price_per_hour: Estimate | None = None  # dollars, rented
    efficiency: Efficiency

    def __hash__(self) -> int:
        # Costs are cached by GPU, and its hundreds of figures would be hashed at each look-up.
        return hash((self.name, self.bandwidth_gbs, self.memory_bytes))

    @property
    def usable_bytes(self) -> float:
        """Of memory, without the runtime's."""
        return self.memory_bytes - self.runtime_bytes

    @property
    def bandwidth(self) -> float:
        """Datasheet bytes/s of memory."""
        return self.bandwidth_gbs * 1e9

    def runs_as(self, format: Format) -> Format:
        """`format`, or the next wider one that this GPU has products in."""
        wider = FORMATS[FORMATS.index(format) :]
        return next(each for each in wider if getattr(self.peak_tflops, each) is not None)

    def peak(self, format: Format) -> float:
        """Datasheet FLOP/s of dense products in `format`, or in the next wider format that there is."""
        return float(getattr(self.peak_tflops, self.runs_as(format))) * 1e12

    def ideal_seconds(self, point: GemmPoint) -> float:
        """Of products at the datasheet's speed or bandwidth, whichever is slower."""
        return point.groups * self.roofline_seconds(point.format, point.m, point.n, point.k)

    def roofline_seconds(self, format: Format, m: float, n: float, k: float) -> float:
        """Of one product [m, k] x [k, n], without scales."""
        return max(self._ideal(format, m, n, k))

    def is_compute_bound(self, format: Format, m: float, n: float, k: float) -> bool:
        compute, memory = self._ideal(format, m, n, k)
        return compute >= memory

    def _ideal(self, format: Format, m: float, n: float, k: float) -> tuple[float, float]:
        bytes_ = (m + n) * k * OPERAND_BYTES[format] + m * n * OUTPUT_BYTES[format]
        return 2.0 * m * n * k / self.peak(format), bytes_ / self.bandwidth

    def best_shares(self) -> dict[bool, float]:
        """The most that measured products reach of the roofline: of those that compute binds (True), and the others."""
        found: dict[bool, float] = {}
        for point in self.efficiency.products:
            binds = self.is_compute_bound(point.format, point.m, point.n, point.k)
            share = self.ideal_seconds(point) * point.speed.value / point.flop
            found[binds] = max(share, found.get(binds, 0.0))
        most = max(found.values())
        return {binds: found.get(binds, most) for binds in (True, False)}


class Cluster(Record):
    """Equal nodes of equal GPUs. A node is a scale-up domain (8 GPUs, or the 72 of a rack); scale-out joins nodes."""

    name: str = Field(min_length=1)
    source: str = Field(min_length=1)
    gpu: Gpu
    gpus_per_node: PositiveInt
    nodes: PositiveInt
    scale_up: Link
    scale_out: Link | None = None  # None: one node
    fabric: str | None = None  # how nodes are joined: a name of the catalog of fabrics, or a .toml file
    price_per_gpu_hour: Estimate | None = None  # dollars; None: the GPU's

    @model_validator(mode="after")
    def _nodes_are_joined(self) -> Cluster:
        if self.nodes > 1 and self.scale_out is None:
            raise ValueError(f"nodes = {self.nodes} but no [scale_out] link joins them: add it, or nodes = 1")
        return self

    @property
    def gpus(self) -> int:
        return self.gpus_per_node * self.nodes

    @property
    def price(self) -> Band | None:
        """Dollars per GPU and hour."""
        estimate = self.price_per_gpu_hour or self.gpu.price_per_hour
        return estimate.band if estimate else None
