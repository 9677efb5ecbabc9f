"""Measures this machine, operation by operation, and describes it as a cluster file.

    products    every matrix product that training the smallest presets lists (`cost.ops.layer`), in BF16, FP32 and,
                with a recipe, in FP8, run by the functions that the model itself calls; and a few large products
    attention   the attention core, forward and backward, and absorbed attention against a cache
    memory      the bandwidth, by a copy larger than any cache; and the share of it that norms, sums and losses at a
                preset's size reach
    launch      the model's norm of a single row, forward, which is subtracted from all times; on a CPU also a narrow
                layer's forward and backward pass on one token, divided by the operations that a plan lists for it
    exchange    an all-to-all between the ranks of a torchrun launch, if there are several

The operations take turns in several rounds, each for a slice of the time, so that other work on the machine slows all
of them alike. The launch is subtracted from all times because the roofline adds one to every operation.
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
from dovetail.atomic import check_new_file, write_bytes
from dovetail.calibrate.memory_work import memory_work
from dovetail.calibrate.timing import Times, exchange_link, microseconds, run_in_rounds
from dovetail.calibrate.work import Work, attention_work, launch_work, product_work
from dovetail.cost.ops.ops import Gemm
from dovetail.numerics.cpu.process import settle_process
from dovetail.spec.hardware import RUNTIME_BYTES, Cluster, Efficiency, Gpu, Link, PeakTflops
from dovetail.spec.measurements import Estimate, GemmPoint
from dovetail.train.layout.ranks import local_device, process_group, rank_and_world

SMALLEST_SHARE = 0.2  # at least this share of an operation's time counts as work, however long a launch takes


def calibrate(path: Path, seconds: float = 45.0) -> Cluster:
    """Measure for about `seconds` and write the cluster file `path`.

    Under torchrun all ranks measure, and rank 0 writes. Raises ValueError for a path that does not end in .toml,
    which would be taken for a cluster's name.
    """
    if path.suffix != ".toml":
        raise ValueError(f"{path}: expected a name that ends in .toml, which tells a cluster's file from its name")
    check_new_file(path)
    settle_process()  # as training does
    with process_group():
        cluster = measure(seconds)
        if rank_and_world()[0] == 0:
            write_bytes(path, dump(cluster).encode())
    return cluster


def dump(cluster: Cluster) -> str:
    """Return the cluster as TOML, with each measured product on a line of its own."""
    return config.dump(cluster).replace("[{ ", "[\n    { ").replace(" }, { ", " },\n    { ").replace(" }]", " },\n]")


def measure(seconds: float = 45.0) -> Cluster:
    """Measure the machine as a cluster of one GPU (or one CPU process) per rank.

    Raises ValueError if `seconds` is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"{seconds:g} seconds to measure in: expected more than 0, such as 45")
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
    """Describe the measured times as a GPU. Its peaks are its fastest products, because no datasheet is read."""
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
        """Return the share of the peak `of` that these operations reach together."""
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
        memory=memory,  # may exceed 1, since small tensors stay in caches
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
    """Return the seconds without the launch: the value that counts, the fastest run, and the median."""
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
    """Return the link of a single rank, which sends to nobody; a copy in its memory takes the link's place."""
    gbs = gpu.bandwidth_gbs
    why = f"{source}: one rank exchanges nothing; this is a copy in its memory"
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
