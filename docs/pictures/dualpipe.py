"""dualpipe.svg: the pipeline of DualPipe under that of 1F1B, for the eight ranks and twenty micro-batches of the
paper's figure [V3 Fig. 5]. Both are the schedules that plans use, replayed step by step."""

from __future__ import annotations

from pathlib import Path

from canvas import Canvas

from dovetail.parallel.schedules.dualpipe import dualpipe
from dovetail.parallel.schedules.pipelines import one_f_one_b
from dovetail.planner.report.drawing import LEFT, RIGHT, draw_svg, seconds_text
from dovetail.planner.training.timeline import Durations, Timeline, replay

RANKS, MICROBATCHES = 8, 20
WIDTH, EDGE = 1000, 8
DURATIONS = Durations(forward=1.0, backward=2.0, input_backward=1.0, weight_backward=1.0, pair=3.0)


def draw(directory: Path) -> Path:
    plain, both_ends = (replay(make(RANKS, MICROBATCHES), DURATIONS) for make in (one_f_one_b, dualpipe))
    canvas = Canvas(
        WIDTH,
        800,
        f"Two pipelines: {RANKS} ranks, {MICROBATCHES} micro-batches, one time scale",
        f"Timelines of 1F1B and DualPipe, a row for each rank. {_told('1F1B', plain)}. {_told('DualPipe', both_ends)}. "
        "In DualPipe micro-batches enter at both ends, and a forward runs together with a backward of the other "
        "direction.",
    )
    room = WIDTH - 2 * EDGE
    _place(canvas, plain, _told("1F1B", plain), 52, room)
    share = both_ends.seconds / plain.seconds
    _place(canvas, both_ends, _told("DualPipe", both_ends), 392, LEFT + RIGHT + (room - LEFT - RIGHT) * share)
    held = [round(max(each.activation_peaks)) for each in (plain, both_ends)]
    canvas.caption(
        "A forward takes 1 s here, a backward 2 s, half of it for weight gradients, and a forward and a backward at "
        "once 3 s. On GPUs they take less at once than in turn, since one computes while the other's tokens are on "
        f"their way to experts. DualPipe holds two stages on a rank instead of one, and the activations of {held[1]} "
        f"micro-batches at most, instead of {held[0]}."
    )
    return canvas.save(directory / "dualpipe.svg")


def _told(name: str, timeline: Timeline) -> str:
    (idle,) = set(timeline.bubble)
    whole = seconds_text(timeline.seconds)
    return f"{name}: {whole}, of which every rank idles {seconds_text(idle)}, or {100 * idle / timeline.seconds:.1f} %"


def _place(canvas: Canvas, timeline: Timeline, title: str, y: float, width: float) -> None:
    canvas.parts.append(draw_svg(timeline, title, round(width)).replace("<svg ", f'<svg x="{EDGE}" y="{y}" ', 1))
