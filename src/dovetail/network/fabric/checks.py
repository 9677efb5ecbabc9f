"""Measures a fabric as a graph: ports, neighbours, hops, and the bisection.

The bisection is the number of cables (each carries both ways) between two halves of the endpoints, and never more than
half of their NICs:

    fat tree  is exact: every leaf has as many cables up as down, spread evenly, so all endpoints can send at full rate
              to any others; a cut through the middle has half of the NICs' bandwidth
    others    are cut into halves of the switches, over which endpoints are spread evenly; the lower bound is from the
              spectrum (second smallest eigenvalue of the Laplacian x switches / 4), the upper bound is a cut that was
              found (halves along that eigenvector, or of whole groups, improved by Kernighan and Lin's exchanges)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dovetail.network.fabric.topology import SWITCH, Fabric

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]
_AT_ONCE = 512  # switches searched from at once: eight words for each switch
_PATIENCE = 100  # a pass ends after this many exchanges without a smaller cut
_ONES = np.array([bin(byte).count("1") for byte in range(256)], np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bisection:
    """The number of cables through the middle, of all planes together, at least and at most."""

    low: float
    high: float
    share: float  # low over half of the endpoints; 1 if every endpoint can send at full rate to the other half
    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphReport:
    """The figures of the GPUs' planes. Hops are cables between any two switches with endpoints on one plane."""

    ports: int  # the most that a switch uses
    radix: int
    neighbours: tuple[int, int]  # the fewest and the most cables to other switches
    is_connected: bool  # whether every plane is
    diameter: int  # in hops; -1 if not connected
    mean_hops: float  # over ordered pairs of different switches
    bisection: Bisection | None  # None if not asked for


def check_graph(fabric: Fabric, with_bisection: bool = True) -> GraphReport:
    """Measure the graph on its arrays; only a fat tree's bisection is from a formula."""
    first, last = fabric.first_switch, fabric.first_switch + fabric.switches
    used = np.bincount(fabric.link_from, minlength=fabric.vertices)[first:last]
    own = fabric.kind == SWITCH
    degree = np.bincount(fabric.link_from[own], minlength=fabric.vertices)[first:last]
    of_gpus = fabric.switch_plane < fabric.planes
    planes = [plane_graph(fabric, plane) for plane in range(fabric.planes)]
    distinct = [plane for index, plane in enumerate(planes) if index == 0 or not plane.equals(planes[0])]
    hops = [_hops(plane) for plane in distinct]
    is_connected = all(each is not None for each in hops)
    reached = [each for each in hops if each is not None]
    return GraphReport(
        ports=int(used[of_gpus].max()),
        radix=fabric.spec.radix,
        neighbours=(int(degree[of_gpus].min()), int(degree[of_gpus].max())),
        is_connected=is_connected,
        diameter=max(each[0] for each in reached) if is_connected else -1,
        mean_hops=float(np.mean([each[1] for each in reached])) if is_connected else float("nan"),
        bisection=bisection(fabric) if with_bisection and is_connected else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlaneGraph:
    """The graph of one plane.

    Switch s, numbered from 0, has the neighbours `neighbour[start[s] : start[s + 1]]`, each as often as it has cables.
    """

    start: Ids
    neighbour: Ids
    leaves: Ids  # the switches with endpoints
    group: NDArray[np.int32]

    @property
    def switches(self) -> int:
        return len(self.start) - 1

    def equals(self, other: PlaneGraph) -> bool:
        return np.array_equal(self.start, other.start) and np.array_equal(self.neighbour, other.neighbour)


def plane_graph(fabric: Fabric, plane: int) -> PlaneGraph:
    """Return the switches of one plane and the cables between them."""
    members = np.flatnonzero(fabric.switch_plane == plane)
    first = fabric.first_switch + int(members[0])
    of_plane = (fabric.kind == SWITCH) & (fabric.link_from >= first) & (fabric.link_from < first + len(members))
    one, other = fabric.link_from[of_plane] - first, fabric.link_to[of_plane] - first
    order = np.lexsort((other, one))
    attached = fabric.leaf[:, plane]
    return PlaneGraph(
        start=np.concatenate([[0], np.cumsum(np.bincount(one, minlength=len(members)))]),
        neighbour=other[order].astype(np.int64),
        leaves=np.unique(attached[attached >= 0]).astype(np.int64) - first,
        group=fabric.switch_group[members],
    )


def _hops(plane: PlaneGraph) -> tuple[int, float] | None:
    """Return the largest and the mean number of hops between switches with endpoints; None if not connected."""
    leaves = plane.leaves
    if len(leaves) == 1:
        return 0, 0.0
    sources = _representatives(plane)
    largest, total = 0, 0
    for begin in range(0, len(sources), _AT_ONCE):
        some = sources[begin : begin + _AT_ONCE]
        bits = np.zeros((plane.switches, _AT_ONCE // 8), np.uint8)
        index = np.arange(len(some))
        bits[some, index // 8] |= (1 << index % 8).astype(np.uint8)
        words, missing, level = bits.view(np.uint64), len(some) * (len(leaves) - 1), 0
        while missing:
            following = words | _of_neighbours(plane, words)
            if np.array_equal(following, words):
                return None
            words = following
            left = len(some) * len(leaves) - int(_ONES[words[leaves].view(np.uint8)].sum())
            level, total, missing = level + 1, total + (level + 1) * (missing - left), left
        largest = max(largest, level)
    return largest, total / (len(sources) * (len(leaves) - 1))


def _representatives(plane: PlaneGraph) -> Ids:
    """Return the switches with endpoints, or only those of one group if the graph looks the same from the next."""
    size = int(np.count_nonzero(plane.group == plane.group[0]))
    if len(plane.leaves) == plane.switches and 0 < size < plane.switches:
        one = np.repeat(np.arange(plane.switches), np.diff(plane.start))
        there = (plane.neighbour + size) % plane.switches
        moved = np.sort((one + size) % plane.switches * plane.switches + there)
        if np.array_equal(moved, one * plane.switches + plane.neighbour):
            return np.arange(size, dtype=np.int64)
    return plane.leaves


def _of_neighbours(plane: PlaneGraph, words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the bitwise or over each switch's neighbours."""
    some = np.flatnonzero(np.diff(plane.start))
    result = np.zeros_like(words)
    if len(some):
        result[some] = np.bitwise_or.reduceat(words[plane.neighbour], plane.start[some], axis=0)
    return result


def bisection(fabric: Fabric) -> Bisection:
    """Return the bisection of all planes, which must be connected."""
    ports = np.count_nonzero(fabric.leaf >= 0) / fabric.planes  # on one plane
    half = ports // 2
    if fabric.spec.kind == "fat-tree":
        cables = float(half * fabric.planes)
        return Bisection(low=cables, high=cables, share=float(2 * half / ports), method="exact, half of the NICs")
    plane = plane_graph(fabric, 0)
    value, vector = second_eigenvalue(plane)
    orders = [np.argsort(vector, kind="stable"), np.argsort(plane.group, kind="stable")]
    cut = min(_improved_cut(plane, order) for order in orders)
    low = min(value * plane.switches / 4, float(half))
    return Bisection(
        low=low * fabric.planes,
        high=min(float(cut), float(half)) * fabric.planes,
        share=float(2 * low / ports),
        method="at least by the spectrum, at most by a cut after Kernighan and Lin",
    )


def second_eigenvalue(plane: PlaneGraph, steps: int = 120) -> tuple[float, Floats]:
    """Return a lower bound of the Laplacian's second smallest eigenvalue, and its vector.

    The bound is the value found by Lanczos iteration with full orthogonalisation, less its remaining error.
    """
    size = plane.switches
    degree = np.diff(plane.start).astype(np.float64)
    basis = np.zeros((min(steps, size - 1) + 1, size))
    basis[0] = size**-0.5  # the eigenvector of 0
    vector = np.cos(np.arange(size) * 2.4)  # any vector would do; a fixed one gives the same result each time
    diagonal: list[float] = []
    beside: list[float] = []
    for index in range(1, len(basis)):
        for _ in range(2):
            vector = vector - basis[:index].T @ (basis[:index] @ vector)
        norm = float(np.linalg.norm(vector))
        beside.append(norm)
        if norm < 1e-9 * size:
            break
        basis[index] = vector / norm
        vector = degree * basis[index] - np.add.reduceat(basis[index][plane.neighbour], plane.start[:-1])
        diagonal.append(float(basis[index] @ vector))
    found = len(diagonal)
    off = beside[1:found]
    values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1))
    least = basis[1 : found + 1].T @ vectors[:, 0]
    error = degree * least - np.add.reduceat(least[plane.neighbour], plane.start[:-1]) - values[0] * least
    return float(values[0] - np.linalg.norm(error)), least


def _improved_cut(plane: PlaneGraph, order: Ids, passes: int = 4) -> int:
    """Return the number of cables between two halves of the switches.

    The halves are the first and the last of `order`; pairs are exchanged as long as that makes the number smaller.
    """
    side = np.ones(plane.switches)
    side[order[: plane.switches // 2]] = -1
    best = _cut(plane, side)
    for _ in range(passes):
        found, side = _exchanged(plane, side, best)
        if found >= best:
            break
        best = found
    return best


def _exchanged(plane: PlaneGraph, side: Floats, cut: int) -> tuple[int, Floats]:
    """Return the best cut found while exchanging the pair with the largest gains again and again, none twice."""
    side, kept, best = side.copy(), side.copy(), cut
    gain = -side * np.add.reduceat(side[plane.neighbour], plane.start[:-1])  # cables cut minus cables kept
    free = np.ones(plane.switches, dtype=bool)
    since = 0
    while since < _PATIENCE and free.sum() >= 2:
        for half in (-1, 1):
            moved = int(np.argmax(np.where(free & (side == half), gain, -np.inf)))
            cut -= int(gain[moved])
            free[moved] = False
            around = plane.neighbour[plane.start[moved] : plane.start[moved + 1]]
            np.add.at(gain, around, 2 * side[around] * half)
            gain[moved] = -gain[moved]
            side[moved] = -half
        since += 1
        if cut < best:
            best, kept, since = cut, side.copy(), 0
    return best, kept


def _cut(plane: PlaneGraph, side: Floats) -> int:
    one = np.repeat(side, np.diff(plane.start))
    return int(np.count_nonzero(one != side[plane.neighbour])) // 2
