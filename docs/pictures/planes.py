"""planes.svg: eight planes of two layers of switches beside one network of three layers: what they are made of, what
they cost, and what the loss of a part takes. Numbers are of the wired fabrics of the catalog and of their bills."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from canvas import GREY, INK, LINE, MARGIN, MUTED, RED, Canvas, Point, broken

from dovetail.catalog.fabrics import load_fabric
from dovetail.network.fabric.checks import check_graph
from dovetail.network.fabric.price import bill
from dovetail.network.fabric.show import PLANE_INKS
from dovetail.network.fabric.topology import Fabric, build

WIDTH, HALF = 1000.0, 456.0
GPUS = 8
STEP = HALF / GPUS
LOST = 3  # the plane that fails in the lower picture
NUMBERS = {2: "two", 3: "three"}


def draw(directory: Path) -> Path:
    planes, layers = build(load_fabric("mpft")), build(load_fabric("ft3"))
    assert planes.gpus_per_node == layers.gpus_per_node == planes.planes == GPUS
    canvas = Canvas(
        WIDTH,
        742,
        "Eight planes of two layers of switches, or one network of three",
        f"On the left GPU i of each node has its NIC on plane i, one of {GPUS} separate networks of two layers of "
        "switches. On the right all NICs are on one network of three layers. Below: with a plane lost, GPUs send over "
        "NVLink through the NICs of their neighbours; with a leaf switch lost, its nodes are cut off.",
    )
    left, right = MARGIN, WIDTH - MARGIN - HALF
    for x, fabric, name in ((left, planes, "Eight planes"), (right, layers, "One network")):
        text = f"{name} of {NUMBERS[fabric.spec.layers]} layers"
        canvas.text(x, 72, text, size=15, anchor="start", bold=True)
        canvas.text(x + HALF, 72, f"fabric {fabric.name}", size=12.5, anchor="end", fill=MUTED)
        _facts(canvas, x, 326, fabric)
    _planes(canvas, left, 90, lost=None)
    _layers(canvas, right, 90, is_leaf_lost=False)
    canvas.line((MARGIN, 364), (WIDTH - MARGIN, 364), color="#d1d5db", width=1)
    _losses(canvas, left, right, planes, layers)
    smaller = build(load_fabric("ft3", planes.endpoints))
    assert bill(smaller).dollars_per_endpoint == bill(layers).dollars_per_endpoint
    canvas.caption(
        f"For {smaller.endpoints:,} GPUs three layers take {smaller.switches:,} switches, at the same price per GPU. "
        "Prices are of switches and of the cables between them [ISCA Table 3]. GPUs on different planes reach each "
        "other over NVLink, within the sender's node."
    )
    return canvas.save(directory / "planes.svg")


def _facts(canvas: Canvas, x: float, y: float, fabric: Fabric) -> None:
    facts = (
        ("GPUs at most", f"{fabric.endpoints:,}"),
        ("switches", f"{fabric.switches:,}"),
        ("hops, leaf to leaf", f"{check_graph(fabric).diameter}"),
        ("per GPU", f"${bill(fabric).dollars_per_endpoint:,.0f}"),
    )
    for index, (name, value) in enumerate(facts):
        middle = x + (index + 0.5) * HALF / len(facts)
        canvas.text(middle, y, value, size=18, bold=True)
        canvas.text(middle, y + 18, name, size=12, fill=MUTED)


def _planes(canvas: Canvas, x: float, y: float, lost: int | None) -> None:
    """Two spines and two leaves stand for each plane."""
    for plane in range(GPUS):
        middle, ink = x + (plane + 0.5) * STEP, LINE if plane == lost else PLANE_INKS[plane]
        columns = (middle - 13, middle + 13)
        canvas.text(middle, y + 12, f"plane {plane}", size=11.5, fill=RED.ink if plane == lost else INK)
        for upper in columns:
            for lower in columns:
                canvas.line((upper, y + 32), (lower, y + 92), color=ink, width=1)
        canvas.line((columns[0], y + 92), (middle, y + 160), color=ink, width=2, dashed=plane == lost)
        for place in [(column, row) for column in columns for row in (y + 32, y + 92)]:
            _switch(canvas, place, ink)
        if plane == lost:
            _cross(canvas, (middle, y + 62), 26, 40)
    _node(canvas, x, y + 160, cut_off=() if lost is None else (lost,))


def _layers(canvas: Canvas, x: float, y: float, is_leaf_lost: bool) -> None:
    """Two pods of four leaves and four spines, and four cores, stand for all."""
    columns = [x + (place + 0.5) * STEP for place in range(GPUS)]
    cores = [x + (place + 0.5) * HALF / 4 for place in range(4)]
    for place, column in enumerate(columns):
        for above in (place % 4, (place + 1) % 4):
            canvas.line((cores[above], y + 12), (column, y + 52), color=PLANE_INKS[0], width=1)
        for leaf in range(place // 4 * 4, place // 4 * 4 + 4):
            ink = LINE if is_leaf_lost and leaf == 0 else PLANE_INKS[0]
            canvas.line((column, y + 52), (columns[leaf], y + 92), color=ink, width=1)
        ink = LINE if is_leaf_lost else PLANE_INKS[0]
        canvas.line((columns[0], y + 92), (column, y + 160), color=ink, width=2, dashed=is_leaf_lost)
    for row, places in ((y + 12, cores), (y + 52, columns), (y + 92, columns)):
        for across in places:
            _switch(canvas, (across, row), PLANE_INKS[0])
    if is_leaf_lost:
        _switch(canvas, (columns[0], y + 92), LINE)
        _cross(canvas, (columns[0], y + 92), 13, 13)
    _node(canvas, x, y + 160, cut_off=tuple(range(GPUS)) if is_leaf_lost else ())


def _node(canvas: Canvas, x: float, y: float, cut_off: tuple[int, ...]) -> None:
    """Its GPUs, those without a NIC of their own in grey."""
    for gpu in range(GPUS):
        fill, ink = (GREY.fill, GREY.ink) if gpu in cut_off else (INK, "#ffffff")
        canvas.rectangle(x + (gpu + 0.5) * STEP - 22, y, 44, 24, fill=fill, stroke=LINE, radius=4)
        canvas.text(x + (gpu + 0.5) * STEP, y + 16.5, f"GPU {gpu}", size=11.5, fill=ink)
    canvas.rectangle(x + STEP / 2 - 22, y + 28, HALF - STEP + 44, 20, fill=GREY.ink, radius=3)
    canvas.text(x + STEP / 2 - 12, y + 42, "NVLink of a node", size=11.5, anchor="start", fill="#ffffff")


def _losses(canvas: Canvas, left: float, right: float, planes: Fabric, layers: Fabric) -> None:
    """The same pictures with a part that has failed, and what that takes."""
    top, below = 406.0, 636.0
    share = f"1/{1 / float(np.mean(planes.home_plane == LOST)):.0f}"
    nodes = int(np.bincount(layers.leaf[:, 0]).max()) // GPUS
    for x, title, text in (
        (
            left,
            f"Plane {LOST} is lost, and {share} of the bandwidth",
            f"GPU {LOST} of every node sends over NVLink through its neighbours' NICs, so nobody is cut off.",
        ),
        (
            right,
            f"A leaf is lost: {nodes} nodes are cut off",
            f"All NICs of a node are on that one switch. On planes a lost leaf takes no more than {share} of its "
            "nodes' bandwidth.",
        ),
    ):
        canvas.text(x, top - 16, title, size=15, anchor="start", bold=True)
        canvas.paragraph(x, below, broken(text, HALF, 13), fill=MUTED)
    _planes(canvas, left, top, lost=LOST)
    _layers(canvas, right, top, is_leaf_lost=True)
    # From the GPU whose NIC is dark, over NVLink, to the NICs beside it.
    bar, foot, middle = top + 200, top + 184, left + (LOST + 0.5) * STEP
    for way in (-1, 1):
        start, to = middle + way * 5, middle + way * STEP
        canvas.arrow((start, foot), (start, bar), (to, bar), (to, foot), color="#ffb3ad", width=2.5)


def _switch(canvas: Canvas, place: Point, ink: str) -> None:
    canvas.rectangle(place[0] - 7, place[1] - 7, 14, 14, fill=ink, radius=2)


def _cross(canvas: Canvas, place: Point, across: float, down: float) -> None:
    for way in (-1, 1):
        ends = [(place[0] + side * across, place[1] + side * way * down) for side in (-1, 1)]
        canvas.line(*ends, color=RED.border, width=3)
