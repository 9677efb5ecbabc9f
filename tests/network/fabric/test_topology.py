"""Networks as they are wired: counts of the paper, graphs that networkx knows, budgets of ports, and what cannot be."""

from itertools import combinations

import networkx
import numpy as np
import pytest

from dovetail.catalog.fabrics import fabric_names, load_fabric, resized
from dovetail.network.fabric.checks import bisection, check_graph, plane_graph, second_eigenvalue
from dovetail.network.fabric.fat_trees import fat_tree
from dovetail.network.fabric.finite_fields import field, prime_power
from dovetail.network.fabric.low_diameter import dragonfly, slim_fly
from dovetail.network.fabric.planes import Plane, ports_used
from dovetail.network.fabric.topology import NIC, NVLINK, PCIE, SWITCH, Fabric, build


def graph_of(plane: Plane) -> networkx.MultiGraph:
    graph = networkx.MultiGraph()
    graph.add_nodes_from(range(plane.switches))
    graph.add_edges_from(plane.cables.tolist())
    return graph


def small(kind: str, endpoints: int, radix: int = 8, **changes: object) -> Fabric:
    base = {"fat-tree": "ft2", "slim-fly": "slim-fly", "dragonfly": "dragonfly"}[kind]
    return build(resized(load_fabric(base), endpoints=endpoints, radix=radix, **{"gpus_per_node": 1, **changes}))


@pytest.mark.parametrize("q", [3, 4, 5, 7, 8, 9, 11, 13, 16, 25])
def test_slim_fly_is_a_regular_graph_of_diameter_two(q: int) -> None:
    plane = slim_fly(2 * q * q, radix=64, q=q)
    graph = graph_of(plane)
    d = {0: 0, 1: 1, 3: -1}[q % 4]
    assert graph.number_of_nodes() == 2 * q * q
    assert {degree for _, degree in graph.degree()} == {(3 * q - d) // 2}
    assert networkx.number_of_selfloops(graph) == 0
    assert networkx.Graph(graph).number_of_edges() == graph.number_of_edges(), "no two cables between the same two"
    assert networkx.diameter(networkx.Graph(graph)) == 2


def test_slim_fly_of_five_is_the_hoffman_singleton_graph() -> None:
    ours = networkx.Graph(graph_of(slim_fly(50, radix=64, q=5)))
    assert networkx.is_isomorphic(ours, networkx.hoffman_singleton_graph())


@pytest.mark.parametrize("q", [4, 7, 8, 9, 25])
def test_field_has_the_laws_of_a_field(q: int) -> None:
    sums, products = field(q)
    x, y, z = np.meshgrid(*[np.arange(q)] * 3, indexing="ij")
    assert np.array_equal(products[x, sums[y, z]], sums[products[x, y], products[x, z]])
    assert np.array_equal(products[products[x, y], z], products[x, products[y, z]])
    assert np.array_equal(sums, sums.T) and np.array_equal(products, products.T)
    assert np.array_equal(sums[0], np.arange(q)) and np.array_equal(products[1], np.arange(q))
    for row in (sums, products[1:, 1:]):
        assert all(len(set(each.tolist())) == len(each) for each in row), "every element has an inverse"


def test_prime_powers() -> None:
    assert [q for q in range(33) if prime_power(q)] == [
        *[2, 3, 4, 5, 7, 8, 9, 11, 13, 16, 17, 19, 23, 25, 27, 29, 31, 32],
    ]
    assert prime_power(27) == (3, 3) and prime_power(28) is None and prime_power(1) is None


@pytest.mark.parametrize("groups", [2, 3, 4, 5, 8, 9])
def test_dragonfly_joins_every_pair_of_groups_and_uses_every_port(groups: int) -> None:
    plane = dragonfly(groups * 8, radix=7, groups=groups)  # a = 4, p = h = 2
    graph = graph_of(plane)
    one, other = plane.group[plane.cables].T
    between = np.zeros((groups, groups), int)
    np.add.at(between, (one, other), 1)
    between = between + between.T
    apart = between[~np.eye(groups, dtype=bool)]
    assert (np.diag(between) == 2 * 6).all(), "all pairs of 4 switches, each seen twice"
    assert apart.min() == 8 // (groups - 1) and apart.max() - apart.min() <= 1
    assert {degree for _, degree in graph.degree()} == {5}
    assert (ports_used(plane) == 7).all()
    assert networkx.diameter(networkx.Graph(graph)) <= 3


def test_dragonfly_leaves_at_most_one_global_port_of_a_group_unused() -> None:
    for groups in range(2, 20):
        plane = dragonfly(groups * 9, radix=64, groups=groups, switches_per_group=3, global_per_switch=7)
        used = np.bincount(plane.cables.ravel(), minlength=plane.switches).reshape(groups, 3).sum(axis=1) - 6
        assert (used >= 20).all() and (used <= 21).all()
        assert (used == 21).all() or groups % 2 == 1, "an even number of groups can pair all ports"


@pytest.mark.parametrize("endpoints", [1, 4, 5, 9, 30, 32])
def test_two_layers_hold_any_number_without_losing_bandwidth(endpoints: int) -> None:
    plane = fat_tree(endpoints, radix=8, layers=2, rails=1)
    leaves = -(-endpoints // 4)
    up = np.bincount(plane.cables[:, 0], minlength=leaves) if leaves > 1 else np.array([4])
    assert (ports_used(plane) <= 8).all()
    assert (up[:leaves] == 4).all() and (np.bincount(plane.attached) <= 4).all()
    assert networkx.is_connected(networkx.Graph(graph_of(plane)))


@pytest.mark.parametrize("endpoints", [16, 17, 40, 90, 128])
@pytest.mark.parametrize("rails", [1, 2])
def test_three_layers_carry_any_permutation_in_the_fluid_limit(endpoints: int, rails: int) -> None:
    """The largest flow from one half of the leaves to the other is as many cables as endpoints there."""
    if endpoints % rails:
        endpoints += 1
    plane = fat_tree(endpoints, radix=8, layers=3, rails=rails)
    graph = networkx.DiGraph()
    for (one, other), count in zip(*np.unique(plane.cables, axis=0, return_counts=True), strict=True):
        graph.add_edge(int(one), int(other), capacity=int(count))
        graph.add_edge(int(other), int(one), capacity=int(count))
    half = endpoints // 2
    for index, switch in enumerate(plane.attached.tolist()):
        ends = ("source", switch) if index < half else (switch, "sink")
        before = graph.get_edge_data(*ends, default={"capacity": 0})["capacity"]
        graph.add_edge(*ends, capacity=before + 1)
    assert networkx.maximum_flow_value(graph, "source", "sink") == min(half, endpoints - half)
    assert (ports_used(plane) <= 8).all()


@pytest.mark.parametrize("name", fabric_names())
def test_fabrics_of_the_catalog_keep_to_their_ports(name: str) -> None:
    fabric = build(load_fabric(name))
    used = np.bincount(fabric.link_from, minlength=fabric.vertices)[fabric.first_switch :][: fabric.switches]
    is_storage = fabric.switch_plane == fabric.planes
    assert used[~is_storage].max() <= fabric.spec.radix
    if fabric.spec.storage:
        assert used[is_storage].max() <= fabric.spec.storage.radix
    assert np.array_equal(fabric.link_from[::2], fabric.link_to[1::2]), "the way back is link ^ 1"
    assert np.array_equal(fabric.link_to[::2], fabric.link_from[1::2])
    assert (fabric.capacity > 0).all() and (fabric.latency >= 0).all()


@pytest.mark.parametrize("name", ["mpft", "mrft", "h800-2048"])
def test_rows_of_a_gpu_lead_where_they_say(name: str) -> None:
    fabric = build(load_fabric(name, endpoints=2048))
    gpus = np.arange(2048)
    hubs = fabric.first_hub + gpus // 8
    assert np.array_equal(fabric.link_from[fabric.nvlink_link], gpus)
    assert np.array_equal(fabric.link_to[fabric.nvlink_link], hubs)
    home = fabric.home_plane
    link = fabric.nic_link[gpus, home]
    assert np.array_equal(home, gpus % 8 % fabric.planes)
    assert np.array_equal(fabric.link_to[link], fabric.leaf[gpus, home]) and (fabric.kind[link] == NIC).all()
    nics = fabric.link_from[link]
    assert np.array_equal(nics, gpus) or np.array_equal(fabric.link_to[fabric.pcie_link], nics)
    assert np.count_nonzero(fabric.leaf >= 0) == 2048, "a NIC is on one plane"
    assert np.array_equal(fabric.switch_layer[fabric.leaf[gpus, home] - fabric.first_switch], np.zeros(2048))


def test_storage_is_a_network_of_its_own() -> None:
    fabric = build(load_fabric("h800-2048"))
    storage = fabric.first_switch + np.flatnonzero(fabric.switch_plane == fabric.planes)
    between = fabric.kind == SWITCH
    inside = np.isin(fabric.link_from, storage) == np.isin(fabric.link_to, storage)
    assert inside[between].all()
    assert np.isin(fabric.link_to[fabric.storage_link], storage).all()
    assert np.array_equal(fabric.link_from[fabric.storage_link], fabric.first_host + np.arange(256))
    assert np.isin(fabric.link_to[fabric.server_link], storage).all() and fabric.server_link.shape == (180, 2)
    assert fabric.link_from[fabric.server_link].min() == fabric.first_host + 256
    assert np.count_nonzero(fabric.kind == PCIE) == 2 * 2 * 2048 and np.count_nonzero(fabric.kind == NVLINK) == 2 * 2048


def test_latencies_of_paths_are_those_measured_end_to_end() -> None:
    """InfiniBand 2.8 us on one leaf and 3.7 across, RoCE 3.6 and 5.6, NVLink 3.33 [ISCA Table 5]."""
    for name, same_leaf, across in (("mpft", 2.8, 3.7), ("mpft-roce", 3.6, 5.6)):
        fabric = build(load_fabric(name))
        nic = fabric.latency[fabric.kind == NIC][0]
        hop = fabric.latency[fabric.kind == SWITCH][0]
        assert 2 * nic == pytest.approx(same_leaf * 1e-6) and 2 * nic + 2 * hop == pytest.approx(across * 1e-6)
        assert 2 * fabric.latency[fabric.kind == NVLINK][0] == pytest.approx(3.33e-6)


def test_capacities_are_achieved_or_of_the_datasheet() -> None:
    spec = load_fabric("ft2")
    assert set(build(spec).capacity) == {40e9, 160e9}
    assert set(build(spec, "datasheet").capacity) == {50e9, 200e9}


def test_a_nic_on_all_planes_splits_its_rate() -> None:
    spec = resized(load_fabric("ft2", endpoints=64), planes=4, planes_per_nic=4, radix=256)
    fabric = build(spec)
    assert fabric.leaf.shape == (64, 4) and (fabric.leaf >= 0).all()
    assert set(fabric.capacity[fabric.kind == NIC]) == {10e9}
    assert np.array_equal(fabric.home_plane, np.zeros(64))


def test_rails_have_leaves_of_their_own_and_spines_in_common() -> None:
    fabric = build(load_fabric("mrft"))
    rail = np.arange(2048) % 8
    owners = {int(leaf): set(rail[fabric.leaf[:, 0] == leaf]) for leaf in np.unique(fabric.leaf)}
    assert all(len(rails) == 1 for rails in owners.values()) and len(owners) == 64
    report = check_graph(fabric)
    assert report.diameter == 2 and report.is_connected


@pytest.mark.parametrize(
    ("fabric", "diameter"),
    [
        (small("fat-tree", 32), 2),
        (small("fat-tree", 100, layers=3), 4),
        (small("slim-fly", 64), 2),
        (small("dragonfly", 60), 3),
        (small("dragonfly", 24), 2),
    ],
    ids=["ft2", "ft3", "slim-fly", "dragonfly", "small-dragonfly"],
)
def test_measured_hops_are_those_of_networkx(fabric: Fabric, diameter: int) -> None:
    graph = networkx.Graph()
    links = np.flatnonzero(fabric.kind == SWITCH)
    graph.add_edges_from(zip(fabric.link_from[links].tolist(), fabric.link_to[links].tolist(), strict=True))
    leaves = np.unique(fabric.leaf).tolist()
    lengths = dict(networkx.all_pairs_shortest_path_length(graph))
    hops = [lengths[one][other] for one in leaves for other in leaves if one != other]
    report = check_graph(fabric)
    assert report.diameter == max(hops) == diameter or fabric.name == "dragonfly" and report.diameter == max(hops)
    assert report.mean_hops == pytest.approx(np.mean(hops), rel=1e-12)
    assert report.is_connected and report.ports <= report.radix


def test_eigenvalue_is_that_of_the_dense_laplacian() -> None:
    for fabric in (small("slim-fly", 64), small("dragonfly", 60)):
        plane = plane_graph(fabric, 0)
        matrix = np.zeros((plane.switches, plane.switches))
        np.add.at(matrix, (np.repeat(np.arange(plane.switches), np.diff(plane.start)), plane.neighbour), 1)
        expected = np.linalg.eigvalsh(np.diag(matrix.sum(axis=1)) - matrix)[1]
        assert second_eigenvalue(plane)[0] == pytest.approx(expected, abs=1e-6)


def test_bisection_lies_between_its_bounds() -> None:
    """The Hoffman-Singleton graph's Laplacian has 5 as its second eigenvalue, and cuts of 50 / 4 x 5 = 62.5 or more."""
    found = bisection(small("slim-fly", 200, radix=11, q=5))
    assert found.low == pytest.approx(62.5, abs=1e-5) and 63 <= found.high <= 100
    tree = bisection(small("fat-tree", 32))
    assert tree.low == tree.high == 16 and tree.share == 1
    smallest = small("dragonfly", 24, radix=7, groups=3)  # 12 switches: all of their halves can be tried
    one, other = (smallest.link_from - 24, smallest.link_to - 24)
    links = np.flatnonzero(smallest.kind == SWITCH)[::2]
    halves = [np.isin(np.arange(12), chosen) for chosen in combinations(range(12), 6)]
    exact = min(np.count_nonzero(half[one[links]] != half[other[links]]) for half in halves)
    assert bisection(smallest).low <= exact + 1e-9
    assert bisection(smallest).high == min(exact, 12)


def test_full_size_networks_are_small_arrays() -> None:
    fabric = build(load_fabric("dragonfly"))
    held = sum(getattr(fabric, name).nbytes for name in ("link_from", "link_to", "capacity", "latency", "kind", "leaf"))
    assert (fabric.endpoints, fabric.switches) == (261_632, 16_352)
    assert np.count_nonzero(fabric.kind == SWITCH) == 2 * 384_272
    assert held < 64e6


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ft2", {"radix": 63}, "use an even one, 62 or 64"),
        ("ft2", {"radix": 1}, "use an even one, 4"),
        ("ft2", {"endpoints": 4096}, "layers = 3, radix = 92, or fewer endpoints"),
        ("ft3", {"endpoints": 65_544}, "hold at most 65536; use radix = 66, or fewer endpoints"),
        ("mpft", {"endpoints": 2050}, "use 2048 or 2056"),
        ("mpft", {"endpoints": 4}, "not a multiple of gpus_per_node = 8: use 8"),
        ("mpft", {"planes": 6}, "does not divide gpus_per_node = 8.*use 8"),
        ("mpft", {"planes": 3}, "does not divide gpus_per_node = 8.*use 4"),
        ("mpft", {"planes_per_nic": 3}, "use 1, or planes = 8"),
        ("mpft", {"by_rail": True}, "choose one"),
        ("mrft3", {"gpus_per_node": 5, "endpoints": 20}, "5 rails do not divide the 32 leaves"),
        ("ft2", {"q": 5}, "q = 5 is for kind = 'slim-fly', not 'fat-tree'"),
        ("ft2", {"endpoints_per_switch": 5}, "a leaf of a fat tree has radix / 2"),
        ("slim-fly", {"q": 28}, "a prime power above 2; use 27 or 29"),
        ("slim-fly", {"q": 2}, "use 3"),
        ("slim-fly", {"q": 43}, "more than radix = 64: use radix = 66 or q = 41"),
        ("slim-fly", {"q": 5}, "2 x 5.2 switches hold 4 each: at most 200"),
        ("slim-fly", {"endpoints": 800_000}, "hold at most"),
        ("slim-fly", {"layers": 3}, "layers = 3 is for kind = 'fat-tree'"),
        ("dragonfly", {"groups": 514}, "join at most 513 groups"),
        ("dragonfly", {"groups": 5}, "and 5 hold 2560; use groups = 511"),
        ("dragonfly", {"global_per_switch": 17}, "use h = 16, a = 32, p = 16"),
        ("h800-2048", {"pcie": None}, "needs .pcie."),
        ("ft2", {"endpoints": 0}, "endpoints"),
    ],
)
def test_what_cannot_be_wired_is_refused_with_what_can(name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(resized(load_fabric(name), **changes))


def test_remedies_of_refusals_work() -> None:
    build(resized(load_fabric("ft2"), endpoints=4096, radix=92))
    build(resized(load_fabric("ft2"), endpoints=4096, layers=3))
    build(resized(load_fabric("slim-fly"), q=41, endpoints=6720))
    build(resized(load_fabric("mrft3"), gpus_per_node=4, endpoints=20))
