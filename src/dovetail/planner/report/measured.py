"""Prints what `dovetail calibrate` measured as tables, and the command that plans with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dovetail.planner.figure import number
from dovetail.planner.report.tables import Table
from dovetail.spec.hardware import Cluster
from dovetail.spec.measurements import Estimate, GemmPoint

SHARES = {  # fields of Efficiency that are shares, with their titles
    "memory": "norms, sums and losses: share of the bandwidth",
    "attention_prefill": "attention forward: share of the fastest BF16 product",
    "attention_backward": "attention backward: share of the fastest BF16 product",
    "attention_decode_flop": "absorbed attention: share of the fastest BF16 product",
    "attention_decode_memory": "absorbed attention: share of the bandwidth",
}


def tables(cluster: Cluster) -> list[Table]:
    """Return a table of the machine, and one of every product."""
    header = (">format", "layout", ">groups", ">m", ">k", ">n", ">TFLOPS", ">from", ">to")
    products = sorted(cluster.gpu.efficiency.products, key=lambda each: (each.format, each.layout, each.flop))
    return [
        Table(
            title=f"{cluster.gpu.name}: {cluster.source}", header=("", ">", ">from", ">to"), rows=tuple(_rows(cluster))
        ),
        Table(title="products", header=header, rows=tuple(map(_product, products))),
    ]


def next_commands(path: Path) -> Iterator[str]:
    """Yield the lines that say what to do with the file."""
    run = "--batch 32 --tokens 10M --sequence-length 256 --precision bf16"
    yield f"wrote {path}; plan on it with:"
    yield f"  dovetail plan quickstart --cluster {path} --goal train {run}"


def _rows(cluster: Cluster) -> Iterator[tuple[str, ...]]:
    gpu, reached = cluster.gpu, cluster.gpu.efficiency
    for name in ("fp8", "bf16", "fp32"):
        peak = getattr(gpu.peak_tflops, name)
        if peak is not None:
            yield f"fastest {name} product", f"{number(peak)} TFLOPS", "", ""
    yield "memory", f"{gpu.memory_bytes / 1e9:.1f} GB", "", ""
    yield "memory bandwidth, by a copy larger than the caches", f"{number(gpu.bandwidth_gbs)} GB/s", "", ""
    for name, title in SHARES.items():
        yield title, *_estimate(getattr(reached, name), "%", 100)
    yield "launch", *_estimate(reached.launch_us, "us")
    for title, link in (("a node", cluster.scale_up), ("nodes", cluster.scale_out)):
        if link is not None and cluster.gpus > 1:
            yield f"exchange in {title}, one way", *_estimate(link.achieved_gbs, "GB/s")
            yield f"latency in {title}", *_estimate(link.latency_us, "us")


def _estimate(estimate: Estimate, unit: str, scale: float = 1.0) -> tuple[str, str, str]:
    return f"{number(scale * estimate.value)} {unit}", number(scale * estimate.low), number(scale * estimate.high)


def _product(point: GemmPoint) -> tuple[str, ...]:
    ends = (number(end) if end else "" for end in (point.low, point.high))
    sizes = (str(size) for size in (point.groups, point.m, point.k, point.n))
    return (point.format, point.layout, *sizes, number(point.tflops), *ends)
