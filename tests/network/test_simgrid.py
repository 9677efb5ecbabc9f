"""Every flow's end beside SimGrid's, which shares links max-min fairly too: over our routes, and over networks that it
wires and routes by itself.

Both reckon in doubles and round what is left of a flow once per start or end of another, which bounds how far they may
be apart; that SimGrid's clock takes times within `SIMGRIDS_CLOCK` for one does not show among seconds. It has no
priorities and sends a flow over one path, so priorities and sprayed packets are not compared. Its weights are equal
only where there is no latency, so that latency is compared for flows that are alone.
"""

from dataclasses import replace

import numpy as np
import pytest
from _ask_simgrid import MISSING, ask_simgrid, is_installed, on_own_network, on_routes, without_latency

from dovetail.catalog.fabrics import load_fabric, resized
from dovetail.network.demands.collectives import all_to_all
from dovetail.network.fabric.topology import SWITCH, Fabric, build
from dovetail.network.flows.flows import Flows, Routes, share_matrix
from dovetail.network.flows.simulation import simulate
from dovetail.network.routing import paths
from dovetail.network.routing.route import Ecmp, Policy, Static, route

pytestmark = pytest.mark.skipif(not is_installed(), reason=MISSING)

SIMGRIDS_CLOCK = 1e-9  # seconds: its option surf/precision
FABRICS = {
    "two layers": ("ft2", {"endpoints": 32, "radix": 8, "gpus_per_node": 1}),
    "bundled cables": ("ft2", {"endpoints": 16, "radix": 8, "gpus_per_node": 1}),
    "three layers": ("ft3", {"endpoints": 54, "radix": 6, "gpus_per_node": 1}),
    "rails": ("mrft", {"endpoints": 32, "radix": 16}),
    "eight planes": ("mpft", {"endpoints": 64, "radix": 4}),
    "dragonfly": ("dragonfly", {"endpoints": 72, "radix": 7, "groups": 9}),
    "dragonfly of four groups": ("dragonfly", {"endpoints": 32, "radix": 7, "groups": 4}),
    "slim fly": ("slim-fly", {"endpoints": 40, "radix": 8, "q": 3}),
}


def fabric(name: str) -> Fabric:
    base, changes = FABRICS[name]
    return build(resized(load_fabric(base), **changes))


def to_all(fabric: Fabric) -> Flows:
    return all_to_all(range(fabric.endpoints), fabric.endpoints * 1e9).steps[0].flows


def drawn(fabric: Fabric) -> Flows:
    """Between pairs drawn at random, of 1 to 100 GB, in the first five seconds: rates change at each start and end."""
    random = np.random.default_rng(0)
    source, destination = np.divmod(random.permutation(fabric.endpoints**2)[:250], fabric.endpoints)
    goes = source != destination
    size, start = np.rint(10 ** random.uniform(9, 11, goes.sum())), random.uniform(0, 5, goes.sum())
    return Flows.of(source[goes], destination[goes], size, start=start)


DEMANDS = {"all-to-all": to_all, "drawn": drawn}
on_demands = pytest.mark.parametrize("demand", DEMANDS)


def ends(fabric: Fabric, flows: Flows, policy: Policy) -> np.ndarray:
    return simulate(fabric.capacity, flows, without_latency(route(fabric, flows, policy))).end


def rounding(flows: Flows) -> float:
    return 2 * len(flows) * float(np.finfo(np.float64).eps)


def farthest(ends: np.ndarray, others: np.ndarray) -> float:
    return float(np.abs(ends / others - 1).max())


@on_demands
@pytest.mark.parametrize("policy", [Static(), Ecmp()], ids=["static", "ecmp"])
@pytest.mark.parametrize("name", FABRICS)
def test_every_flow_ends_when_simgrid_says(name: str, policy: Policy, demand: str) -> None:
    network = fabric(name)
    flows = DEMANDS[demand](network)
    routes = without_latency(route(network, flows, policy))
    theirs = ask_simgrid(on_routes(network.capacity, flows, routes))
    assert farthest(simulate(network.capacity, flows, routes).end, theirs.end) < rounding(flows)


def test_a_flow_that_is_alone_takes_latency_and_transfer() -> None:
    """SimGrid adds up the latencies of the links. Flows follow each other at a millisecond."""
    network = fabric("eight planes")
    source, destination = np.random.default_rng(0).permutation(64)[:60].reshape(2, 30)
    flows = Flows.of(source, destination, 1e6, start=np.arange(30) * 1e-3)
    routes = route(network, flows, Static())
    theirs = ask_simgrid(on_routes(network.capacity, flows, routes, network.latency))
    assert len(np.unique(routes.latency.round(9))) > 2
    assert simulate(network.capacity, flows, routes).end == pytest.approx(theirs.end, rel=0, abs=SIMGRIDS_CLOCK)


def test_what_is_wrong_shows() -> None:
    """Links cut evenly, with nothing passed on to others; another hash; a cable of half the capacity."""
    network = fabric("two layers")
    flows = drawn(network)
    routes = without_latency(route(network, flows, Ecmp()))
    theirs = ask_simgrid(on_routes(network.capacity, flows, routes)).end
    assert farthest(ends_of_an_even_cut(network.capacity, flows, routes), theirs) > 0.01
    assert farthest(ends(network, flows, Ecmp(seed=1)), theirs) > 0.01
    slower = np.where(np.arange(network.links) == np.flatnonzero(network.kind == SWITCH)[0], 0.5, 1) * network.capacity
    assert farthest(simulate(slower, flows, routes).end, theirs) > 0.01


def ends_of_an_even_cut(capacity: np.ndarray, flows: Flows, routes: Routes) -> np.ndarray:
    """Every flow gets the n-th part of the narrowest link, n being the flows on it: less than max-min."""
    uses = share_matrix(routes)
    left, end, now = flows.bytes.copy(), np.full(len(flows), np.inf), 0.0
    while (left > 0).any():
        active = (flows.start <= now) & (left > 0)
        part = capacity / np.maximum(uses[active].sum(axis=0), 1)
        rates = np.where(active, np.where(uses > 0, part, np.inf).min(axis=1), 0)
        over = np.where(active, now + left / np.where(active, rates, 1), np.inf)
        after = min(over.min(), flows.start[flows.start > now].min(initial=np.inf))
        left = np.where(over <= after, 0, left - rates * (after - now))
        end[over <= after] = now = after
    return end


TREES = {
    "two layers": {"down": [4, 8], "up": [1, 4], "count": [1, 1]},
    "bundled cables": {"down": [4, 4], "up": [1, 2], "count": [1, 2]},
    "three layers": {"down": [3, 3, 6], "up": [1, 3, 3], "count": [1, 1, 1]},
}


@pytest.mark.parametrize(
    ("name", "demand"),
    [*((name, "all-to-all") for name in TREES), ("two layers", "drawn"), ("three layers", "drawn")],
)
def test_simgrids_own_fat_trees(name: str, demand: str) -> None:
    """It routes by destination (d-mod-k), as `Static` does; but of a bundle it takes, on the way down, the cable that
    the source decides, so that there only what is balanced ends alike."""
    network = fabric(name)
    flows = DEMANDS[demand](network)
    zone = {"kind": "fat-tree", "bandwidth": network.capacity[0], **TREES[name]}
    theirs = ask_simgrid(on_own_network(zone, flows)).end
    assert farthest(ends(network, flows, Static()), theirs) < rounding(flows)
    assert farthest(ends(network, flows, Ecmp()), theirs) > 0.01, "other routes would show"


GROUPS, ENDPOINTS = 5, 2  # and as many switches in a group as groups, as SimGrid wants for one cable between any two
OWN_DRAGONFLY = {"kind": "dragonfly", "groups": GROUPS, "switches_per_group": GROUPS, "endpoints_per_switch": ENDPOINTS}


def small_dragonfly() -> Fabric:
    shape = {"groups": GROUPS, "switches_per_group": GROUPS, "endpoints_per_switch": ENDPOINTS, "global_per_switch": 1}
    changes = {"endpoints": GROUPS**2 * ENDPOINTS, "radix": 8, "gpus_per_node": 1}
    return build(resized(load_fabric("dragonfly"), **changes, **shape))


def group_and_next(endpoints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Its group, and the one that its switch has a cable to; the last switch of each group has none: its own."""
    group, switch = np.divmod(endpoints // ENDPOINTS, GROUPS)
    return group, (group + switch + 1) % GROUPS


def ends_on_own_dragonfly(fabric: Fabric, flows: Flows) -> np.ndarray:
    """SimGrid's switch s of a group has the cable to group s, ours to the (s + 1)-th after its own."""

    def renumbered(endpoints: np.ndarray) -> np.ndarray:
        group, other = group_and_next(endpoints)
        return (group * GROUPS + other) * ENDPOINTS + endpoints % ENDPOINTS

    theirs = replace(flows, source=renumbered(flows.source), destination=renumbered(flows.destination))
    return ask_simgrid(on_own_network({**OWN_DRAGONFLY, "bandwidth": fabric.capacity[0]}, theirs)).end


@on_demands
@pytest.mark.parametrize("policy", [Static(), Ecmp()], ids=["static", "ecmp"])
def test_simgrids_own_dragonfly(policy: Policy, demand: str) -> None:
    """Between any two switches one path has one cable between groups at most; both take that."""
    network = small_dragonfly()
    flows = DEMANDS[demand](network)
    theirs = ends_on_own_dragonfly(network, flows)
    assert farthest(ends(network, flows, policy), theirs) < rounding(flows)


@on_demands
def test_paths_over_two_cables_between_groups_would_show(demand: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many switches are passed there, if cables are counted alike."""
    network = small_dragonfly()
    flows = DEMANDS[demand](network)
    theirs = ends_on_own_dragonfly(network, flows)
    monkeypatch.setattr(paths, "BETWEEN_GROUPS", 1)
    assert farthest(ends(network, flows, Ecmp()), theirs) > 0.01
