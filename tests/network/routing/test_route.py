"""Routes are paths of the fabric, as short as they can be, over the planes and NVLink that the text says."""

import numpy as np
import pytest

from dovetail.catalog.fabrics import load_fabric, resized
from dovetail.network.fabric.topology import NIC, NVLINK, PCIE, SWITCH, Fabric, build
from dovetail.network.flows.failures import links_of_nic, links_of_plane, links_of_switch
from dovetail.network.flows.flows import Flows, Routes, share_matrix
from dovetail.network.routing.route import Adaptive, Ecmp, Policy, Static, host_of, route

POLICIES = (Ecmp(), Ecmp(queue_pairs=3, seed=1), Static(), Adaptive())


def fabric_of(name: str, **changes: object) -> Fabric:
    return build(resized(load_fabric(name), **changes))


def everyone(fabric: Fabric) -> Flows:
    source, destination = np.divmod(np.arange(fabric.endpoints**2), fabric.endpoints)
    return Flows.of(source, destination, 1.0)


def some(fabric: Fabric) -> Flows:
    return everyone(fabric).take(np.random.default_rng(0).permutation(fabric.endpoints**2)[:400])


def down(fabric: Fabric, *lost: np.ndarray) -> np.ndarray:
    up = np.ones(fabric.links, bool)
    up[np.concatenate(lost)] = False
    return up


def check_conservation(fabric: Fabric, flows: Flows, routes: Routes) -> None:
    """Of each flow, one unit leaves its source, one enters its destination, and as much leaves any other vertex as
    enters it."""
    shares = share_matrix(routes)
    incidence = np.zeros((fabric.links, fabric.vertices))
    incidence[np.arange(fabric.links), fabric.link_from] = 1
    incidence[np.arange(fabric.links), fabric.link_to] = -1
    balance = shares @ incidence
    expected = np.zeros_like(balance)
    np.add.at(expected, (np.arange(len(flows)), flows.source), ~routes.is_cut_off)
    np.add.at(expected, (np.arange(len(flows)), flows.destination), -1.0 * ~routes.is_cut_off)
    assert balance == pytest.approx(expected, abs=1e-12)


def hops(fabric: Fabric, routes: Routes) -> np.ndarray:
    """[flows] links between switches, on average."""
    return share_matrix(routes)[:, fabric.kind == SWITCH].sum(axis=1)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ft2", {"endpoints": 32, "radix": 8}),
        ("ft3", {"endpoints": 64, "radix": 8}),
        ("mpft", {"endpoints": 64, "radix": 8}),
        ("mrft", {"endpoints": 32, "radix": 16}),
        ("mpft", {"endpoints": 32, "radix": 8, "planes": 4, "planes_per_nic": 4}),
        ("dragonfly", {"endpoints": 48, "radix": 7, "gpus_per_node": 1}),
        ("slim-fly", {"endpoints": 50, "radix": 10, "gpus_per_node": 1}),
    ],
)
def test_every_route_is_a_path(name: str, changes: dict[str, object], policy: Policy) -> None:
    defaults = {"groups": None, "switches_per_group": None, "global_per_switch": None, "q": None}
    fabric = fabric_of(name, **({**defaults, "endpoints_per_switch": None} | changes if name[0] in "ds" else changes))
    flows = some(fabric)
    routes = route(fabric, flows, policy)
    assert not routes.is_cut_off.any()
    check_conservation(fabric, flows, routes)
    assert hops(fabric, routes) == pytest.approx(hops(fabric, route(fabric, flows, Adaptive())))


def latency(fabric: Fabric, source: int, destination: int) -> float:
    return float(route(fabric, Flows.of([source], [destination], 1.0), Adaptive()).latency[0])


def test_latencies_are_those_of_table_5() -> None:
    """[ISCA Table 5]: InfiniBand 2.8 us on one leaf and 3.7 across; RoCE 3.6 and 5.6; NVLink 3.33."""
    for name, same, across in (("mpft", 2.8e-6, 3.7e-6), ("mpft-roce", 3.6e-6, 5.6e-6)):
        fabric = build(load_fabric(name, 2048))
        apart = int(np.flatnonzero((fabric.leaf[:, 0] >= 0) & (fabric.leaf[:, 0] != fabric.leaf[0, 0]))[0])
        assert latency(fabric, 0, 8) == pytest.approx(same)
        assert latency(fabric, 0, apart) == pytest.approx(across)
        assert latency(fabric, 0, 1) == pytest.approx(3.33e-6)
        assert latency(fabric, 0, 9) == pytest.approx(same + 3.33e-6)


def nics_used(fabric: Fabric, routes: Routes) -> list[list[int]]:
    """GPUs whose NICs each flow leaves from, or arrives at."""
    shares = share_matrix(routes)
    ports = np.flatnonzero(fabric.kind == NIC)
    ends = np.minimum(fabric.link_from, fabric.link_to)
    return [sorted(set(ends[ports[shares[flow, ports] > 0]].tolist())) for flow in range(len(routes))]


def test_planes_are_changed_over_nvlink_at_either_end() -> None:
    fabric = build(load_fabric("mpft", 64))
    flow = Flows.of([1], [18], 1.0)
    assert nics_used(fabric, route(fabric, flow, Adaptive())) == [[2, 18]]
    assert nics_used(fabric, route(fabric, flow, Adaptive(), forwarding="destination")) == [[1, 17]]
    assert route(fabric, flow, Adaptive(), forwarding="none").is_cut_off.all()
    same_plane = Flows.of([1], [17], 1.0)
    routes = route(fabric, same_plane, Adaptive())
    assert nics_used(fabric, routes) == [[1, 17]]
    assert not share_matrix(routes)[0, fabric.kind == NVLINK].any()


def test_rails_are_kept_over_nvlink_or_left_through_the_spines() -> None:
    fabric = build(load_fabric("mrft", 64))
    flow = Flows.of([1], [18], 1.0)
    kept, left = (route(fabric, flow, Adaptive(), forwarding=each) for each in ("source", "none"))
    assert nics_used(fabric, kept) == [[2, 18]] and hops(fabric, kept) == pytest.approx([0])
    assert nics_used(fabric, left) == [[1, 18]] and hops(fabric, left) == pytest.approx([2])


def test_sprayed_packets_use_all_spines_alike_and_hashed_ones_one() -> None:
    fabric = fabric_of("ft2", endpoints=32, radix=8, gpus_per_node=1)
    flow = Flows.of([0], [31], 1.0)
    sprayed = share_matrix(route(fabric, flow, Adaptive()))[0, fabric.kind == SWITCH]
    assert sorted(sprayed[sprayed > 0]) == pytest.approx([1 / 4] * 8)
    hashed = share_matrix(route(fabric, flow, Ecmp()))[0, fabric.kind == SWITCH]
    assert sorted(hashed[hashed > 0]) == [1, 1]
    parts = share_matrix(route(fabric, flow, Ecmp(queue_pairs=8)))[0, fabric.kind == SWITCH]
    assert parts.sum() == pytest.approx(2) and 2 < np.count_nonzero(parts) <= 8


def test_hashes_spread_evenly_and_hang_on_seed_and_queue_pair() -> None:
    fabric = fabric_of("ft2", endpoints=32, radix=8, gpus_per_node=1)
    flows = Flows.of([0] * 4000, [31] * 4000, 1.0, queue_pair=range(4000))
    one, other = (route(fabric, flows, Ecmp(seed=seed)) for seed in (0, 1))
    up = np.flatnonzero((fabric.kind == SWITCH) & (fabric.link_from == fabric.leaf[0, 0]))
    counts = one.carried(flows.bytes)[up]
    assert counts.sum() == 4000
    assert ((counts - 1000) ** 2 / 1000).sum() < 16.3  # chi squared of 3 degrees of freedom, 0.1 %
    assert 0.6 < (one.items != other.items).reshape(4000, 4)[:, 2].mean() < 0.9
    assert (route(fabric, flows, Ecmp()).items == one.items).all()


def test_a_connection_is_between_nics() -> None:
    """GPUs of a node whose bytes one of them passes on to one receiver are hashed alike [NCCL, PXN]."""
    fabric = fabric_of("mpft", endpoints=64, radix=8)
    far = 63
    routes = route(fabric, Flows.of(range(8), [far] * 8, 1.0), Ecmp())
    between = share_matrix(routes)[:, fabric.kind == SWITCH]
    assert between.sum(axis=1).tolist() == [2] * 8
    assert (between == between[0]).all()


def test_static_tables_spread_destinations_of_a_leaf_over_all_links() -> None:
    """All to all, every link between switches carries as much [d-mod-k]."""
    for changes in ({"endpoints": 32, "radix": 8}, {"endpoints": 16, "radix": 8}):
        fabric = fabric_of("ft2", **changes, gpus_per_node=1)
        flows = everyone(fabric)
        carried = route(fabric, flows, Static()).carried(flows.bytes)[fabric.kind == SWITCH]
        assert carried == pytest.approx(carried[0])
    fabric = fabric_of("ft3", endpoints=128, radix=8, gpus_per_node=1)
    flows = everyone(fabric)
    carried = route(fabric, flows, Static()).carried(flows.bytes)[fabric.kind == SWITCH]
    sprayed = route(fabric, flows, Adaptive()).carried(flows.bytes)[fabric.kind == SWITCH]
    assert carried == pytest.approx(sprayed)


def test_a_lost_plane_is_gone_round_over_nvlink() -> None:
    fabric = build(load_fabric("mpft", 64))
    up = down(fabric, links_of_plane(fabric, 3))
    for policy in POLICIES:
        flows = some(fabric)
        routes = route(fabric, flows, policy, up)
        assert not routes.is_cut_off.any()
        check_conservation(fabric, flows, routes)
        used = nics_used(fabric, routes)
        assert not any(gpu % 8 == 3 for each in used for gpu in each)
    # What plane 3 had to carry is spread over the seven others.
    flows = everyone(fabric)
    carried = route(fabric, flows, Ecmp(), up).carried(flows.bytes)
    carried = carried[fabric.nic_link.max(axis=1)].reshape(8, 8).sum(axis=0)
    assert np.delete(carried, 3).max() / np.delete(carried, 3).mean() < 1.01


def test_sprayed_packets_take_all_detours_evenly_and_others_one() -> None:
    fabric = build(load_fabric("mpft", 64))
    up = down(fabric, links_of_plane(fabric, 3), links_of_nic(fabric, 16))
    flow = Flows.of([1], [19], 1.0)  # to a GPU of plane 3, in a node that has lost plane 0 too
    shares = share_matrix(route(fabric, flow, Adaptive(), up))[0]
    ports = fabric.nic_link[np.arange(8), np.arange(8)]
    assert shares[ports] == pytest.approx([0] + [1 / 6] * 2 + [0] + [1 / 6] * 4)
    assert shares[fabric.nvlink_link[1]] == pytest.approx(5 / 6)  # but for GPU 1's own NIC
    assert shares[fabric.nvlink_link[19] ^ 1] == pytest.approx(1)
    assert nics_used(fabric, route(fabric, flow, Static(), up)) in [[[k, 16 + k]] for k in range(8)]
    # All to all, what the others carry for plane 3 is the same to the last byte.
    flows = everyone(fabric)
    carried = route(fabric, flows, Adaptive(), down(fabric, links_of_plane(fabric, 3))).carried(flows.bytes)
    assert carried[fabric.nic_link[np.arange(64) % 8 != 3].max(axis=1)] == pytest.approx(7 * (8 + 8 / 7))


def test_flows_that_need_no_detour_have_no_more_links() -> None:
    """As without failures; those that do are in their places among them."""
    fabric = build(load_fabric("mpft", 64))
    flows = some(fabric)
    whole, routes = (route(fabric, flows, Adaptive(), up) for up in (None, down(fabric, links_of_nic(fabric, 17))))
    counts = np.diff(routes.offsets)
    goes_round = (flows.source // 8 != flows.destination // 8) & (
        (flows.destination == 17) | ((flows.source // 8 == 2) & (flows.destination % 8 == 1))
    )
    assert 5 < goes_round.sum() < len(flows) - 5
    assert (counts[~goes_round] == np.diff(whole.offsets)[~goes_round]).all()
    assert (counts[goes_round] > 6 * 6).all()
    assert share_matrix(routes)[~goes_round] == pytest.approx(share_matrix(whole)[~goes_round])


def test_a_lost_nic_a_lost_spine_and_a_lost_leaf() -> None:
    fabric = fabric_of("ft2", endpoints=32, radix=8, gpus_per_node=1)
    flows = everyone(fabric)
    alone = route(fabric, flows, Adaptive(), down(fabric, links_of_nic(fabric, 5)))
    assert (alone.is_cut_off == ((flows.source == 5) ^ (flows.destination == 5))).all()
    spine = route(fabric, flows, Adaptive(), down(fabric, links_of_switch(fabric, 8)))
    assert not spine.is_cut_off.any()
    assert share_matrix(spine)[31, fabric.kind == SWITCH].max() == pytest.approx(1 / 3)
    leaf = route(fabric, flows, Ecmp(), down(fabric, links_of_switch(fabric, 0)))
    is_lost = (flows.source < 4) | (flows.destination < 4)
    assert (leaf.is_cut_off == (is_lost & (flows.source != flows.destination))).all()


def test_spraying_goes_by_what_links_carry() -> None:
    """One of two cables to a spine is down: the spine gets half as much as the others."""
    fabric = fabric_of("ft2", endpoints=8, radix=8, gpus_per_node=1)  # two leaves, four cables each to one spine
    cables = np.flatnonzero((fabric.kind == SWITCH) & (fabric.link_from == fabric.leaf[0, 0]))
    up = down(fabric, cables[:1], cables[:1] ^ 1)
    shares = share_matrix(route(fabric, Flows.of([0], [7], 1.0), Adaptive(), up))[0, fabric.kind == SWITCH]
    assert sorted(shares[shares > 0]) == pytest.approx([1 / 4] * 4 + [1 / 3] * 3)


def test_copies_from_the_host_share_the_lanes_of_the_gpu() -> None:
    fabric = build(load_fabric("h800-2048", 64))
    flows = Flows.of([host_of(fabric, 1), 9, 9], [9, host_of(fabric, 1), 17], 1.0)
    shares = share_matrix(route(fabric, flows, Adaptive()))
    lanes = shares[:, fabric.kind == PCIE]
    assert lanes.sum(axis=1).tolist() == [2, 2, 2]
    assert (lanes[1] * lanes[2]).sum() == 1  # out of the GPU, both
    assert (lanes[0] * lanes[2]).sum() == 0
    with pytest.raises(ValueError, match="host 8: h800-2048 has 8 nodes"):
        host_of(fabric, 8)
    with pytest.raises(ValueError, match="source .* its own node's GPUs"):
        route(fabric, Flows.of([host_of(fabric, 0)], [9], 1.0), Adaptive())
    with pytest.raises(ValueError, match="only with a .pcie. link"):
        host_of(build(load_fabric("mpft", 64)), 0)


def test_mistakes() -> None:
    fabric = build(load_fabric("mpft", 64))
    with pytest.raises(ValueError, match="destination 64: mpft has GPUs 0 to 63"):
        route(fabric, Flows.of([0], [64], 1.0), Adaptive())
    with pytest.raises(ValueError, match="forwarding = 'sources': did you mean source"):
        route(fabric, Flows.of([0], [1], 1.0), Adaptive(), forwarding="sources")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="queue_pairs = 0"):
        Ecmp(queue_pairs=0)
