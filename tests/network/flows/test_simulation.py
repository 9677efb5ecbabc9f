"""Ends of flows: by hand, against a plain loop over all events, and with links that fail."""

import numpy as np
import pytest

from dovetail.network.flows.flows import Bools, Flows, Routes, fill_reference, routes_of
from dovetail.network.flows.simulation import Change, simulate


def flows_of(bytes: list[float], start: list[float] | float = 0.0, priority: list[int] | int = 0) -> Flows:
    return Flows.of(range(len(bytes)), range(len(bytes)), bytes, priority=priority, start=start)


def links(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def plain_ends(capacity: np.ndarray, flows: Flows, routes: Routes) -> np.ndarray:
    """All rates anew at every start and end."""
    left, end, now = flows.bytes.copy(), np.full(len(flows), np.nan), 0.0
    while np.isnan(end).any():
        active = (flows.start <= now) & np.isnan(end)
        rates, free = np.zeros(len(flows)), capacity.copy()
        for each in np.unique(flows.priority[active]):
            fill_reference(free, routes, np.flatnonzero(active & (flows.priority == each)), rates)
            free[free < 1e-9 * capacity] = 0.0
        with np.errstate(divide="ignore"):
            ahead = np.where(rates > 0, left / np.where(rates > 0, rates, 1), np.inf).min()
        starts = flows.start[flows.start > now]
        step = min(ahead, starts.min() - now if len(starts) else np.inf)
        now = starts.min() if len(starts) and step == starts.min() - now else now + step
        left -= rates * step
        end[active & (left <= 1e-9 * flows.bytes)] = now
    return end


@pytest.mark.parametrize("seed", range(40))
def test_ends_are_those_of_a_plain_loop(seed: int) -> None:
    random = np.random.default_rng(seed)
    num_links, count = int(random.integers(2, 9)), int(random.integers(1, 14))
    paths = [
        [(int(link), float(random.choice([1, 0.5]))) for link in random.permutation(num_links)[: random.integers(1, 4)]]
        for _ in range(count)
    ]
    capacity, routes = random.uniform(1, 10, num_links), routes_of(paths, num_links)
    flows = Flows.of(
        range(count),
        range(count),
        random.choice([1.0, 2.0, random.uniform()], count),
        priority=random.integers(0, 3, count),
        start=random.choice([0.0, 0.0, 0.3], count),
    )
    outcome = simulate(capacity, flows, routes)
    assert not outcome.is_cut_off.any()
    assert outcome.end == pytest.approx(plain_ends(capacity, flows, routes), rel=1e-8)
    assert outcome.link_bytes == pytest.approx(routes.carried(flows.bytes))
    assert outcome.delivered == pytest.approx(flows.bytes)


def test_the_rest_speeds_up_when_one_ends() -> None:
    """10 bytes/s for two flows of 10 and 30 bytes: both at 5 until 2 s, then one at 10."""
    outcome = simulate(np.array([10.0]), flows_of([10.0, 30.0]), routes_of([[0], [0]], 1))
    assert outcome.end == pytest.approx([2, 4])
    assert outcome.seconds == pytest.approx(4)


def test_an_end_can_slow_another_down() -> None:
    """When A ends, B speeds up on link 0 and takes more of link 1 from C, though C never met A."""
    routes = routes_of([[0], [0, 1], [1]], 2)
    outcome = simulate(np.array([4.0, 6.0]), flows_of([4.0, 10.0, 100.0]), routes)
    # 0-2 s: 2, 2, 4. Then B 3 of link 1, C 3: B has 6 left, until 4 s; C has 92 - 6 = 86 left, alone at 6.
    assert outcome.end == pytest.approx([2, 4, 4 + 86 / 6])


def test_strict_priority_and_a_late_start() -> None:
    """The second class waits from 1 s to 2 s."""
    flows = flows_of([10.0, 10.0], start=[1.0, 0.0], priority=[0, 1])
    outcome = simulate(np.array([10.0]), flows, routes_of([[0], [0]], 1))
    assert outcome.end == pytest.approx([2, 1])
    flows = flows_of([10.0, 15.0], start=[1.0, 0.0], priority=[0, 1])
    outcome = simulate(np.array([10.0]), flows, routes_of([[0], [0]], 1))
    assert outcome.end == pytest.approx([2, 2.5])


def test_flows_of_equal_size_are_shared_out_once() -> None:
    """However many different ends there are."""
    random = np.random.default_rng(0)
    routes = routes_of([random.permutation(50)[:3].tolist() for _ in range(500)], 50)
    outcome = simulate(np.full(50, 10.0), flows_of([1.0] * 500), routes)
    assert outcome.shared == 1
    assert len(np.unique(outcome.end)) > 10
    assert outcome.end == pytest.approx(plain_ends(np.full(50, 10.0), flows_of([1.0] * 500), routes), rel=1e-8)
    assert outcome.seconds == pytest.approx((routes.carried(np.ones(500)) / 10).max())


def test_a_window_only_makes_times_longer() -> None:
    random = np.random.default_rng(1)
    routes = routes_of([random.permutation(20)[:3].tolist() for _ in range(200)], 20)
    flows = flows_of(random.uniform(1, 2, 200).tolist())
    exact, coarse = (simulate(np.full(20, 10.0), flows, routes, window=window) for window in (0.0, 0.05))
    assert coarse.shared < exact.shared / 2
    assert exact.seconds < coarse.seconds < exact.seconds + 0.2
    assert coarse.delivered == pytest.approx(flows.bytes)


def test_a_link_that_fails_and_is_repaired() -> None:
    changes = [Change(seconds=1.0, links=links(0)), Change(seconds=3.0, links=links(0), is_up=True)]
    outcome = simulate(np.array([10.0]), flows_of([20.0]), routes_of([[0]], 1), changes)
    assert outcome.end == pytest.approx([4])
    assert outcome.link_bytes == pytest.approx([20])


def test_what_is_never_repaired_is_cut_off_with_what_arrived() -> None:
    changes = [Change(seconds=1.0, links=links(0))]
    outcome = simulate(np.array([10.0, 10.0]), flows_of([20.0, 5.0, 7.0]), routes_of([[0], [1], None], 2), changes)
    assert outcome.cut_off.tolist() == [0, 2]
    assert outcome.delivered == pytest.approx([10, 5, 0])
    assert outcome.end == pytest.approx([1, 0.5, 0])
    assert np.isfinite(outcome.end).all()
    assert outcome.seconds == pytest.approx(0.5)


@pytest.mark.parametrize(("delay", "expected"), [(0.0, 1 + 2), (0.5, 1 + 0.5 + 2)])
def test_rerouting_takes_the_other_link(delay: float, expected: float) -> None:
    def route(up: Bools) -> Routes:
        return routes_of([[0 if up[0] else 1]], 2)

    changes = [Change(seconds=1.0, links=links(0))]
    outcome = simulate(np.array([10.0, 5.0]), flows_of([20.0]), route, changes, reroute_seconds=delay)
    assert outcome.end == pytest.approx([expected])
    assert outcome.link_bytes == pytest.approx([10, 10])


def test_latency_comes_once_and_nothing_takes_no_time() -> None:
    routes = routes_of([[0], [0], []], 1)
    routes.latency[:2] = 0.25
    outcome = simulate(np.array([10.0]), flows_of([10.0, 0.0, 5.0], start=[0.0, 1.0, 2.0]), routes)
    assert outcome.end == pytest.approx([1.25, 1.25, 2])


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="2 flows but 1 routes"):
        simulate(np.ones(1), flows_of([1.0, 1.0]), routes_of([[0]], 1))
    with pytest.raises(ValueError, match="a change of link 4: there are 1"):
        simulate(np.ones(1), flows_of([1.0]), routes_of([[0]], 1), [Change(seconds=0, links=links(4))])
    with pytest.raises(ValueError, match="links change at nan"):
        Change(seconds=np.nan, links=links(0))
    with pytest.raises(ValueError, match="window = -1"):
        simulate(np.ones(1), flows_of([1.0]), routes_of([[0]], 1), window=-1)
