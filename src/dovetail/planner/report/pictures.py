"""Draws the pictures of a plan's page as SVG: bars, memory by rank, and scatter plots.

Colours are the page's CSS variables (--ink, --muted, --grid, --c0 to --c8), so that a picture is light or dark as the
page is. The timeline is drawn by `planner.report.drawing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from dovetail.cost.memory.rank import RankMemory
from dovetail.planner.figure import number
from dovetail.spec.band import Band

WIDTH = 940.0  # pixels of every picture; the page scales them
USES = ("weights", "gradients", "master_weights", "moments", "activations", "buffers")


@dataclass(frozen=True, slots=True)
class Point:
    """A dot: its place, the text that a pointer over it shows, and whether it is the plan."""

    x: float
    y: float
    label: str
    is_plan: bool = False


@dataclass(frozen=True, slots=True)
class Bar:
    """A value with its band and its text. All bars of a picture have the same unit."""

    name: str
    band: Band
    text: str


def bars(items: Sequence[Bar]) -> str:
    """Draw a horizontal bar for each item, from 0, with the band as a whisker."""
    left, right, row = 290.0, 110.0, 30.0
    most = max((item.band.high for item in items), default=0.0) or 1.0
    scale = (WIDTH - left - right) / most
    parts = []
    for index, item in enumerate(items):
        top = index * row
        middle, band = top + row / 2, item.band
        low, high = left + band.low * scale, left + band.high * scale
        parts += [
            _text(left - 12, middle + 4, item.name, anchor="end"),
            _box(left, top + 6, max(1.0, band.value * scale), row - 12, 0, f"{item.name}: {item.text}"),
            f'<path class="whisker" d="M{low:.1f} {middle:.1f}H{high:.1f}M{low:.1f} {middle - 5:.1f}v10'
            f'M{high:.1f} {middle - 5:.1f}v10"/>',
            _text(max(high, left + band.value * scale) + 10, middle + 4, item.text),
        ]
    return _svg(parts, row * len(items) + 4, "where the time goes")


def memory_bars(memory: Sequence[RankMemory], capacity: float, runtime: float) -> str:
    """Draw a bar for each pipeline rank, stacked by use, and a line where the GPU is full."""
    names = [*(name.replace("_", " ") for name in USES), "runtime"]
    bars_of = [[*(float(getattr(rank, name)) for name in USES), runtime] for rank in memory]
    return _stacked([f"rank {rank.rank}" for rank in memory], names, bars_of, capacity)


def pool_memory(rows: Sequence[tuple[str, dict[str, float]]], capacity: float) -> str:
    """Draw the same for pools of serving, given as bytes by use; all pools have the same uses."""
    names = list(dict.fromkeys(name for _, uses in rows for name in uses))
    bars_of = [[uses.get(name, 0.0) for name in names] for _, uses in rows]
    return _stacked([title for title, _ in rows], names, bars_of, capacity)


def scatter(points: Sequence[Point], x_title: str, y_title: str, is_joined: bool = True) -> str:
    """Draw dots, joined in the order of x; the plan's dot is larger and has its label beside it."""
    left, right, top, height = 70.0, 40.0, 16.0, 330.0
    bottom = top + height
    xs, ys = _range([point.x for point in points]), _range([point.y for point in points])

    def place(point: Point) -> tuple[float, float]:
        x = left + (point.x - xs[0]) / (xs[1] - xs[0]) * (WIDTH - left - right)
        return x, bottom - (point.y - ys[0]) / (ys[1] - ys[0]) * height

    parts = []
    for value in _ticks(*xs):
        x = place(Point(value, ys[0], ""))[0]
        parts += [
            f'<path class="grid" d="M{x:.1f} {top:g}V{bottom:g}"/>',
            _text(x, bottom + 18, number(value), "middle"),
        ]
    for value in _ticks(*ys):
        y = place(Point(xs[0], value, ""))[1]
        parts += [f'<path class="grid" d="M{left:g} {y:.1f}H{WIDTH - right:g}"/>']
        parts += [_text(left - 8, y + 4, number(value), "end")]
    ordered = sorted(points, key=lambda point: (point.x, -point.y))
    if is_joined and len(ordered) > 1:
        line = "L".join("{:.1f} {:.1f}".format(*place(point)) for point in ordered)
        parts.append(f'<path class="line" d="M{line}"/>')
    for point in sorted(ordered, key=lambda point: point.is_plan):
        x, y = place(point)
        kind, radius = ("plan", 7) if point.is_plan else ("dot", 4.5)
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{_title(point.label)}</circle>')
        if point.is_plan:
            side = "end" if x > WIDTH * 0.6 else "start"
            shift = -12 if side == "end" else 12
            parts.append(_text(x + shift, y - 10 if y > top + 30 else y + 20, point.label, side, "strong"))
    parts.append(_text(left + (WIDTH - left - right) / 2, bottom + 40, x_title, "middle", "muted"))
    parts.append(
        f'<text class="muted" text-anchor="middle" transform="translate(16 {top + height / 2:g}) rotate(-90)">'
        f"{escape(y_title)}</text>"
    )
    return _svg(parts, bottom + 48, f"{y_title} against {x_title}")


def _stacked(titles: Sequence[str], names: Sequence[str], rows: Sequence[Sequence[float]], capacity: float) -> str:
    left, right, row, head = 90.0, 90.0, 24.0, 44.0
    most = max(capacity, *(sum(each) for each in rows)) * 1.02
    scale = (WIDTH - left - right) / most
    parts, x = [], left
    for index, name in enumerate(names):
        parts += [_box(x, 4, 12, 12, index), _text(x + 17, 14, name)]
        x += 36 + 7.8 * len(name)
    for line, (title, sizes) in enumerate(zip(titles, rows, strict=True)):
        top, x, total = head + line * row, left, sum(sizes)
        parts.append(_text(left - 10, top + row / 2 + 4, title, "end"))
        for index, (name, size) in enumerate(zip(names, sizes, strict=True)):
            parts.append(_box(x, top + 3, size * scale, row - 6, index, f"{title}, {name}: {size / 1e9:.2f} GB"))
            x += size * scale
        kind = "over" if total > capacity else ""
        parts.append(_text(WIDTH - right + 8, top + row / 2 + 4, f"{total / 1e9:.1f} GB", "start", kind))
    full, bottom = left + capacity * scale, head + row * len(rows)
    parts.append(f'<path class="limit" d="M{full:.1f} {head - 4:g}V{bottom + 4:g}"/>')
    parts.append(_text(full, head - 8, f"{capacity / 1e9:.1f} GB", "end", "muted"))
    return _svg(parts, bottom + 8, "memory by rank")


def _svg(parts: Sequence[str], height: float, label: str) -> str:
    body = "\n".join(parts)
    box = f'viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(label)}"'
    return f'<svg class="picture" {box}>\n{body}\n</svg>'


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, colour: int, label: str = "") -> str:
    size = f'x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}"'
    return f'<rect {size} style="fill:var(--c{colour})">{_title(label)}</rect>'


def _title(label: str) -> str:
    return f"<title>{escape(label)}</title>" if label else ""


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the range of `values` with a margin on both sides; it is never empty, and never below 0."""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return max(0.0, low - margin), high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Return four to ten round numbers."""
    decade = 10.0 ** int(f"{(high - low) / 5:e}".split("e")[1])
    step = next(decade * factor for factor in (1, 2, 5, 10) if (high - low) / (decade * factor) <= 8)
    first = int(low / step) + (low > 0)
    return [index * step for index in range(first, int(high / step) + 1)]
