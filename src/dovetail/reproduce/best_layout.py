"""The layout that DeepSeek trained with, compared with all others on its cluster [V3 §3.2].

Both sides of the comparison use the same figures of the same GPU, so most of their errors cancel. A difference of one
per cent is still less than the planner can tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from dovetail.planner.training.plan import StepParts, TrainingPlan
from dovetail.planner.training.search import compared, search
from dovetail.reproduce.rows import Found
from dovetail.reproduce.training_step import GOAL, workload
from dovetail.spec.band import Band

SUBJECT = "PP16, EP64, no TP, DualPipe"
SAID = 4  # at most so many better layouts are described
THE_SAME = 0.999  # a layout is better if its time is less than this share
NAMES = {"forward": "1F", "input_backward": "1B", "weight_backward": "1W", "pair": "1F1B"}  # others keep their names


def find() -> Found:
    """Search all layouts of 2,048 GPUs, which takes some 3 s."""
    work = workload()
    found = search(work, GOAL)
    place = compared(found, work, GOAL)
    own, quicker = place.plan, [gain.plan for gain in place.better]
    better = [plan for plan in quicker if plan.step_seconds.value <= THE_SAME * own.step_seconds.value]
    values = {
        (SUBJECT, "its step over the best one's"): Band.exact(1 + place.behind),
        ("all layouts", "legal ones"): Band.exact(found.tried),
        ("all layouts", "that fit in memory"): Band.exact(found.fitting),
        ("all layouts", "better by 0.1 % or more"): Band.exact(len(better)),
    }
    return Found(values=values, remarks=tuple(_remarks(own, better)))


def _remarks(own: TrainingPlan, better: list[TrainingPlan]) -> Iterator[str]:
    yield f"DeepSeek's own: {_step(own)}"
    for plan in better[:SAID]:
        layout = plan.work.layout
        gained = plan.step_seconds.value / own.step_seconds.value - 1
        yield (
            f"better: PP{layout.pp}, EP{layout.ep}, TP{layout.tp}, {layout.schedule}, {layout.microbatches} x"
            f" {layout.microbatch_size} sequences: {gained:+.1%}; {_step(plan)}; {_parts(plan.parts, own.parts)}"
        )


def _step(plan: TrainingPlan) -> str:
    band, memory = plan.step_seconds, plan.largest_memory.total / 1e9
    return f"{band.value:.2f} s ({band.low:.1f} to {band.high:.1f}), {memory:.0f} GB"


def _parts(parts: StepParts, own: StepParts) -> str:
    """Return which parts are quicker and which slower, the largest difference first."""
    names = [field.name for field in fields(StepParts)]
    changes = {NAMES.get(name, name): getattr(parts, name).value - getattr(own, name).value for name in names}
    largest = sorted(changes.items(), key=lambda item: -abs(item[1]))
    return ", ".join(f"{name} {change:+.2f} s" for name, change in largest if abs(change) >= 0.01)
