"""GPUs, links and clusters: the datasheet's figures and, beside them, those that are reached.

The records mirror the TOML that a user writes, so their keys carry the datasheet's units (gbs = 10^9 bytes/s one way,
tflops = 10^12 FLOP/s, us = 10^-6 s). Their properties give base units (bytes, seconds, FLOP/s), which code computes
with. Each figure has its source.

A figure that is reached comes from measuring one operation (a product by shape, attention, an exchange, a copy), never
from the step time or the throughput of a whole system: those are for the planner to predict.
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

RUNTIME_BYTES = 2e9  # of CUDA's context, communicators and their buffers; unverified. CPUs have none


class Link(Record):
    """One GPU's connection to others; bandwidths are one way."""

    gbs: PositiveFloat  # datasheet
    achieved_gbs: Estimate
    latency_us: Estimate  # of a small message, end to end

    @model_validator(mode="after")
    def _achieved_is_possible(self) -> Link:
        if self.achieved_gbs.high > self.gbs * 1.0001:
            raise ValueError(f"achieved_gbs up to {self.achieved_gbs.high:g} is more than the datasheet's {self.gbs:g}")
        return self

    @property
    def bandwidth(self) -> Band:
        """The achieved bytes/s, one way."""
        return self.achieved_gbs.band * 1e9

    @property
    def latency(self) -> Band:
        """The latency of a small message in seconds."""
        return self.latency_us.band * 1e-6


class Efficiency(Record):
    """How fast operations run on one GPU. Shares are of the datasheet's figures."""

    gemms: tuple[GemmPoint, ...] = ()
    sweeps: tuple[GemmSweep, ...] = ()  # measured later than `gemms`
    gemm_source: str = Field(min_length=1)
    # A format without points of its own takes its share of the peak from the nearest measured format, times this
    # factor; a format that is not listed here takes the share as it is.
    gemm_relative: dict[Format, Estimate] = {}
    memory: Estimate  # of the bandwidth, for streaming; above 1 where the measured tensors stay in caches
    # Kinds of memory-bound work that have a share of their own. On a GPU they differ little; on a CPU an exponential or
    # a rounding takes longer than reading and writing its bytes.
    elementwise: dict[ElementwiseKind, Estimate] = {}
    # Where `attention` has sweeps of a kind, the share depends on the shape and comes from them. The estimate here then
    # gives the band only, by the ratios of its ends to its value: how other kernels compare with the measured ones.
    attention_prefill: Estimate  # of the BF16 peak: forward, queries and keys of one length, expanded heads
    attention_backward: Estimate  # of the BF16 peak
    attention_decode_flop: Estimate  # of the BF16 peak: absorbed heads, few queries against a cache
    attention: tuple[AttentionSweep, ...] = ()
    attention_decode_memory: Estimate  # of the bandwidth
    launch_us: Estimate  # the time of an operation beside its work: the gap after the one before it
    exchanges: tuple[ExchangePoint, ...] = ()
    borrowed_from: str | None = None  # without measurements of its own: the GPU whose shares these are, widened

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
        """All measured products, those of `gemms` and of `sweeps`, with one point for each shape."""
        return merged((*self.gemms, *(point for sweep in self.sweeps for point in sweep.points)))

    def memory_estimate(self, kind: ElementwiseKind) -> Estimate:
        """Return the share of the bandwidth that memory-bound work of this kind reaches."""
        return self.elementwise.get(kind, self.memory)

    def attention_estimate(self, kind: AttentionKind) -> Estimate:
        """Return the estimate for this kind of attention, which is that of all shapes."""
        if kind == "decode":
            return self.attention_decode_flop
        return self.attention_prefill if kind == "prefill" else self.attention_backward


class PeakTflops(Record):
    """Peaks of dense products, without sparsity; the hardware has no products in a format that is left out."""

    fp8: PositiveFloat | None = None
    bf16: PositiveFloat
    fp32: PositiveFloat


class Gpu(Record):
    """One accelerator, or the processors of one machine."""

    name: str = Field(min_length=1)
    source: str = Field(min_length=1)
    peak_tflops: PeakTflops
    memory_bytes: PositiveFloat
    runtime_bytes: NonNegativeFloat = RUNTIME_BYTES  # taken by the runtime; `usable_bytes` are left for plans
    bandwidth_gbs: PositiveFloat
    multiprocessors: PositiveInt
    price_per_hour: Estimate | None = None  # dollars, of renting it
    efficiency: Efficiency

    def __hash__(self) -> int:
        # Costs are cached by GPU, and hashing its hundreds of figures at each look-up would be slow.
        return hash((self.name, self.bandwidth_gbs, self.memory_bytes))

    @property
    def usable_bytes(self) -> float:
        """The bytes of memory without those of the runtime."""
        return self.memory_bytes - self.runtime_bytes

    @property
    def bandwidth(self) -> float:
        """The datasheet's bytes/s of memory."""
        return self.bandwidth_gbs * 1e9

    def runs_as(self, format: Format) -> Format:
        """Return `format`, or the next wider one that this GPU has products in."""
        wider = FORMATS[FORMATS.index(format) :]
        return next(each for each in wider if getattr(self.peak_tflops, each) is not None)

    def peak(self, format: Format) -> float:
        """Return the datasheet's FLOP/s of dense products in `format`, or in the next wider one that it has."""
        return float(getattr(self.peak_tflops, self.runs_as(format))) * 1e12

    def ideal_seconds(self, point: GemmPoint) -> float:
        """Return the seconds of a point's products at the datasheet's peak or bandwidth, whichever takes longer."""
        return point.groups * self.roofline_seconds(point.format, point.m, point.n, point.k)

    def roofline_seconds(self, format: Format, m: float, n: float, k: float) -> float:
        """Return the same for one product [m, k] x [k, n]; the bytes of scales are not counted."""
        return max(self._ideal(format, m, n, k))

    def is_compute_bound(self, format: Format, m: float, n: float, k: float) -> bool:
        compute, memory = self._ideal(format, m, n, k)
        return compute >= memory

    def _ideal(self, format: Format, m: float, n: float, k: float) -> tuple[float, float]:
        bytes_ = (m + n) * k * OPERAND_BYTES[format] + m * n * OUTPUT_BYTES[format]
        return 2.0 * m * n * k / self.peak(format), bytes_ / self.bandwidth

    def best_shares(self) -> dict[bool, float]:
        """The largest share of the roofline that measured products reach: compute-bound ones (True), and the others."""
        found: dict[bool, float] = {}
        for point in self.efficiency.products:
            binds = self.is_compute_bound(point.format, point.m, point.n, point.k)
            share = self.ideal_seconds(point) * point.speed.value / point.flop
            found[binds] = max(share, found.get(binds, 0.0))
        most = max(found.values())
        return {binds: found.get(binds, most) for binds in (True, False)}


class Cluster(Record):
    """Equal nodes of equal GPUs. A node is a scale-up domain (8 GPUs, or the 72 of a rack); scale-out links nodes."""

    name: str = Field(min_length=1)
    source: str = Field(min_length=1)
    gpu: Gpu
    gpus_per_node: PositiveInt
    nodes: PositiveInt
    scale_up: Link
    scale_out: Link | None = None  # None: one node
    fabric: str | None = None  # how nodes are joined: a fabric's name in the catalog, or a .toml file
    price_per_gpu_hour: Estimate | None = None  # dollars; None: that of the GPU

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
        """The price in dollars per GPU and hour, if one is known."""
        estimate = self.price_per_gpu_hour or self.gpu.price_per_hour
        return estimate.band if estimate else None
