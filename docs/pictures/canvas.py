"""Boxes, arrows and text as one SVG file that needs nothing else: a light card of its own, so that it reads alike on a
light and on a dark page, text that stays text, and a title and a description for those who listen to it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

PAPER, INK, MUTED, LINE = "#ffffff", "#22272e", "#59636e", "#9aa4af"
FONT = "Helvetica, Arial, sans-serif"
MARGIN = 24.0
LEADING = 1.3  # from one line of text to the next, of its size
LETTER = 0.58  # mean width of a letter of a wide font, of its size
HEAD = 8.0  # length of an arrow's head


class Tint(NamedTuple):
    """The fill of a box, the colour of its border, and that of text and arrows which belong to it."""

    fill: str
    border: str
    ink: str


BLUE = Tint("#dbe9f8", "#5b94cf", "#1f5fa8")
GREEN = Tint("#dcf0e1", "#4fa367", "#23743c")
ORANGE = Tint("#fbe9cd", "#dfa23c", "#93600a")
PURPLE = Tint("#e8e0f5", "#8a6fc0", "#5d3fa0")
RED = Tint("#f8dedc", "#c0605a", "#a0322b")
GREY = Tint("#eef0f3", "#9aa4af", "#59636e")

Point = tuple[float, float]


class Canvas:
    """A picture that is drawn on; what is drawn later lies above. Pixels go right and down from the upper left."""

    def __init__(self, width: float, height: float, title: str, description: str) -> None:
        self.width, self.height = width, height
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-labelledby="title desc" '
            f'viewBox="0 0 {number(width)} {number(height)}" width="{number(width)}" height="{number(height)}" '
            f'font-family="{FONT}" fill="{INK}">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="desc">{escape(description)}</desc>',
        ]
        self.rectangle(0.5, 0.5, width - 1, height - 1, fill=PAPER, stroke="#d1d5db", radius=10)
        self.text(MARGIN, 36, title, size=19, anchor="start", bold=True)

    def save(self, path: Path) -> Path:
        path.write_text("\n".join([*self.parts, "</svg>"]) + "\n", encoding="utf-8", newline="\n")
        return path

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 13,
        anchor: str = "middle",
        fill: str = INK,
        bold: bool = False,
    ) -> None:
        """One line whose baseline is at y."""
        look = f' font-size="{number(size)}"' + ("" if anchor == "start" else f' text-anchor="{anchor}"')
        look += ("" if fill == INK else f' fill="{fill}"') + (' font-weight="bold"' if bold else "")
        self.parts.append(f'<text x="{number(x)}" y="{number(y)}"{look}>{escape(text, quote=False)}</text>')

    def paragraph(
        self,
        x: float,
        y: float,
        lines: Sequence[str],
        *,
        size: float = 13,
        anchor: str = "start",
        fill: str = INK,
    ) -> None:
        """Lines under each other, the first baseline at y."""
        for index, line in enumerate(lines):
            self.text(x, y + index * size * LEADING, line, size=size, anchor=anchor, fill=fill)

    def rectangle(
        self, x: float, y: float, width: float, height: float, *, fill: str, stroke: str = "none", radius: float = 0
    ) -> None:
        look = ("" if stroke == "none" else f' stroke="{stroke}"') + (f' rx="{number(radius)}"' if radius else "")
        place = f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
        self.parts.append(f'<rect {place} fill="{fill}"{look}/>')

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        tint: Tint,
        name: str,
        *notes: str,
        size: float = 13,
    ) -> None:
        """A box with its name in bold and notes under it, all of it in the middle."""
        self.rectangle(x, y, width, height, fill=tint.fill, stroke=tint.border, radius=5)
        note = size - 1.5
        tall = size + len(notes) * note * LEADING
        baseline = y + (height - tall) / 2 + size * 0.85
        self.text(x + width / 2, baseline, name, size=size, bold=True)
        self.paragraph(x + width / 2, baseline + note * LEADING, notes, size=note, anchor="middle", fill=MUTED)

    def line(self, *points: Point, color: str = LINE, width: float = 1.5, dashed: bool = False) -> None:
        """Through all points."""
        path = "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{number(width)}"{dashes}/>')

    def arrow(self, *points: Point, color: str = MUTED, width: float = 1.5) -> None:
        """Through all points, with a head at the last."""
        (from_x, from_y), (x, y) = points[-2:]
        long = math.hypot(x - from_x, y - from_y)
        along = ((x - from_x) / long, (y - from_y) / long)
        foot = (x - HEAD * along[0], y - HEAD * along[1])
        self.line(*points[:-1], foot, color=color, width=width)
        side = (-along[1] * HEAD * 0.45, along[0] * HEAD * 0.45)
        corners = [(x, y), (foot[0] + side[0], foot[1] + side[1]), (foot[0] - side[0], foot[1] - side[1])]
        path = "M" + "L".join(f"{number(a)} {number(b)}" for a, b in corners) + "z"
        self.parts.append(f'<path d="{path}" fill="{color}"/>')

    def caption(self, text: str) -> None:
        """Sentences at the bottom."""
        size = 13.0
        lines = broken(text, self.width - 2 * MARGIN, size)
        top = self.height - MARGIN - (len(lines) - 1) * size * LEADING + 4
        self.paragraph(MARGIN, top, lines, size=size, fill=MUTED)


def broken(text: str, width: float, size: float) -> list[str]:
    """Lines that fit in `width` in a wide font."""
    return textwrap.wrap(text, int(width / (LETTER * size)))


def number(value: float) -> str:
    """Without a fraction where there is none, with one digit elsewhere: the same text on every machine."""
    return f"{value:.1f}".removesuffix(".0")
