"""DualPipe and other pipeline schedules: steps, bubbles, activations and stages of each rank.

The published figures are from [V3 Table 2; DualPipe]. Bubbles are replayed with F = 1, I = W = 1 (so B = 2) and a pair
of 2.5, and compared with the published formulas. These are exact only for equal stages, I = F and W <= I, and with
DualPipe on the middle ranks; ranks further out idle less.
"""

from __future__ import annotations

from dovetail.parallel.schedules.pipelines import make_schedule
from dovetail.parallel.schedules.schedule import counts
from dovetail.planner.training.timeline import Durations, replay
from dovetail.reproduce.rows import Found
from dovetail.reproduce.training_step import LAYOUT
from dovetail.spec.band import Band

DURATIONS = Durations(forward=1.0, backward=2.0, input_backward=1.0, weight_backward=1.0, pair=2.5)
PIPELINES = {  # kind, ranks, a rank in the middle
    "1F1B, 16 ranks": ("1f1b", 16, 8),
    "ZB1P, 16 ranks": ("zb1p", 16, 8),
    "DualPipe, 16 ranks": ("dualpipe", 16, 8),
    "DualPipeV, 8 ranks": ("dualpipev", 8, 7),
}


def find() -> Found:
    values: dict[tuple[str, str], Band] = {}
    for name, (kind, ranks, middle) in PIPELINES.items():
        timeline = replay(make_schedule(kind, ranks, LAYOUT.microbatches), DURATIONS)
        figures = {
            "bubble": timeline.bubble[middle],
            "activations": max(timeline.activation_peaks),
            "stages held": len(timeline.schedule.held_by(0)),
        }
        values |= {(name, quantity): Band.exact(value) for quantity, value in figures.items()}
    schedule = make_schedule("dualpipe", LAYOUT.pp, LAYOUT.microbatches)
    for rank in (0, LAYOUT.pp // 2 - 1):
        steps = counts(schedule, rank)
        figures = {"F": steps["F"], "pairs": steps["FB"], "B": steps["B"] + steps["I"], "W": steps["W"]}
        values |= {(f"DualPipe, rank {rank}", quantity): Band.exact(value) for quantity, value in figures.items()}
    return Found(values=values)
