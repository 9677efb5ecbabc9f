"""Loads GPUs and clusters by name, or a cluster from a user's file.

`gpus/NAME.toml` and `clusters/NAME.toml` mirror `spec.hardware`, with three short cuts. A cluster may name its GPU
(`gpu = "h800"`). A cluster may name one that it is like (`like = "h800-2048"`), and gives only the keys that differ.
A GPU that nobody has measured may borrow another's efficiency:

    [borrow]
    gpu = "h800"      # whose efficiency
    widened = 1.2     # factor by which each end of a band moves out
    source = "..."    # why that GPU's
    memory = {...}    # any figure that is known for this GPU, as in [efficiency]

Borrowed products keep their shapes. The best of them keep their share of the roofline (the time of the slower of
arithmetic and memory), so that a borrower with other peaks or another bandwidth has its own TFLOPS. Products that
reach less are taken to wait for latencies, which stay as they are (`moved_seconds`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from dovetail.config import Record, near_matches, read_toml, validate
from dovetail.spec.hardware import Cluster, Efficiency, Gpu
from dovetail.spec.measurements import (
    AttentionKind,
    AttentionSweep,
    Estimate,
    ExchangePoint,
    Format,
    GemmPoint,
    moved_seconds,
)

_GPUS = Path(__file__).parent / "gpus"
_CLUSTERS = Path(__file__).parent / "clusters"


class Borrow(Record):
    """Whose efficiency a GPU is taken to have, and the figures that are known for itself."""

    gpu: str
    widened: float = Field(ge=1)
    source: str = Field(min_length=1)
    gemm_relative: dict[Format, Estimate] = {}  # added to the lender's
    gemm_scale: Estimate | None = None  # factor on every product's share, where the lender's is known to be too high
    memory: Estimate | None = None
    attention_prefill: Estimate | None = None
    attention_backward: Estimate | None = None
    attention_decode_flop: Estimate | None = None
    attention_decode_memory: Estimate | None = None
    attention: tuple[AttentionSweep, ...] = ()  # its own; give the estimate of their kind with them
    launch_us: Estimate | None = None
    exchanges: tuple[ExchangePoint, ...] = ()


def gpu_names() -> list[str]:
    """Return the names that `load_gpu` takes, sorted."""
    return sorted(path.stem for path in _GPUS.glob("*.toml"))


def cluster_names() -> list[str]:
    """Return the names that `load_cluster` takes, sorted."""
    return sorted(path.stem for path in _CLUSTERS.glob("*.toml"))


@cache
def load_gpu(name: str) -> Gpu:
    """Load the GPU `name`. Raises ValueError with near matches for an unknown one."""
    if name not in gpu_names():
        raise ValueError(f"no GPU {name!r} in the catalog; {near_matches(name, gpu_names())}")
    return _gpu(read_toml(_GPUS / f"{name}.toml"), where=f"gpus/{name}.toml")


def load_cluster(name: str | Path) -> Cluster:
    """Load the cluster of that name, or the TOML file at that path.

    What ends in .toml or has a path separator in it is a path. Raises ValueError, one line, for an unknown name and
    for a file that is wrong.
    """
    text = str(name)
    if text.endswith(".toml") or "/" in text:
        return read_cluster(read_toml(text), where=text)
    if text not in cluster_names():
        raise ValueError(f"no cluster {text!r}: neither in the catalog nor a .toml file; {_nearest(text)}")
    return _catalog_cluster(text)


def _nearest(name: str) -> str:
    return near_matches(name, cluster_names()) or "to describe your own, copy clusters/template.toml"


@cache
def _catalog_cluster(name: str) -> Cluster:
    return read_cluster(read_toml(_CLUSTERS / f"{name}.toml"), where=f"clusters/{name}.toml")


def read_cluster(table: Mapping[str, Any], where: str = "cluster") -> Cluster:
    """Return the cluster that a TOML table describes. Raises ValueError with a line that begins with `where`."""
    if "like" in table:
        base = table["like"]
        if base not in cluster_names():
            raise ValueError(f"{where}: like = {base!r} is no cluster of the catalog; {_nearest(str(base))}")
        own = {key: value for key, value in table.items() if key != "like"}
        table = dict(_catalog_cluster(base)) | own
    gpu = table.get("gpu")
    if isinstance(gpu, str):
        if gpu not in gpu_names():
            raise ValueError(f"{where}: gpu = {gpu!r} is not in the catalog; {near_matches(gpu, gpu_names())}")
        table = {**table, "gpu": load_gpu(gpu)}
    elif isinstance(gpu, Mapping):
        table = {**table, "gpu": _gpu(gpu, where=f"{where}: gpu")}
    return validate(Cluster, table, where)


def _gpu(table: Mapping[str, Any], where: str) -> Gpu:
    if ("efficiency" in table) == ("borrow" in table):
        raise ValueError(f"{where}: expected either an [efficiency] table or a [borrow] table, one of the two")
    if "borrow" not in table:
        return validate(Gpu, table, where)
    borrow = validate(Borrow, table["borrow"], f"{where}: borrow")
    if borrow.gpu not in gpu_names():
        raise ValueError(f"{where}: borrow.gpu = {borrow.gpu!r}; {near_matches(borrow.gpu, gpu_names())}")
    lender = load_gpu(borrow.gpu)
    plain = {key: value for key, value in table.items() if key != "borrow"}
    gpu = validate(Gpu, {**plain, "efficiency": lender.efficiency}, where)
    return gpu.model_copy(update={"efficiency": _borrowed(gpu, borrow, lender)})


def _borrowed(gpu: Gpu, borrow: Borrow, lender: Gpu) -> Efficiency:
    lent = lender.efficiency
    shares = ("memory", "attention_prefill", "attention_backward", "attention_decode_flop")
    figures = {key: getattr(borrow, key) or _widened(getattr(lent, key), borrow, limit=1.0) for key in shares}
    for key in ("attention_decode_memory", "launch_us"):
        limit = 1.0 if key == "attention_decode_memory" else float("inf")
        figures[key] = getattr(borrow, key) or _widened(getattr(lent, key), borrow, limit)
    relative = {format: _widened(each, borrow) for format, each in lent.gemm_relative.items()} | borrow.gemm_relative
    return Efficiency(
        gemms=_borrowed_products(gpu, borrow, lender),
        gemm_source=f"borrowed from {lender.name}, shares of the roofline: {borrow.source} ({lent.gemm_source})",
        gemm_relative=relative,
        attention=(*borrow.attention, *_borrowed_attention(gpu, borrow, lender)),
        exchanges=borrow.exchanges,
        borrowed_from=lender.name,
        **figures,
    )


def _widened(estimate: Estimate, borrow: Borrow, limit: float = float("inf")) -> Estimate:
    low, high = estimate.low / borrow.widened, min(max(limit, estimate.value), estimate.high * borrow.widened)
    source = f"borrowed from {borrow.gpu}, band widened {borrow.widened:g} times: {borrow.source} ({estimate.source})"
    return Estimate(value=estimate.value, low=low, high=high, source=source)


def _borrowed_attention(gpu: Gpu, borrow: Borrow, lender: Gpu) -> list[AttentionSweep]:
    """Return the lender's sweeps of the kinds that the borrower has no figures for, at the same shares of the peak."""
    flat: dict[AttentionKind, Estimate | None] = {
        "prefill": borrow.attention_prefill,
        "backward": borrow.attention_backward,
        "decode": borrow.attention_decode_flop,
    }
    own = {sweep.kind for sweep in borrow.attention} | {kind for kind, estimate in flat.items() if estimate}
    scale = gpu.peak_tflops.bf16 / lender.peak_tflops.bf16
    return [
        sweep.model_copy(update={"tflops": tuple(scale * each for each in sweep.tflops)})
        for sweep in lender.efficiency.attention
        if sweep.kind not in own
    ]


def _borrowed_products(gpu: Gpu, borrow: Borrow, lender: Gpu) -> tuple[GemmPoint, ...]:
    best = lender.best_shares()
    points = lender.efficiency.products
    return tuple(
        _borrowed_product(
            gpu, borrow, lender, best[lender.is_compute_bound(point.format, point.m, point.n, point.k)], point
        )
        for point in points
    )


def _borrowed_product(gpu: Gpu, borrow: Borrow, lender: Gpu, best: float, point: GemmPoint) -> GemmPoint:
    """Return the product's point on the borrower, in BF16 if the borrower has no FP8 products.

    The part of its time in which the lender reaches its `best` share changes as the roofline does; the rest stays.
    """
    format = point.format if point.format != "fp8" or gpu.peak_tflops.fp8 else "bf16"
    moved = point.model_copy(update={"format": format})
    peak, bandwidth = getattr(gpu.peak_tflops, format) * 1e12, gpu.bandwidth
    ideal, lent = max(moved.flop / peak, moved.bytes / bandwidth), lender.ideal_seconds(point)
    share = point.speed * (lent / point.flop)
    share = share * (ideal / lent / moved_seconds(1.0, ideal / lent, share.value, best))
    share = share * min(1.0, best / share.value)
    if format != point.format and format in lender.efficiency.gemm_relative:
        share = share * lender.efficiency.gemm_relative[format].band
    if borrow.gemm_scale is not None:
        share = share * borrow.gemm_scale.band
    tflops = moved.flop / ideal / 1e12
    value = min(share.value, 1.0) * tflops
    low, high = value * share.low / share.value / borrow.widened, share.high * borrow.widened * tflops
    return moved.model_copy(update={"tflops": value, "low": low, "high": max(value, min(high, tflops))})
