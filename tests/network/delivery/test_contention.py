"""Two demands on the same links: by hand, and what classes must keep."""

import pytest

from dovetail.catalog.fabrics import load_fabric
from dovetail.network.delivery.contention import contend, window_of
from dovetail.network.delivery.deliver import deliver
from dovetail.network.demands.collectives import all_to_all, in_rings, point_to_point, ring_orders
from dovetail.network.demands.transfers import host_copy, kv_transfer, node_all_gather, pipeline
from dovetail.network.fabric.topology import build
from dovetail.network.routing.route import Adaptive

MPFT = build(load_fabric("mpft", 64))
H800 = build(load_fabric("h800-2048", 64))


def test_two_sends_over_one_nic() -> None:
    """4 GB and 8 GB at 40 GB/s: 0.1 s and 0.2 s alone; at 20 GB/s each the first ends after 0.2 s."""
    one, other = point_to_point([(0, 8)], 4e9), point_to_point([(0, 8)], 8e9)
    found = contend(MPFT, Adaptive(), one, other, 8e9)
    mine, others = found.times, found.beside_times
    assert (mine.alone, mine.shared, mine.first, mine.last) == pytest.approx((0.1, 0.2, 0.1, 0.3), rel=1e-4)
    assert (others.alone, others.shared, others.first, others.last) == pytest.approx((0.2, 0.3, 0.3, 0.2), rel=1e-4)


def test_hosts_and_nics_take_turns_on_the_lanes() -> None:
    """Seven GPUs of other nodes send 40 GB/s to GPU 0, whose lanes carry 55: 27.5 for each side, however many flows
    the NIC has. 2.75 GB: 0.1 s at 27.5; then the copy of 5.5 GB has 55, and ends at 0.15 s."""
    incoming = point_to_point([(8 * node, 0) for node in range(1, 8)], 2.75e9 / 7)
    found = contend(H800, Adaptive(), incoming, host_copy(H800, [0, 1], 5.5e9), 5.5e9)
    assert found.times.alone == pytest.approx(2.75 / 40, rel=1e-3)
    assert found.times.shared == pytest.approx(0.1, rel=1e-3)
    assert found.beside_times.shared == pytest.approx(0.15, rel=1e-3)
    assert found.times.first == pytest.approx(2.75 / 40, rel=1e-3)
    assert found.times.last == pytest.approx(0.1 + 2.75 / 40, rel=1e-3)  # nothing is left until the copy is done
    assert found.beside_times.last == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("beside", ["ring", "transfer", "nodes"])
def test_the_first_class_is_as_if_alone(beside: str) -> None:
    gpus = range(32)
    other = {
        "ring": in_rings("all-reduce", ring_orders(gpus, 8, 8), 1e8),
        "transfer": kv_transfer(gpus, 3e7, 8, 8),
        "nodes": node_all_gather(MPFT, gpus, 1e9),
    }[beside]
    demand = all_to_all(gpus, 1e8)
    found = contend(MPFT, Adaptive(), demand, other, 1.0)
    alone = [deliver(MPFT, each, Adaptive(), window=window_of(MPFT, Adaptive(), each)) for each in (demand, other)]
    assert found.times.alone == found.times.first == pytest.approx(alone[0].seconds, rel=1e-9)
    assert found.beside_times.alone == found.beside_times.last == pytest.approx(alone[1].seconds, rel=1e-3)
    for times in (found.times, found.beside_times):
        assert times.alone <= times.shared * (1 + 1e-9)
    longest = max(found.times.alone, found.beside_times.alone)
    most = found.times.alone + found.beside_times.alone
    for end in (found.times.last, found.beside_times.first):
        assert longest * (1 - 1e-9) <= max(end, longest) <= most * (1 + 1e-3)


def test_many_small_messages_take_what_posting_takes() -> None:
    """56 of each GPU to other nodes, 0.25 us apart, where their bytes alone would be there in 5 us."""
    found = contend(MPFT, Adaptive(), all_to_all(range(64), 64.0), node_all_gather(MPFT, range(64), 64.0), 64.0)
    assert found.times.alone > 55 * 0.25e-6
    assert found.times.shared == found.times.first == found.times.last == found.times.alone


def test_what_shares_no_link_is_not_slowed() -> None:
    """A pipeline keeps to its rails, and so off NVLink."""
    found = contend(MPFT, Adaptive(), pipeline(range(32), 1e8, 4), node_all_gather(MPFT, range(32), 1e9), 1e9)
    for times in (found.times, found.beside_times):
        assert times.shared == times.first == times.last == pytest.approx(times.alone, rel=1e-12)


def test_rates_are_found_seldom_only_where_sizes_differ() -> None:
    assert window_of(MPFT, Adaptive(), all_to_all(range(16), 1e8)) == 0
    uneven = kv_transfer(range(16), 1e8, 6, 8)
    window = window_of(MPFT, Adaptive(), uneven)
    exact, quick = (deliver(MPFT, uneven, Adaptive(), window=each).seconds for each in (0.0, window))
    assert 0 < window < 1e-3 * exact and exact <= quick <= exact * (1 + 2e-3)
