"""Demands on fabrics: bandwidths, messages, repeated steps and failures on the way."""

import numpy as np
import pytest

from dovetail.catalog.fabrics import load_fabric, resized
from dovetail.network.delivery.deliver import deliver, most_messages
from dovetail.network.demands.collectives import Demand, Step, all_to_all, in_rings, point_to_point, ring_orders
from dovetail.network.fabric.topology import Fabric, build
from dovetail.network.flows.failures import links_of_nic, links_of_plane
from dovetail.network.flows.flows import Flows
from dovetail.network.flows.simulation import Change
from dovetail.network.routing.route import Adaptive, Ecmp, host_of


@pytest.fixture(scope="module")
def fabric() -> Fabric:
    return build(load_fabric("mpft", 64))


def test_a_message_between_two_gpus(fabric: Fabric) -> None:
    delivery = deliver(fabric, point_to_point([(0, 8)], 1e9), Adaptive())
    assert delivery.seconds == pytest.approx(1e9 / 40e9 + 2.8e-6)
    assert delivery.algorithm_bandwidth == pytest.approx(40e9, rel=1e-3)
    assert delivery.link_bytes[fabric.nic_link[0, 0]] == pytest.approx(1e9)
    assert delivery.latency_seconds == pytest.approx(2.8e-6)


def test_all_to_all_bandwidth_is_the_nics(fabric: Fabric) -> None:
    """Of 64 ranks 56 are reached over the NIC."""
    delivery = deliver(fabric, all_to_all(range(64), 16e9), Adaptive())
    assert delivery.bus_bandwidth == pytest.approx(40e9 * 63 / 56, rel=1e-3)


LONGEST = (2.8 + 3.33) * 1e-6  # [ISCA Table 5]: one leaf, after NVLink
HOST, GPU = 0.25e-6, 0.003e-6  # of a message, as in the catalog


def free(fabric: Fabric) -> Fabric:
    """With messages that cost nothing."""
    return build(resized(fabric.spec, posting=None))


def test_small_messages_are_bound_by_latency_and_by_their_number(fabric: Fabric) -> None:
    """56 of the 63 go to other nodes; the first one's cost is in the latency."""
    demand = all_to_all(range(64), 64.0 * 64)
    slow, quick = (deliver(each, demand, Adaptive()) for each in (fabric, free(fabric)))
    assert quick.seconds == pytest.approx(LONGEST, rel=0.02)
    assert slow.seconds == slow.latency_seconds == pytest.approx(LONGEST + 55 * HOST)


def test_large_messages_hide_what_posting_them_costs(fabric: Fabric) -> None:
    demand = all_to_all(range(64), 1e9)
    slow, quick = (deliver(each, demand, Adaptive()).seconds for each in (fabric, free(fabric)))
    assert slow == quick > 100 * 55 * HOST


def test_no_message_within_a_node_is_posted(fabric: Fabric) -> None:
    assert deliver(fabric, all_to_all(range(8), 0.0), Adaptive()).seconds == pytest.approx(3.33e-6)


def test_gpus_post_faster_than_a_cpu(fabric: Fabric) -> None:
    flows = Flows.of([0, 0, 1], [8, 9, 2], 0.0)
    seconds = []
    for poster in ("host", "gpu"):
        step = Step(flows=flows, messages=np.array([1000.0, 24.0, 1e6]), posted_by=poster)
        demand = Demand(name="", ranks=4, size=1, bus_factor=1, steps=(step,))
        seconds.append(deliver(fabric, demand, Adaptive()).seconds)
    assert seconds == pytest.approx([LONGEST + 1023 * HOST, LONGEST + 1023 * GPU])


@pytest.mark.parametrize("name", ["h800-2048", "alone"])
def test_messages_are_those_of_the_gpu_that_posts_most(name: str) -> None:
    """One by one; copies from hosts are no messages, and without NVLink all between GPUs are."""
    spec = load_fabric("h800-2048" if name == "h800-2048" else "ft2", 64)
    fabric = build(spec if name == "h800-2048" else resized(spec, nvlink=None))
    random = np.random.default_rng(7)
    source, destination = random.integers(0, 64, (2, 500))
    messages = random.integers(1, 9, 500).astype(float)
    if name == "h800-2048":
        source[::9] = host_of(fabric, 3)
    posted = [0.0] * fabric.vertices
    for one, other, count in zip(source, destination, messages, strict=True):
        is_outside = one // 8 != other // 8 if name == "h800-2048" else one != other
        posted[one] += count * (is_outside and one < 64)
    step = Step(flows=Flows.of(source, destination, 1.0), messages=messages)
    assert most_messages(fabric, step) == max(posted) > 0


def test_a_step_that_is_repeated_takes_as_many_times_as_long(fabric: Fabric) -> None:
    flows = Flows.of([0], [8], 1e6)
    once, often = (
        deliver(fabric, Demand(name="", ranks=2, size=1, bus_factor=1, steps=(Step(flows=flows, times=n),)), Adaptive())
        for n in (1, 1000)
    )
    assert often.seconds == pytest.approx(1000 * once.seconds)
    assert often.link_bytes == pytest.approx(1000 * once.link_bytes)


def test_a_plane_that_is_down_for_a_while(fabric: Fabric) -> None:
    """Steps before, during and after are as long as without a change and with one; one is cut by each change."""
    demand = in_rings("all-gather", ring_orders(range(64), 8, 8), 64e9)
    lost = links_of_plane(fabric, 3)
    whole = deliver(fabric, demand, Adaptive()).seconds
    less = deliver(fabric, demand, Adaptive(), changes=[Change(seconds=0.0, links=lost)]).seconds
    for_ever = deliver(fabric, demand, Adaptive(), changes=[Change(seconds=whole / 2, links=lost)]).seconds
    changes = [Change(seconds=whole / 2, links=lost), Change(seconds=whole, links=lost, is_up=True)]
    a_while = deliver(fabric, demand, Adaptive(), changes=changes).seconds
    assert whole < a_while < for_ever < less
    assert for_ever == pytest.approx((whole + less) / 2, rel=0.02)
    assert a_while == pytest.approx(whole + whole / 2 * (1 - whole / less), rel=0.03)


def test_all_to_all_without_a_plane_loses_an_eighth_of_its_bandwidth(fabric: Fabric) -> None:
    changes = [Change(seconds=0.0, links=links_of_plane(fabric, 3))]
    demand = all_to_all(range(64), 64e9)
    with_it, without = deliver(fabric, demand, Adaptive()), deliver(fabric, demand, Adaptive(), changes=changes)
    assert without.is_complete
    # Flows are not cut: a NIC has 56 of its own and 8 or 9 of the lost one's.
    assert 56 / 65 - 1e-3 < with_it.seconds / without.seconds < 7 / 8


def test_gpus_that_are_cut_off_are_named_and_times_stay_finite() -> None:
    """Without NVLink nothing else leads to a GPU whose NIC is down; what had arrived is counted."""
    fabric = build(load_fabric("dragonfly", 64))
    demand = all_to_all(range(64), 64e9)
    whole = deliver(fabric, demand, Ecmp()).seconds
    lost = [Change(seconds=0.5 * whole, links=links_of_nic(fabric, gpu)) for gpu in range(8)]
    delivery = deliver(fabric, demand, Ecmp(), changes=lost, forwarding="none")
    assert not delivery.is_complete
    assert ((delivery.cut_off.source < 8) | (delivery.cut_off.destination < 8)).all()
    assert np.isfinite(delivery.seconds) and delivery.algorithm_bandwidth == 0.0
    assert 0 < delivery.outcomes[-1].delivered[delivery.outcomes[-1].is_cut_off].max() < 1e9


def test_copies_to_the_gpu_slow_its_network_down_unless_they_come_after_it() -> None:
    """[ISCA §4.5]: a KV cache copied from the host against traffic of the NIC over the same lanes; classes of their own
    let the traffic pass first."""
    fabric = build(load_fabric("h800-2048", 64))
    lanes = float(fabric.capacity[fabric.pcie_link[0]])
    nic = float(fabric.capacity[fabric.nic_link[0, 0]])
    source, destination = [8, host_of(fabric, 0)], [0, 0]
    seconds = []
    for priority in ([0, 0], [0, 1]):
        flows = Flows.of(source, destination, [1e9, 10e9], priority=priority)
        demand = Demand(name="", ranks=2, size=1e9, bus_factor=1.0, steps=(Step(flows=flows),))
        outcome = deliver(fabric, demand, Adaptive()).outcomes[0]
        seconds.append(float(outcome.end[0]))
    assert seconds[0] == pytest.approx(1e9 / (lanes / 2), rel=1e-3)
    assert seconds[1] == pytest.approx(1e9 / nic, rel=1e-3)
