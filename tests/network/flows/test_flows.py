"""Max-min rates: by hand, against linear programs, and the kernel against the reference."""

import numpy as np
import pytest
from scipy.optimize import linprog

from dovetail.network.flows.flows import Bundles, Flows, Routes, joined, max_min_rates, routes_of, share_matrix

ENGINES = ("kernel", "reference")


def random_routes(random: np.random.Generator, with_bundles: bool = False) -> tuple[np.ndarray, Routes]:
    links, flows = int(random.integers(2, 9)), int(random.integers(1, 12))
    paths = [
        [
            (int(link), float(random.choice([1, 0.5, 0.25])))
            for link in random.permutation(links)[: random.integers(1, 5)]
        ]
        for _ in range(flows)
    ]
    routes = routes_of(paths, links)
    if with_bundles:  # the last two items are bundles of links that the flow may also use itself
        bundles = Bundles(
            offsets=np.array([0, 2, 3]),
            links=random.integers(0, links, 3).astype(np.int32),
            shares=random.uniform(0.1, 1, 3),
        )
        extra = random.integers(links, links + 2, flows).astype(np.int32)
        routes = Routes(
            num_links=links,
            offsets=routes.offsets + np.arange(flows + 1),
            items=np.insert(routes.items, routes.offsets[1:], extra),
            shares=np.insert(routes.shares, routes.offsets[1:], random.uniform(0.1, 1, flows)),
            bundles=bundles,
            latency=routes.latency,
            is_cut_off=routes.is_cut_off,
        )
    return random.uniform(1, 10, links), routes


def lexicographic_rates(capacity: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Max-min by its definition: raise the least rate as far as a program finds; those that no program can raise
    further without lowering another to below it stay."""
    flows = len(shares)
    fixed: dict[int, float] = {}
    while len(fixed) < flows:
        free = [flow for flow in range(flows) if flow not in fixed]
        # Variables: rates, and the least rate of those that are free.
        limits = np.column_stack([shares.T, np.zeros(len(capacity))])
        at_least = [np.eye(flows + 1)[flows] - np.eye(flows + 1)[flow] for flow in free]
        bounds = [(fixed[flow], fixed[flow]) if flow in fixed else (0, None) for flow in range(flows)] + [(0, None)]
        upper = np.vstack([limits, *at_least])
        right = np.concatenate([capacity, np.zeros(len(free))])
        least = -linprog(-np.eye(flows + 1)[flows], A_ub=upper, b_ub=right, bounds=bounds).fun
        floors = [(max(low, (least - 1e-9) * (high is None)), high) for low, high in bounds[:-1]]
        for flow in free:
            best = linprog(-np.eye(flows)[flow], A_ub=shares.T, b_ub=capacity + 1e-9, bounds=floors)
            if -best.fun < least * (1 + 1e-6) + 1e-7:
                fixed[flow] = least
    return np.array([fixed[flow] for flow in range(flows)])


@pytest.mark.parametrize("seed", range(12))
def test_rates_are_those_of_linear_programs(seed: int) -> None:
    capacity, routes = random_routes(np.random.default_rng(seed), with_bundles=seed % 2 == 1)
    expected = lexicographic_rates(capacity, share_matrix(routes))
    for engine in ENGINES:
        assert max_min_rates(capacity, routes, engine=engine) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(40))
def test_the_kernel_equals_the_reference(seed: int) -> None:
    random = np.random.default_rng(seed)
    capacity, routes = random_routes(random, with_bundles=seed % 2 == 1)
    priority = random.integers(0, 3, len(routes)).astype(np.int8)
    kernel, reference = (max_min_rates(capacity, routes, priority, engine) for engine in ENGINES)
    assert kernel == pytest.approx(reference, rel=1e-10, abs=1e-12)
    assert (routes.carried(kernel) <= capacity * (1 + 1e-12)).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_three_flows_on_two_links(engine: str) -> None:
    """The textbook's: one flow over both links, one over each."""
    routes = routes_of([[0, 1], [0], [1]], 2)
    assert max_min_rates(np.array([10.0, 4.0]), routes, engine=engine) == pytest.approx([2, 8, 2])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_later_class_gets_what_is_left(engine: str) -> None:
    routes = routes_of([[0, 1], [0], [1]], 2)
    priority = np.array([0, 1, 1], np.int8)
    assert max_min_rates(np.array([10.0, 4.0]), routes, priority, engine) == pytest.approx([4, 6, 0])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sprayed_flow_takes_fractions(engine: str) -> None:
    """It could have 2 x 5, and its NIC lets it have 8; the other shares link 1 with half of it."""
    routes = routes_of([[0, (1, 0.5), (2, 0.5)], [1]], 3)
    rates = max_min_rates(np.array([8.0, 5.0, 5.0]), routes, engine=engine)
    assert rates == pytest.approx([10 / 3, 10 / 3])


@pytest.mark.parametrize("engine", ENGINES)
def test_no_capacity_no_path_and_nowhere_to_go_are_rate_0(engine: str) -> None:
    routes = routes_of([[0], None, [], [1]], 2)
    assert max_min_rates(np.array([0.0, 3.0]), routes, engine=engine).tolist() == [0, 0, 0, 3]


def test_many_fractions_leave_no_dust() -> None:
    """Loads shrink by subtraction; a link must not be filled with what rounding left of them."""
    random = np.random.default_rng(0)
    paths = [[(int(link), 0.1) for link in random.permutation(20)[:10]] + [20 + flow] for flow in range(300)]
    capacity = np.concatenate([random.uniform(1, 2, 20), np.logspace(-6, 3, 300)])
    kernel, reference = (max_min_rates(capacity, routes_of(paths, 320), engine=engine) for engine in ENGINES)
    assert kernel == pytest.approx(reference, rel=1e-9)


def test_bytes_on_links_are_shares_of_the_flows() -> None:
    _, routes = random_routes(np.random.default_rng(1), with_bundles=True)
    values = np.arange(1.0, len(routes) + 1)
    assert routes.carried(values) == pytest.approx(values @ share_matrix(routes))


def test_split_flows_carry_equal_parts_under_labels_of_their_own() -> None:
    flows = Flows.of([0, 1], [2, 3], [4.0, 8.0], queue_pair=[0, 1])
    split = joined([flows, flows]).take(np.arange(2)).split(4)
    assert split.bytes.tolist() == [1.0] * 4 + [2.0] * 4
    assert split.queue_pair.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert split.source.tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("bytes", [-1.0, np.nan, np.inf])
def test_bytes_that_are_none(bytes: float) -> None:
    with pytest.raises(ValueError, match="flow 1: bytes = "):
        Flows.of([0, 1], [1, 0], [1.0, bytes])


def test_a_link_twice_on_a_route_counts_twice_and_no_more() -> None:
    """Also when loads are summed anew, the many other flows on the link being bound elsewhere."""
    routes = routes_of([[0, 1]] * 5000 + [[(0, 0.5), (0, 0.5)]], 2)
    capacity = np.array([10.0, 1.0])
    rates = max_min_rates(capacity, routes)
    assert rates[-1] == pytest.approx(9)
    assert rates == pytest.approx(max_min_rates(capacity, routes, engine="reference"))
