"""Explains why no layout fits in memory, and what would fit."""

from __future__ import annotations

from collections.abc import Iterator

from dovetail.cost.memory.rank import RankMemory, pipeline_memory
from dovetail.planner.training.chunks import Workload
from dovetail.planner.training.figures import USES
from dovetail.planner.training.search import Candidate
from dovetail.spec.layout import Layout, check_layout

LARGEST = 1 << 16  # at most so many GPUs are tried
MOST_MEMORY = 288e9  # the most that a GPU has: GB300's


def why_none_fits(smallest: Candidate, batch: int) -> str:
    """Return one line: the layout that needs the least, how much is missing, and how many GPUs, or which, would do."""
    work, gpu = smallest.work, smallest.work.cluster.gpu
    layout, needed = work.layout, smallest.memory + gpu.runtime_bytes
    fullest = _fullest(work, layout, work.sequence_length)
    largest = max(USES, key=lambda name: getattr(fullest, name))
    text = (
        f"no layout of the {layout.gpus} GPUs of {work.cluster.name} fits in memory: pp = {layout.pp}, "
        f"ep = {layout.ep}, tp = {layout.tp}, {layout.schedule} needs least, {needed / 1e9:.1f} GB on its fullest "
        f"rank, most of it {largest.replace('_', ' ')} ({getattr(fullest, largest) / 1e9:.1f}), and {gpu.name} has "
        f"{gpu.memory_bytes / 1e9:.1f}, {(needed - gpu.memory_bytes) / 1e9:.1f} GB too few; "
    )
    larger = fitting_layout(work, batch)
    remedies = []
    if larger is not None:
        remedies.append(f"{larger.gpus} GPUs (pp = {larger.pp}, ep = {larger.ep}, tp = {larger.tp})")
    if needed <= MOST_MEMORY:
        remedies.append(f"GPUs with {needed / 1e9:.0f} GB")
    shorter = work.sequence_length
    while shorter > 1 and _fullest(work, layout, shorter).total > gpu.usable_bytes:
        shorter //= 2
    if _fullest(work, layout, shorter).total <= gpu.usable_bytes:
        remedies.append(f"--sequence-length {shorter}")
    return text + ("what would do: " + " or ".join(remedies) if remedies else "no number of these GPUs would do")


def fitting_layout(work: Workload, batch: int) -> Layout | None:
    """Return a layout that fits in memory, with the GPUs of `work` doubled as often as needed; None if none does."""
    gpus = 2 * work.layout.gpus
    while gpus <= LARGEST:
        for layout in _layouts(work, gpus, batch):
            if _fullest(work, layout, work.sequence_length).total <= work.cluster.gpu.usable_bytes:
                return layout
        gpus *= 2
    return None


def _fullest(work: Workload, layout: Layout, sequence_length: int) -> RankMemory:
    ranks = pipeline_memory(work.spec, layout, work.recipe, sequence_length, work.recompute)
    return max(ranks, key=lambda rank: rank.total)


def _layouts(work: Workload, gpus: int, batch: int) -> Iterator[Layout]:
    """Yield 1F1B layouts in powers of two with one sequence at a time, those with few tensor-parallel ranks first."""
    for tp in _powers(work.cluster.gpus_per_node):
        for pp in reversed(_powers(min(gpus // tp, work.spec.num_hidden_layers))):
            dp = gpus // (pp * tp)
            for ep in reversed(_powers(dp * tp if work.spec.moe else 1)):
                layout = Layout(pp=pp, ep=ep, tp=tp, dp=dp, microbatches=max(1, batch // dp))
                try:
                    check_layout(layout, work.spec)
                except ValueError:
                    continue
                if layout.gpus == gpus and batch % dp == 0:
                    yield layout


def _powers(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length()) if 1 << power <= most]
