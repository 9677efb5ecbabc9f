"""How long one operation takes on one GPU, with a band, and what limits it.

    ideal    = max(FLOP / peak, bytes / bandwidth)          the roofline, from the datasheet's figures
    seconds  = ideal / share + launch

Shares are measured: those of products and attention depend on the shape (`cost.shares`), that of memory-bound work on
its kind. With fewer multiprocessors (in V3's training 20 of 132 communicate instead [V3 §3.2.2]) arithmetic slows in
proportion, and memory-bound work does not, since part of them can use the whole bandwidth.

Left out: imbalance between experts, waiting for other ranks, and what caches keep from one operation to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from dovetail.cost.ops.ops import Attention, Elementwise, Gemm
from dovetail.cost.shares import attention_share, gemm_share
from dovetail.spec.band import Band
from dovetail.spec.hardware import Gpu
from dovetail.spec.measurements import AttentionKind

Bound = Literal["compute", "memory", "launch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One operation's time in seconds, what limits it, the formula with its numbers, and the measurements' source."""

    seconds: Band
    bound: Bound
    formula: str
    source: str


NOTHING = Timed(
    seconds=Band.exact(0.0), bound="launch", formula="nothing to do", source=""
)  # without tokens nothing is launched


@lru_cache(maxsize=1 << 16)
def op_time(op: Gemm | Attention | Elementwise, gpu: Gpu, multiprocessors: int | None = None) -> Timed:
    """Return the time of `op` alone on `gpu`, with `multiprocessors` of it (None: all).

    Raises ValueError for more multiprocessors than there are, and for none.
    """
    if multiprocessors is not None and not 0 < multiprocessors <= gpu.multiprocessors:
        raise ValueError(f"{multiprocessors} multiprocessors of {gpu.name}: expected 1 to {gpu.multiprocessors}")
    if op.bytes == 0:
        return NOTHING
    part = 1.0 if multiprocessors is None else multiprocessors / gpu.multiprocessors
    if isinstance(op, Gemm):
        return _gemm_time(op, gpu, part)
    if isinstance(op, Attention):
        return _attention_time(op, gpu, part)
    assert isinstance(op, Elementwise), f"{type(op).__name__} does not run on one GPU alone"
    share = gpu.efficiency.memory_estimate(op.kind)
    return _timed((0.0, op.bytes / gpu.bandwidth), (share.band, share.band), gpu, f"{op.bytes:.3g} B", share.source)


def _gemm_time(op: Gemm, gpu: Gpu, part: float) -> Timed:
    # Groups without rows have no part in the product.
    rows, groups = op.m / op.filled, op.groups * op.filled
    share = gemm_share(gpu, op.format, op.layout, rows, op.n, op.k, groups)
    format, near, efficiency = gpu.runs_as(op.format), share.nearest, gpu.efficiency
    ideal = op.flop / gpu.peak(format) / part, op.bytes / gpu.bandwidth
    shape = f"{format} {groups:g} x [{rows:g} x {op.k:g} x {op.n:g}]"
    nearest = f"{near.format} {near.layout} {near.groups} x [{near.m} x {near.k} x {near.n}]"
    source = f"{efficiency.gemm_source}; nearest: {nearest} with {near.tflops:g} TFLOPS"
    if near.format != format and format in efficiency.gemm_relative:
        source += f"; {format}: {efficiency.gemm_relative[format].source}"
    return _timed(ideal, (share.band, share.band), gpu, shape, source)


def _attention_time(op: Attention, gpu: Gpu, part: float) -> Timed:
    reached = gpu.efficiency
    kind: AttentionKind = "decode" if op.absorbed else "prefill" if op.pass_ == "forward" else "backward"
    rows = op.heads * (op.tokens if op.absorbed else op.sequences)
    flop_share = attention_share(gpu, kind, rows, op.context)
    memory_share = reached.attention_decode_memory if op.absorbed else reached.memory
    ideal = op.flop / gpu.peak("bf16") / part, op.bytes / gpu.bandwidth
    is_compute = ideal[0] / flop_share.value >= ideal[1] / memory_share.value
    source = (reached.attention_estimate(kind) if is_compute else memory_share).source
    work = f"{op.flop:.3g} FLOP, {op.bytes:.3g} B"
    return _timed(ideal, (flop_share, memory_share.band), gpu, work, source)


def _timed(ideal: tuple[float, float], shares: tuple[Band, Band], gpu: Gpu, work: str, source: str) -> Timed:
    """Return the slower of arithmetic and memory at their shares, plus the launch."""
    compute, memory = (seconds / share for seconds, share in zip(ideal, shares, strict=True))
    is_compute = compute.value >= memory.value
    slower = compute if is_compute else memory
    # Where the two are near each other, an end of the band may come from the one that is not slower.
    seconds = Band(slower.value, max(compute.low, memory.low), max(compute.high, memory.high))
    launch = gpu.efficiency.launch_us
    bound: Bound = "compute" if is_compute else "memory"
    at, share = (ideal[0], shares[0]) if is_compute else (ideal[1], shares[1])
    return Timed(
        seconds=seconds + launch.band * 1e-6,
        bound="launch" if launch.value * 1e-6 > slower.value else bound,
        formula=f"{work}: {at * 1e6:.4g} us ({bound}) / {share.value:.3f} + {launch.value:g} us",
        source=source,
    )
