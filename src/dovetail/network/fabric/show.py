"""Describes a fabric as text and as a picture: layers or groups, a node, parts and prices, checks."""

from __future__ import annotations

import math
from dataclasses import asdict
from html import escape
from typing import Any

import numpy as np

from dovetail.network.fabric.checks import GraphReport, check_graph
from dovetail.network.fabric.price import Bill, bill
from dovetail.network.fabric.topology import KINDS, SWITCH, Fabric

INK, MUTED, PAPER = "#22272e", "#6b7280", "#ffffff"
PLANE_INKS = ("#5b94cf", "#4fa367", "#dfa23c", "#c0605a", "#8a6fc0", "#3fa3a3", "#b0719f", "#7d8a4c")
_DRAWN = 8  # at most so many switches of a layer are drawn
_CIRCLE = 64  # at most so many groups are drawn
_MARGIN = 150.0  # pixels for labels
_ORDER = {2: ("leaf", "spine"), 3: ("leaf", "spine", "core")}


def as_json(fabric: Fabric) -> dict[str, Any]:
    """Return sizes, parts, price and checks as plain data."""
    priced = bill(fabric)
    cables = np.bincount(fabric.kind, minlength=len(KINDS)) // 2
    return {
        "name": fabric.name,
        "source": fabric.spec.source,
        "endpoints": fabric.endpoints,
        "nodes": fabric.nodes,
        "planes": fabric.planes,
        "switches": fabric.switches,
        "cables": dict(zip(KINDS, cables.tolist(), strict=True)),
        "parts": [asdict(part) | {"total": part.total} for part in priced.parts],
        "dollars": priced.dollars,
        "dollars_per_endpoint": priced.dollars_per_endpoint,
        "price_basis": priced.basis.source,
        "graph": asdict(check_graph(fabric)),
    }


def show(fabric: Fabric) -> str:
    """Return the text: a drawing, the parts with their prices, and the checks."""
    spec = fabric.spec
    drawing = _fat_tree_text(fabric) if spec.kind == "fat-tree" else _groups_text(fabric)
    head = [
        f"{fabric.name}: {fabric.endpoints:,} GPUs in {fabric.nodes:,} nodes of {fabric.gpus_per_node}, "
        f"{fabric.switches:,} switches, {_switch_cables(fabric):,} cables between switches",
        f"source: {spec.source}",
        "",
    ]
    tail = [_node_text(fabric), "", *_bill_text(bill(fabric)), "", *_checks_text(check_graph(fabric))]
    return "\n".join([*head, *drawing, *tail])


def _switch_cables(fabric: Fabric) -> int:
    return int(np.count_nonzero(fabric.kind == SWITCH)) // 2


def _fat_tree_text(fabric: Fabric) -> list[str]:
    """Draw one plane from the top; a row of circles is a layer."""
    layers = fabric.switch_layer[fabric.switch_plane == 0]
    lines = [f"plane 0 of {fabric.planes}, the others alike:" if fabric.planes > 1 else "one network:"]
    for layer in range(int(layers.max()), -1, -1):
        count = int(np.count_nonzero(layers == layer))
        up, down = _cables_up_and_down(fabric, layer)
        name = _ORDER[fabric.spec.layers][layer]
        lines.append(f"  {count:>6,} {name:<6} {_symbols(count)}   {up} up, {down} down")
        lines.append(f"{'':17}{_braid(count)}")
    attached = int(np.count_nonzero(fabric.leaf[:, 0] >= 0))
    return [*lines, f"  {attached:>6,} NICs"]


def _cables_up_and_down(fabric: Fabric, layer: int) -> tuple[int, int]:
    """Return the most cables up and down that a switch of the layer has, on plane 0."""
    first = fabric.first_switch
    members = first + np.flatnonzero((fabric.switch_plane == 0) & (fabric.switch_layer == layer))
    leaving = np.isin(fabric.link_from, members)
    height = np.full(fabric.vertices, -1)
    height[first : first + fabric.switches] = fabric.switch_layer
    counts = [
        np.bincount(fabric.link_from[leaving & chosen], minlength=1)
        for chosen in (height[fabric.link_to] > layer, height[fabric.link_to] < layer)
    ]
    return int(counts[0].max()), int(counts[1].max())


def _symbols(count: int) -> str:
    return " ".join("o" * count) if count <= _DRAWN else " ".join("o" * (_DRAWN - 2)) + " .. o"


def _braid(count: int) -> str:
    return "|" if count == 1 else "|" + "X|" * (min(count, _DRAWN) - 1)


def _groups_text(fabric: Fabric) -> list[str]:
    groups = fabric.switch_group[fabric.switch_plane == 0]
    number, size = int(groups.max()) + 1, int(np.count_nonzero(groups == 0))
    own = fabric.kind == SWITCH
    one, other = fabric.link_from[own] - fabric.first_switch, fabric.link_to[own] - fabric.first_switch
    of_first = one == 0
    inside = int(np.count_nonzero(fabric.switch_group[other[of_first]] == 0))
    outside = int(np.count_nonzero(of_first)) - inside
    word = "group" if fabric.spec.kind == "dragonfly" else "column"
    held = np.bincount(fabric.leaf[:, 0] - fabric.first_switch)
    return [
        f"plane 0 of {fabric.planes}, the others alike:" if fabric.planes > 1 else "one network:",
        f"  {number} {word}s of {size} switches   [ {_symbols(size)} ] = [ {_symbols(size)} ] = ..",
        f"  a switch: {inside} cables within its {word}, {outside} to others, {int(held.max())} NICs at most",
    ]


def _node_text(fabric: Fabric) -> str:
    spec, gpus = fabric.spec, fabric.gpus_per_node
    up = f"NVLink {spec.nvlink.gbs:g} GB/s one way" if spec.nvlink and gpus > 1 else "no NVLink"
    lanes = f", PCIe {spec.pcie.gbs:g} GB/s" if spec.pcie else ""
    if fabric.planes > 1:
        on = "each on all planes" if spec.planes_per_nic > 1 else f"GPU i on plane i mod {fabric.planes}"
    else:
        on = "GPU i on the leaves of rail i" if spec.by_rail else "on the same network"
    storage = f"; storage: a NIC of {spec.storage.nic.gbs:g} GB/s" if spec.storage else ""
    return f"a node: {gpus} GPUs, {up}{lanes}, a NIC of {spec.nic.gbs:g} GB/s each, {on}{storage}"


def _bill_text(priced: Bill) -> list[str]:
    lines = []
    for part in priced.parts:
        cost = f"x ${part.dollars:>9,.0f} = ${part.total / 1e6:,.2f}M" if part.dollars is not None else "not priced"
        lines.append(f"  {part.quantity:>9,} {part.name:<30} {cost}" + (f"   ({part.note})" if part.note else ""))
    lines.append(f"  ${priced.dollars / 1e6:,.2f}M, ${priced.dollars_per_endpoint / 1e3:,.2f}k per GPU")
    return [*lines, f"  prices: {priced.basis.source}"]


def _checks_text(graph: GraphReport) -> list[str]:
    fewest, most = graph.neighbours
    neighbours = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    lines = [
        f"  ports: {graph.ports} of {graph.radix} used; {neighbours} cables to other switches",
        f"  hops between switches with GPUs: {graph.diameter} at most, {graph.mean_hops:.3g} in the mean"
        if graph.is_connected
        else "  NOT CONNECTED",
    ]
    cut = graph.bisection
    if cut is not None:
        cables = f"{cut.low:,.0f}" if cut.low == cut.high else f"{cut.low:,.0f} to {cut.high:,.0f}"
        lines.append(f"  bisection: {cables} cables, at least {cut.share:.0%} of half the NICs ({cut.method})")
    return lines


def draw_svg(fabric: Fabric, width: int = 1000) -> str:
    """Return a self-contained picture: the planes of a fat tree side by side over one node, or the groups in a circle.

    Of large layers only a few switches are drawn; the labels have the numbers. Raises ValueError for a width below 400.
    """
    if width < 400:
        raise ValueError(f"width = {width}: a picture needs at least 400 pixels")
    body, height = _fat_tree_picture(fabric, width) if fabric.spec.kind == "fat-tree" else _circle(fabric, width)
    title = f"{fabric.name}: {fabric.endpoints:,} GPUs, {fabric.switches:,} switches"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {width} {height:.0f}" width="{width}" '
            f'height="{height:.0f}" font-family="sans-serif" font-size="12">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height:.0f}" fill="{PAPER}"/>',
            _text(20, 26, title, INK, size=16),
            *body,
            "</svg>",
        ]
    )


def _fat_tree_picture(fabric: Fabric, width: int) -> tuple[list[str], float]:
    layers = fabric.switch_layer[fabric.switch_plane == 0]
    counts = np.bincount(layers)
    top, step = 80.0, 70.0
    panel = (width - _MARGIN - 20) / fabric.planes
    drawn = [min(max(2, min(_DRAWN, int(panel / 26))), int(count)) for count in counts]
    height = [top + step * (len(counts) - 1 - layer) for layer in range(len(counts))]
    lines, marks, leaves = [], [], []
    for plane in range(fabric.planes):
        ink, left = PLANE_INKS[plane % len(PLANE_INKS)], _MARGIN + plane * panel
        rows = [_row(left, panel, each) for each in drawn]
        for layer, row in enumerate(rows):
            y = height[layer]
            if layer:
                lines += [_line(x, y, below, height[layer - 1], ink) for x in row for below in rows[layer - 1]]
            marks += [
                f'<rect x="{x - 7:.1f}" y="{y - 7:.1f}" width="14" height="14" rx="2" fill="{ink}"/>' for x in row
            ]
        leaves.append(rows[0])
        if fabric.planes > 1:
            marks.append(_text(left + panel / 2, top - 20, f"plane {plane}", ink, "middle"))
    each = " each" if fabric.planes > 1 else ""
    for layer, count in enumerate(counts):
        marks.append(_text(20, height[layer] - 2, f"{count:,} {_ORDER[fabric.spec.layers][layer]} switches", MUTED))
        marks.append(_text(20, height[layer] + 13, f"{drawn[layer]} drawn{each}", MUTED, size=10))
    nodes, bottom = _node_picture(fabric, width, leaves, height[0], int(counts[0]))
    return [*lines, *nodes, *marks], bottom


def _node_picture(
    fabric: Fabric, width: int, leaves: list[list[float]], leaf_y: float, count: int
) -> tuple[list[str], float]:
    """Draw node 0: its GPUs, their link to a leaf (the nearest one that is drawn), and the NVLink that joins them."""
    y = leaf_y + 110
    places = _row(_MARGIN, width - _MARGIN - 20, min(fabric.gpus_per_node, 16))
    marks = []
    for gpu, x in enumerate(places):
        for plane in np.flatnonzero(fabric.leaf[gpu] >= 0).tolist():
            first = fabric.first_switch + int(np.flatnonzero(fabric.switch_plane == plane)[0])
            row = leaves[plane]
            to_x = row[(int(fabric.leaf[gpu, plane]) - first) * len(row) // count]
            marks.append(_line(x, y, to_x, leaf_y, PLANE_INKS[plane % len(PLANE_INKS)], 0.9))
        marks.append(f'<rect x="{x - 17:.1f}" y="{y - 11:.1f}" width="34" height="22" rx="3" fill="{INK}"/>')
        marks.append(_text(x, y + 4, f"{gpu}", PAPER, "middle"))
    if fabric.spec.nvlink and fabric.gpus_per_node > 1:
        left, long = places[0] - 17, places[-1] - places[0] + 34
        marks.append(f'<rect x="{left:.1f}" y="{y + 16:.1f}" width="{long:.1f}" height="8" fill="{MUTED}"/>')
        marks.append(_text(20, y + 24, "NVLink", MUTED))
    marks.append(_text(20, y + 4, "GPUs of node 0", MUTED))
    marks.append(_text(20, y + 50, _node_text(fabric), MUTED))
    return marks, y + 68


def _circle(fabric: Fabric, width: int) -> tuple[list[str], float]:
    """Draw the groups around a circle, with a chord for each two that are joined; of many groups only some."""
    groups = fabric.switch_group[fabric.switch_plane == 0]
    number = int(groups.max()) + 1
    shown = np.unique(np.linspace(0, number - 1, min(number, _CIRCLE)).astype(int))
    radius = min(width, 900) / 2 - 60
    middle = (width / 2, radius + 70)
    angle = {int(group): 2 * math.pi * place / len(shown) for place, group in enumerate(shown)}
    place = {group: (middle[0] + radius * math.sin(a), middle[1] - radius * math.cos(a)) for group, a in angle.items()}
    own = (fabric.kind == SWITCH) & (fabric.link_from < fabric.first_switch + len(groups))
    one = fabric.switch_group[fabric.link_from[own] - fabric.first_switch]
    other = fabric.switch_group[fabric.link_to[own] - fabric.first_switch]
    pairs = np.unique(np.column_stack([one, other])[one < other], axis=0)
    kept = pairs[np.isin(pairs[:, 0], shown) & np.isin(pairs[:, 1], shown)]
    lines = [_line(*place[int(a)], *place[int(b)], PLANE_INKS[0], 0.25) for a, b in kept]
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{INK}"/>' for x, y in place.values()]
    word = "groups" if fabric.spec.kind == "dragonfly" else "columns"
    size = len(groups) // number
    label = f"{number} {word} of {size} switches, {len(shown)} drawn; a line stands for one or more cables"
    y = middle[1] + radius + 36
    return [*lines, *dots, _text(20, y, label, MUTED), _text(20, y + 18, _node_text(fabric), MUTED)], y + 36


def _row(left: float, room: float, count: int) -> list[float]:
    return [left + room * (place + 0.5) / count for place in range(count)]


def _line(x: float, y: float, to_x: float, to_y: float, ink: str, opacity: float = 0.45) -> str:
    return (
        f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{ink}" stroke-opacity="{opacity}"/>'
    )


def _text(x: float, y: float, text: str, ink: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{ink}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
