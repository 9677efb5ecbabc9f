"""Draws a timeline as text, as SVG, and as a trace for chrome://tracing or Perfetto."""

from __future__ import annotations

import json
import math
import textwrap
from collections import defaultdict
from html import escape
from typing import Any

from dovetail.parallel.schedules.schedule import Action, Step
from dovetail.planner.request import Answer, Request
from dovetail.planner.training.plan import TrainingPlan
from dovetail.planner.training.timeline import Timeline

INK, MUTED, GRID, IDLE = "#22272e", "#6b7280", "#d1d5db", "#f1f3f5"
# Colours of a rank's first stage, and of its others (the second direction of DualPipe, later chunks).
FILL = {
    "F": ("#9cc3ea", "#5b94cf"),
    "B": ("#8fcf9f", "#4fa367"),
    "I": ("#c4e6a5", "#93c46a"),
    "W": ("#f6cf8a", "#dfa23c"),
}
NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
ROW, GAP, LEFT, RIGHT, TOP, FONT = 26.0, 4.0, 62.0, 74.0, 62.0, 11.0  # pixels
UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))
DIGIT = 0.62  # width of a digit over the font's size


def check_timeline(request: Request, option: str) -> None:
    """Raise ValueError, which names `option`, for a request that plans no training step, or several."""
    if request.goal != "train" or len(request.clusters) > 1:
        raise ValueError(f"{option} is the timeline of a training step on one cluster: --goal train and one --cluster")


def planned_timeline(answer: Answer) -> Timeline:
    """Return the timeline of the training step that was planned for a request that `check_timeline` lets pass."""
    (choice,) = answer.choices
    assert isinstance(choice.plan, TrainingPlan)
    return choice.plan.timeline


def draw_text(timeline: Timeline, width: int = 100) -> str:
    """Return a title, a line per rank of at most `width` characters, and a scale. Raises ValueError below 40.

    If there is room every step shows its micro-batch ("F3--", a pair "F7&b2-"); otherwise each column shows the kind of
    work that takes most of it, with X for a pair. Lower case is for other stages than the rank's first.
    """
    if width < 40:
        raise ValueError(f"width = {width}: a timeline needs at least 40 columns")
    ranks = timeline.schedule.ranks
    head = len(f"rank {ranks - 1} ")
    columns = width - head - len(" 100.0%")
    is_labelled = all(_fits(timeline, rank, columns) for rank in range(ranks))
    lines = [_title(timeline)]
    for rank in range(ranks):
        row = (_labelled_row if is_labelled else _letter_row)(timeline, rank, columns)
        idle = timeline.bubble[rank] / timeline.seconds if timeline.seconds else 0.0
        lines.append(f"{f'rank {rank}':{head}}{row} {100 * idle:5.1f}%")
    total = seconds_text(timeline.seconds)
    lines.append(f"{'':{head}}0{total:>{columns - 1}} idle")
    kinds = {half.kind for steps in timeline.schedule.actions for step in steps for half in step.halves}
    key = [f"{kind} {name}" for kind, name in NAMES.items() if kind in kinds]
    key += ["lower case: other stages"] if _is_shaded(timeline) else []
    key += [f"{'&' if is_labelled else 'X'} both at once"] if _has_pairs(timeline) else []
    lines += textwrap.wrap("; ".join([*key, ". idle"]), width)
    return "\n".join(lines)


def seconds_text(seconds: float) -> str:
    """Return seconds with three digits and a unit."""
    unit, size = next((pair for pair in UNITS if seconds >= pair[1]), UNITS[-1])
    return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:.0f} {unit}"


def chrome_trace(timeline: Timeline) -> str:
    """Return JSON of trace events in microseconds: a thread per rank, with the activations it holds as a counter."""
    events: list[dict[str, Any]] = []
    for rank, steps in enumerate(timeline.schedule.actions):
        name = {"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}}
        events.append(name)
        held = 0
        for step, start, end in zip(steps, timeline.start[rank], timeline.end[rank], strict=True):
            events.append(
                {
                    "name": _label(step),
                    "cat": step.kind,
                    "ph": "X",
                    "pid": 0,
                    "tid": rank,
                    "ts": 1e6 * start,
                    "dur": 1e6 * (end - start),
                    "args": {f"{half.kind}{half.microbatch}": _where(half) for half in step.halves},
                }
            )
            for moment, kinds, change in ((start, "F", 1), (end, "BW", -1)):
                moves = change * sum(half.kind in kinds for half in step.halves)
                if moves:
                    held += moves
                    events.append(_counter(rank, moment, held))
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, separators=(",", ":"))


def draw_svg(timeline: Timeline, title: str = "", width: int = 1200) -> str:
    """Return a self-contained picture, `width` pixels wide: a row per rank, a colour per kind of work.

    Micro-batches have their numbers where these fit. Raises ValueError for a width below 400.
    """
    if width < 400:
        raise ValueError(f"width = {width}: a picture needs at least 400 pixels")
    schedule, title = timeline.schedule, escape(title or _title(timeline))
    bottom = TOP + schedule.ranks * (ROW + GAP)
    height = bottom + 28
    scale = (width - LEFT - RIGHT) / (timeline.seconds or 1.0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{title}" viewBox="0 0 {width} {height:.0f}" '
        f'width="{width}" height="{height:.0f}" font-family="Helvetica, Arial, sans-serif" font-size="{FONT:g}" '
        f'fill="{INK}">',
        f'<rect width="{width}" height="{height:.0f}" fill="#ffffff"/>',
        f'<text x="{LEFT:g}" y="20" font-size="14" font-weight="bold">{title}</text>',
        *_legend(timeline),
        *_axis(timeline, scale, bottom),
        *_rows(timeline, width),
        *_cells(timeline, scale),
        "</svg>",
    ]
    return "\n".join(parts)


def _label(step: Step) -> str:
    return "&".join(f"{half.kind}{half.microbatch}" for half in step.halves)


def _where(half: Action) -> str:
    return f"stage {half.stage}" + (f", direction {half.direction}" if half.direction else "")


def _counter(rank: int, moment: float, held: int) -> dict[str, Any]:
    name = f"activations of rank {rank}"
    return {"name": name, "ph": "C", "pid": 0, "tid": rank, "ts": 1e6 * moment, "args": {"held": held}}


def _columns(timeline: Timeline, rank: int, columns: int) -> list[tuple[Step, int, int]]:
    scale = columns / (timeline.seconds or 1.0)
    moments = zip(timeline.start[rank], timeline.end[rank], strict=True)
    return [
        (step, round(start * scale), round(end * scale))
        for step, (start, end) in zip(timeline.schedule.actions[rank], moments, strict=True)
    ]


def _fits(timeline: Timeline, rank: int, columns: int) -> bool:
    return all(end - start >= len(_label(step)) for step, start, end in _columns(timeline, rank, columns))


def _labelled_row(timeline: Timeline, rank: int, columns: int) -> str:
    shades, row = _shades(timeline, rank), ["."] * columns
    for step, start, end in _columns(timeline, rank, columns):
        label = "&".join(f"{_letter(half, shades)}{half.microbatch}" for half in step.halves)
        row[start:end] = f"{label:-<{end - start}}"
    return "".join(row)


def _letter_row(timeline: Timeline, rank: int, columns: int) -> str:
    shades, scale = _shades(timeline, rank), columns / (timeline.seconds or 1.0)
    shares: list[dict[str, float]] = [defaultdict(float) for _ in range(columns)]
    moments = zip(timeline.start[rank], timeline.end[rank], strict=True)
    for step, (start, end) in zip(timeline.schedule.actions[rank], moments, strict=True):
        letter = _letter(step, shades) if isinstance(step, Action) else "X"
        for column in range(int(start * scale), min(columns, math.ceil(end * scale))):
            shares[column][letter] += min(end * scale, column + 1) - max(start * scale, column)
    for share in shares:
        share["."] = 1.0 - sum(share.values())
    return "".join(max(share, key=lambda letter: share[letter]) for share in shares)


def _letter(half: Action, shades: dict[tuple[int, int], int]) -> str:
    return half.kind.lower() if shades[half.stage, half.direction] else half.kind


def _title(timeline: Timeline) -> str:
    schedule = timeline.schedule
    return f"{schedule.name}: {schedule.ranks} ranks, {schedule.microbatches} micro-batches"


def _shades(timeline: Timeline, rank: int) -> dict[tuple[int, int], int]:
    """Return the shade, 0 or 1, of each (stage, direction) that `rank` holds; direction 0 is light everywhere."""
    held = sorted(timeline.schedule.held_by(rank), key=lambda place: (place[1], place[0]))
    return {place: min(index, 1) for index, place in enumerate(held)}


def _is_shaded(timeline: Timeline) -> bool:
    return len(timeline.schedule.held_by(0)) > 1


def _has_pairs(timeline: Timeline) -> bool:
    return any(step.kind == "FB" for steps in timeline.schedule.actions for step in steps)


def _rows(timeline: Timeline, width: int) -> list[str]:
    parts = []
    for rank, idle in enumerate(timeline.bubble):
        top = TOP + rank * (ROW + GAP)
        share = 100 * idle / (timeline.seconds or 1.0)
        middle = top + ROW / 2 + FONT * 0.36
        parts += [
            f'<rect x="{LEFT:g}" y="{top:g}" width="{width - LEFT - RIGHT:g}" height="{ROW:g}" fill="{IDLE}"/>',
            f'<text x="{LEFT - 8:g}" y="{middle:.1f}" text-anchor="end">rank {rank}</text>',
            f'<text x="{width - RIGHT + 8:g}" y="{middle:.1f}" fill="{MUTED}">{share:.1f} % idle</text>',
        ]
    return parts


def _cells(timeline: Timeline, scale: float) -> list[str]:
    """Draw all steps: one path for each colour, then the numbers of micro-batches where they fit."""
    paths: dict[str, list[str]] = defaultdict(list)
    numbers: dict[float, list[str]] = defaultdict(list)  # by font size
    longest = len(str(timeline.schedule.microbatches - 1))  # a row shows all its numbers or none
    for rank, steps in enumerate(timeline.schedule.actions):
        shades = _shades(timeline, rank)
        top = TOP + rank * (ROW + GAP)
        for step, start, end in zip(steps, timeline.start[rank], timeline.end[rank], strict=True):
            halves = step.halves
            x, cell, row = LEFT + start * scale, (end - start) * scale, ROW / len(halves)
            for index, half in enumerate(halves):
                y, shade = top + index * row, shades[half.stage, half.direction]
                paths[FILL[half.kind][shade]].append(f"M{x:.2f} {y:g}h{cell:.2f}v{row:g}h-{cell:.2f}z")
                size = min(FONT if row == ROW else FONT - 2, (cell - 1.5) / (DIGIT * longest))
                if size >= 6:
                    place = f'x="{x + cell / 2:.1f}" y="{y + row / 2 + size * 0.36:.1f}"'
                    numbers[round(2 * size) / 2].append(f"<text {place}>{half.microbatch}</text>")
    parts = [
        f'<path fill="{fill}" stroke="#ffffff" stroke-width="0.6" d="{"".join(path)}"/>' for fill, path in paths.items()
    ]
    for size, texts in numbers.items():
        parts.append(f'<g text-anchor="middle" font-size="{size:g}">{"".join(texts)}</g>')
    return parts


def _legend(timeline: Timeline) -> list[str]:
    kinds = {half.kind for steps in timeline.schedule.actions for step in steps for half in step.halves}
    is_shaded = _is_shaded(timeline)
    x, y, parts = LEFT, 32.0, []
    for kind, name in NAMES.items():
        if kind in kinds:
            parts += _swatch(x, y, FILL[kind] if is_shaded else FILL[kind][:1], name)
            x += 37 + 6.2 * len(name)
    parts += _swatch(x, y, (IDLE,), "idle")
    x += 58
    other = "from the other end" if len(timeline.schedule.placement) > 1 else "the rank's other stages"
    notes = [f"dark: {other}"] if is_shaded else []
    notes += ["two rows: both at once"] if _has_pairs(timeline) else []
    if notes:
        parts.append(f'<text x="{x:g}" y="{y + 10:g}" fill="{MUTED}">{"; ".join(notes)}</text>')
    return parts


def _swatch(x: float, y: float, fills: tuple[str, ...], name: str) -> list[str]:
    parts = [
        f'<rect x="{x + 10 * index:g}" y="{y:g}" width="{20 / len(fills):g}" height="13" fill="{fill}"/>'
        for index, fill in enumerate(fills)
    ]
    return [*parts, f'<text x="{x + 25:g}" y="{y + 10:g}">{name}</text>']


def _axis(timeline: Timeline, scale: float, bottom: float) -> list[str]:
    """Draw five to ten ticks at round times."""
    total = timeline.seconds
    if not total:
        return []
    decade = 10.0 ** int(f"{total / 10:e}".split("e")[1])
    step = next(decade * factor for factor in (1, 2, 5, 10) if decade * factor >= total / 10)
    unit, size = next((pair for pair in UNITS if total >= pair[1]), UNITS[-1])
    parts = []
    for index in range(int(total / step) + 1):
        x, value = LEFT + index * step * scale, index * step / size
        parts.append(f'<path d="M{x:.1f} {TOP - 4:g}V{bottom + 2:g}" stroke="{GRID}"/>')
        label = f"{value:.6g}" + (f" {unit}" if index == 0 else "")
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16:g}" text-anchor="middle" fill="{MUTED}">{label}</text>')
    return parts
