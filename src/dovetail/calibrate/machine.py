"""Measures the machine this runs on, operation by operation, and describes it as a cluster file.

    products    every product that training the smallest presets lists (`cost.ops.layer`), in BF16, FP32 and, by a
                recipe, in FP8, with the functions the model itself calls; and a few large ones
    attention   its core, forward and backward, and absorbed against a cache
    memory      a copy larger than any cache is the bandwidth; norms, sums and losses at a preset's size are the
                share of it
    launch      the model's own norm of a single row, forward, which is taken off all times; on a CPU a narrow layer's
                forward and backward pass on one token, over the operations that a plan lists for it
    exchange    all-to-all between the ranks of a torchrun launch; with one rank there is none

Each operation runs again and again for a slice of the time, in rounds, so that a machine with other work on it slows
all alike. Times have the launch taken off, as the roofline adds one to every operation.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path

import torch

from dovetail import config
from dovetail.calibrate.memory_work import memory_work
from dovetail.calibrate.timing import Times, exchange_link, microseconds, run_in_rounds
from dovetail.calibrate.work import Work, attention_work, launch_work, product_work
from dovetail.cost.ops.ops import Gemm
from dovetail.numerics.cpu.allocator import keep_freed_memory
from dovetail.spec.hardware import RUNTIME_BYTES, Cluster, Efficiency, Gpu, Link, PeakTflops
from dovetail.spec.measurements import Estimate, GemmPoint
from dovetail.text.atomic import write_bytes
from dovetail.train.run.ranks import local_device, process_group, rank_and_world

SMALLEST_SHARE = 0.2  # of an operation's time that is work, however long a launch is taken to be


def calibrate(path: Path, seconds: float = 45.0) -> Cluster:
    """Measure for about `seconds` and write the cluster file at `path`; under torchrun all ranks measure, and rank 0
    writes. Raises ValueError for a path that would not be read as a file."""
    if path.suffix != ".toml":
        raise ValueError(f"{path}: expected a name that ends in .toml, by which a cluster's file is told from its name")
    keep_freed_memory()  # as training does
    with process_group():
        cluster = measure(seconds)
        if rank_and_world()[0] == 0:
            write_bytes(path, dump(cluster).encode())
    return cluster


def dump(cluster: Cluster) -> str:
    """TOML, one measured product on a line."""
    return config.dump(cluster).replace("[{ ", "[\n    { ").replace(" }, { ", " },\n    { ").replace(" }]", " },\n]")


def measure(seconds: float = 45.0) -> Cluster:
    """The machine as a cluster of one GPU (or of one CPU process) per rank. Raises ValueError for no time at all."""
    if not seconds > 0:
        raise ValueError(f"{seconds:g} seconds to measure in: expected some, such as 45")
    device = local_device()
    works = [*launch_work(device), *memory_work(device), *attention_work(device), *product_work(device)]
    times = run_in_rounds(works, seconds, device)
    _, world = rank_and_world()
    source = f"measured {date.today().isoformat()} by dovetail calibrate, {world} rank{'s' if world > 1 else ''}"
    gpu = describe(works, times, device, source)
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world)) if world > 1 else 1
    nodes = world // per_node
    scale_up = exchange_link(device, per_node, source) if per_node > 1 else lone_link(gpu, source)
    scale_out = exchange_link(device, world, source) if nodes > 1 else None
    return Cluster(
        name="this-machine",
        source=f"{source}; {platform.system()} {platform.machine()}, torch {torch.__version__}",
        gpu=gpu,
        gpus_per_node=per_node,
        nodes=nodes,
        scale_up=scale_up,
        scale_out=scale_out,
    )


def describe(works: Iterable[Work], times: dict[str, Times], device: torch.device, source: str) -> Gpu:
    """The measured times as a GPU; its peaks are the fastest products, as no datasheet is read."""
    works = list(works)
    launch = times["launch"]
    layers = [work for work in works if work.kind == "launch" and work.weight > 1]
    gap = launch if not layers else times[layers[0].name].of_each(layers[0].weight)
    points = tuple(_point(work.product, times[work.name], launch.value) for work in works if work.product)
    fastest = {each: max(p.tflops for p in points if p.format == each) for each in {p.format for p in points}}
    peak = PeakTflops(fp8=fastest.get("fp8"), bf16=fastest["bf16"], fp32=fastest["fp32"])
    copied = next(work.bytes for work in works if work.kind == "copy")
    bandwidth = copied / times["copy"].value

    def reached(names: Sequence[str], amount: Callable[[Work], float], of: float, limit: float = math.inf) -> Estimate:
        """Share of `of` that these operations reach together."""
        chosen = [work for work in works if work.name in names]
        total = sum(work.weight * amount(work) for work in chosen)
        spans = [(work.weight, _work_seconds(times[work.name], launch.value)) for work in chosen]
        value, high, low = (min(total / sum(n * span[i] for n, span in spans) / of, limit) for i in range(3))
        return Estimate(value=value, low=low, high=high, source=source)

    bf16 = peak.bf16 * 1e12
    kinds = {work.elementwise: None for work in works if work.kind == "elementwise"}
    elementwise = {
        kind: reached([work.name for work in works if work.elementwise == kind], lambda work: work.bytes, bandwidth)
        for kind in kinds
    }
    memory = reached([work.name for work in works if work.kind == "elementwise"], lambda work: work.bytes, bandwidth)
    around = next(work.other_bytes for work in works if work.name == "attention backward") / bandwidth / memory.value
    backward = times["attention backward"].less(around + launch.value)
    times = {**times, "attention backward": backward}
    efficiency = Efficiency(
        gemms=points,
        gemm_source=f"{source}, with the functions the model calls",
        memory=memory,  # small tensors stay in caches: their share of the bandwidth may pass 1
        elementwise=elementwise,
        attention_prefill=reached(["attention forward"], lambda work: work.flop, bf16, 1.0),
        attention_backward=reached(["attention backward"], lambda work: work.flop, bf16, 1.0),
        attention_decode_flop=reached(["attention absorbed"], lambda work: work.flop, bf16, 1.0),
        attention_decode_memory=reached(["attention absorbed"], lambda work: work.bytes, bandwidth),
        launch_us=microseconds(gap, source),
    )
    return Gpu(
        name=_device_name(device),
        source=f"{source}; peaks are the fastest products, the bandwidth is that of a copy past the caches",
        peak_tflops=peak,
        memory_bytes=_memory_bytes(device),
        runtime_bytes=RUNTIME_BYTES if device.type == "cuda" else 0.0,
        bandwidth_gbs=bandwidth / 1e9,
        multiprocessors=_multiprocessors(device),
        efficiency=efficiency,
    )


def _work_seconds(times: Times, launch: float) -> tuple[float, float, float]:
    """Without the launch: what counts, the fastest, the median."""
    value, fastest, median = (
        max(each - launch, SMALLEST_SHARE * each) for each in (times.value, times.fastest, times.median)
    )
    return value, fastest, median


def _point(op: Gemm, times: Times, launch: float) -> GemmPoint:
    seconds, fastest, median = _work_seconds(times, launch)
    m, k = math.ceil(op.m), math.ceil(op.k)
    flop = 2.0 * op.groups * m * op.n * k
    return GemmPoint(
        format=op.format,
        layout=op.layout,
        m=m,
        n=op.n,
        k=k,
        groups=op.groups,
        tflops=flop / seconds / 1e12,
        low=flop / median / 1e12,
        high=flop / fastest / 1e12,
    )


def lone_link(gpu: Gpu, source: str) -> Link:
    """One rank has nobody to send to: a copy in its memory stands in."""
    gbs = gpu.bandwidth_gbs
    why = f"{source}: one rank exchanges nothing; a copy in memory stands in"
    return Link(
        gbs=gbs,
        achieved_gbs=Estimate(value=gbs / 2, low=gbs / 4, high=gbs, source=why),
        latency_us=gpu.efficiency.launch_us.model_copy(update={"source": why}),
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def _memory_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return torch.get_num_threads()
