"""Table 3 of the ISCA paper: size and price of five networks of 64-port switches [ISCA §5.1].

Counts come from formulas, and also from the built network if it can be built. One of the paper's rows cannot: a slim
fly of q = 28, which is not a prime power; the networks of 27 and 29 are built and printed for comparison. The dragonfly
of 511 groups has two more ports per group than there are other groups, so the nearest groups are joined twice; the full
one of a h + 1 = 513 groups is printed for comparison.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dovetail.catalog.fabrics import load_fabric, resized
from dovetail.network.fabric.checks import GraphReport, check_graph
from dovetail.network.fabric.low_diameter import slim_fly_degree, slim_fly_endpoints
from dovetail.network.fabric.price import TABLE_3, cables_by_length, dollars
from dovetail.network.fabric.topology import SWITCH, Fabric, build
from dovetail.reproduce.rows import Found
from dovetail.spec.band import Band
from dovetail.spec.fabric import FabricSpec

RADIX = 64
_COST = "switches x $83,400 + links x $485, but $375 within a group"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The numbers of a network. Links are cables between switches, of which `group_links` stay within groups."""

    endpoints: int
    switches: int
    links: int
    group_links: int = 0

    @property
    def dollars(self) -> float:
        return dollars(self.switches, self.links, self.group_links)


def fat_tree_size(radix: int, layers: int) -> Size:
    """Return the numbers of a full fat tree."""
    if layers == 2:
        return Size(endpoints=radix**2 // 2, switches=3 * radix // 2, links=radix**2 // 2)
    return Size(endpoints=radix**3 // 4, switches=5 * radix**2 // 4, links=radix**3 // 2)


def slim_fly_size(q: int, radix: int = RADIX) -> Size:
    """Return the numbers for q = 4 w + d with d in {-1, 0, 1}, whether or not there is a field of q elements."""
    degree = slim_fly_degree(q)
    switches = 2 * q * q
    return Size(
        endpoints=switches * slim_fly_endpoints(q, radix),
        switches=switches,
        links=switches * degree // 2,
        group_links=switches * (degree - q) // 2,
    )


def dragonfly_size(groups: int, switches_per_group: int, global_per_switch: int, endpoints_per_switch: int) -> Size:
    """Return the numbers of a dragonfly with all global ports in use."""
    switches = groups * switches_per_group
    group_links = groups * switches_per_group * (switches_per_group - 1) // 2
    return Size(
        endpoints=switches * endpoints_per_switch,
        switches=switches,
        links=group_links + switches * global_per_switch // 2,
        group_links=group_links,
    )


def find() -> Found:
    """Return the networks' numbers; those that can be built are built, counted and checked."""
    values: dict[tuple[str, str], Band] = {}
    remarks = [f"costs are {_COST}, in $: {TABLE_3.source}"]
    for name, size, formulas, spec in _networks():
        figures = {
            "endpoints": size.endpoints,
            "switches": size.switches,
            "links": size.links,
            "cost, M$": size.dollars / 1e6,
            "cost per endpoint, k$": size.dollars / size.endpoints / 1e3,
        }
        values |= {(name, quantity): Band.exact(figure) for quantity, figure in figures.items()}
        remarks.append(f"{name}: " + "; ".join(formulas))
        if spec is not None:
            fabric = build(spec)
            assert _counted(fabric) == size, (name, size, _counted(fabric))
            remarks.append(f"{name}, built: {_described(check_graph(fabric, with_bisection=False))}")
    return Found(values=values, remarks=tuple(remarks))


def _networks() -> Iterable[tuple[str, Size, tuple[str, str, str], FabricSpec | None]]:
    """Yield name, numbers, formulas of endpoints, switches and links, and what to build."""
    two, three = fat_tree_size(RADIX, 2), fat_tree_size(RADIX, 3)
    planes = Size(endpoints=8 * two.endpoints, switches=8 * two.switches, links=8 * two.links)
    yield "FT2", two, ("k^2 / 2, k = 64", "3 k / 2", "k^2 / 2"), load_fabric("ft2")
    yield "MPFT", planes, ("8 FT2", "8 FT2", "8 FT2"), load_fabric("mpft")
    yield "FT3", three, ("k^3 / 4, k = 64", "5 k^2 / 4", "k^3 / 2"), load_fabric("ft3")
    yield "SF", slim_fly_size(28), _slim_fly_formulas(28, "3 q / 2"), None
    for q, neighbours in ((27, "(3 q + 1) / 2"), (29, "(3 q - 1) / 2")):
        size = slim_fly_size(q)
        spec = resized(load_fabric("slim-fly"), q=q, endpoints=size.endpoints, gpus_per_node=1)
        yield f"SF, q = {q}", size, _slim_fly_formulas(q, neighbours), spec
    for name, groups in (("DF", 511), ("DF, g = 513", 513)):
        size = dragonfly_size(groups, 32, 16, 16)
        formulas = (f"g a p, g = {groups}, a = 32, p = 16", "g a", "g a (a - 1) / 2 + g a h / 2, h = 16")
        yield name, size, formulas, resized(load_fabric("dragonfly"), groups=groups, endpoints=size.endpoints)


def _slim_fly_formulas(q: int, neighbours: str) -> tuple[str, str, str]:
    return (
        f"2 q^2 p, q = {q}, p = {slim_fly_endpoints(q, RADIX)}",
        "2 q^2",
        f"q^2 n, n = {neighbours} = {slim_fly_degree(q)}",
    )


def _counted(fabric: Fabric) -> Size:
    return Size(
        endpoints=fabric.endpoints,
        switches=fabric.switches,
        links=int(np.count_nonzero(fabric.kind == SWITCH)) // 2,
        group_links=cables_by_length(fabric)[0],
    )


def _described(graph: GraphReport) -> str:
    fewest, most = graph.neighbours
    neighbours = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return (
        f"{graph.ports} of {graph.radix} ports used, {neighbours} cables to other switches, at most {graph.diameter} "
        f"hops between switches with endpoints, {graph.mean_hops:.2f} in the mean"
    )
