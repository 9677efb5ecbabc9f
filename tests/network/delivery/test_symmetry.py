"""Folded demands give the times, the bytes on links and what is cut off of the whole ones."""

import numpy as np
import pytest

from dovetail.catalog.fabrics import load_fabric, resized
from dovetail.network.ask.ask import _cut_off
from dovetail.network.delivery.deliver import Delivery, deliver
from dovetail.network.delivery.symmetry import (
    FoldedOutcome,
    classes_of,
    fold,
    folded_all_to_all,
    named_gpus,
    simulate_folded,
)
from dovetail.network.demands.collectives import all_to_all
from dovetail.network.fabric.topology import SWITCH, Fabric, build
from dovetail.network.flows.failures import parse_failure, random_links
from dovetail.network.flows.flows import share_matrix
from dovetail.network.flows.simulation import Change, simulate
from dovetail.network.routing.route import Adaptive, route


def fabric_of(name: str, **changes: object) -> Fabric:
    return build(resized(load_fabric(name), **changes))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ft2", {"endpoints": 96, "radix": 16, "gpus_per_node": 2}),
        ("mpft", {"endpoints": 128, "radix": 8}),
        ("mpft", {"endpoints": 136, "radix": 8}),  # a leaf with one node
        ("mrft", {"endpoints": 128, "radix": 32}),
        ("h800-2048", {"endpoints": 128, "radix": 8}),
    ],
)
def test_all_to_all_whole_and_folded(name: str, changes: dict[str, object]) -> None:
    fabric = fabric_of(name, **changes)
    flows = all_to_all(range(fabric.endpoints), 1e9).steps[0].flows
    whole = simulate(fabric.capacity, flows, route(fabric, flows, Adaptive()))
    folded_flows = folded_all_to_all(fabric, 1e9)
    folded = simulate_folded(fabric, folded_flows)
    assert folded_flows.counts.sum() == len(flows) > 4 * len(folded_flows.counts)
    assert folded.seconds == pytest.approx(whole.seconds, rel=1e-12)
    assert folded.link_bytes == pytest.approx(whole.link_bytes, rel=1e-9)
    # Not only the last end.
    ends = np.repeat(folded.outcome.end, folded_flows.counts.astype(int))
    assert np.sort(ends) == pytest.approx(np.sort(whole.end), rel=1e-9)


def test_classes_have_links_of_one_kind_and_capacity() -> None:
    fabric = fabric_of("h800-2048", endpoints=128, radix=8)
    classes = classes_of(fabric)
    assert classes.link_count.sum() == fabric.links
    for values in (fabric.capacity, fabric.kind, fabric.latency):
        assert (values == values[classes.example][classes.link_class]).all()


def test_shares_of_a_class_are_means_over_its_links() -> None:
    fabric = fabric_of("mpft", endpoints=64, radix=8)
    flows = all_to_all(range(64), 1.0).steps[0].flows
    routes, classes = route(fabric, flows, Adaptive()), classes_of(fabric)
    folded = share_matrix(fold(routes, np.ones(len(flows)), classes)).sum(axis=0)
    whole = np.bincount(classes.link_class, share_matrix(routes).sum(axis=0)) / classes.link_count
    assert folded == pytest.approx(whole)


MPFT = ("mpft", {"endpoints": 128, "radix": 8})
MRFT = ("mrft", {"endpoints": 128, "radix": 32})
FT2 = ("ft2", {"endpoints": 96, "radix": 16, "gpus_per_node": 2})
FT3 = ("ft3", {"endpoints": 128, "radix": 8, "gpus_per_node": 2})
ALONE = ("ft2", {"endpoints": 64, "radix": 16, "gpus_per_node": 1})
PCIE = ("h800-2048", {"endpoints": 96, "radix": 8})
TWO_PORTS = ("mpft", {"endpoints": 64, "radix": 32, "planes": 2, "planes_per_nic": 2})


def failing(fabric: Fabric, *names: str) -> list[Change]:
    """As `parse_failure` has it, and a share of the cables for "2%"."""
    changes = []
    for name in names:
        what, _, seconds = name.partition("@")
        if what.endswith("%"):
            links = random_links(fabric, float(what[:-1]) / 100, seed=1)
            changes.append(Change(seconds=float(seconds or 0), links=links))
        else:
            changes.append(parse_failure(name, fabric))
    return changes


def check_equal(fabric: Fabric, gpus: int, whole: Delivery, folded: FoldedOutcome) -> None:
    assert folded.folded.counts.sum() == gpus * (gpus - 1)
    assert len(folded.folded.flows) == folded.folded.classes.num_flows
    assert folded.seconds == pytest.approx(whole.seconds, rel=1e-9)
    assert folded.latency_seconds == pytest.approx(whole.latency_seconds, rel=1e-9)
    assert folded.link_bytes == pytest.approx(whole.link_bytes, rel=1e-9, abs=1e-9 * whole.link_bytes.max())
    assert folded.num_cut_off == len(whole.cut_off)
    delivered = sum(outcome.delivered.sum() for outcome in whole.outcomes)
    assert folded.delivered_share == pytest.approx(delivered / (1e9 / gpus * gpus * (gpus - 1)), rel=1e-9)
    named, has_more = named_gpus(folded, 8)
    cut = _cut_off(whole.cut_off, 1.0)
    assert (tuple(sorted(named)), has_more) == (cut.gpus, cut.has_more_gpus)
    ends = np.sort(np.repeat(folded.outcome.end, folded.folded.counts.round().astype(int)))
    assert ends == pytest.approx(np.sort(whole.outcomes[-1].end), rel=1e-9)


@pytest.mark.parametrize(
    ("spec", "failures"),
    [
        (MPFT, ["plane:3"]),
        (MPFT, ["switch:1"]),
        (MPFT, ["nic:5", "nic:14"]),
        (MPFT, ["link:7"]),  # NVLink: cuts off
        (MPFT, ["link:300"]),
        (MPFT, ["2%", "plane:0"]),
        (MPFT, ["plane:2@0.002"]),
        (MPFT, ["nic:5", "switch:3@0.002", "link:7@0.004"]),
        (MRFT, ["switch:2"]),
        (MRFT, ["nic:9", "2%@0.003"]),
        (FT2, ["switch:0"]),
        (FT2, ["nic:1", "switch:2@0.003"]),
        (FT3, ["switch:3", "5%"]),
        (FT3, ["plane:0@0.005"]),  # which is everything
        (ALONE, ["nic:9", "10%"]),
        (PCIE, ["2%", "plane:4@0.001"]),
        (TWO_PORTS, ["plane:1", "nic:3"]),
        (TWO_PORTS, ["3%", "nic:9@0.001"]),
    ],
)
@pytest.mark.parametrize("gpus", [None, 45])  # whole, and with a node of which not all take part
def test_failures_whole_and_folded(spec: tuple[str, dict[str, object]], failures: list[str], gpus: int | None) -> None:
    fabric = fabric_of(spec[0], **spec[1])
    changes, ranks = failing(fabric, *failures), gpus or fabric.endpoints
    for wait in (0.0, 0.003) if "@" in failures[-1] else (0.0,):
        whole = deliver(fabric, all_to_all(range(ranks), 1e9), Adaptive(), changes=changes, reroute_seconds=wait)
        flows = folded_all_to_all(fabric, 1e9, changes, gpus)
        check_equal(fabric, ranks, whole, simulate_folded(fabric, flows, changes, reroute_seconds=wait))
        assert len(flows.flows) < ranks * (ranks - 1)


@pytest.mark.parametrize("gpus", [3, 6, 64])
def test_nodes_without_nvlink_post_all_messages(gpus: int) -> None:
    fabric = fabric_of("ft2", endpoints=64, radix=16, gpus_per_node=4, nvlink=None)
    whole = deliver(fabric, all_to_all(range(gpus), 1.0), Adaptive())
    folded = simulate_folded(fabric, folded_all_to_all(fabric, 1.0, gpus=gpus))
    assert folded.latency_seconds == pytest.approx(whole.latency_seconds, rel=1e-9)
    assert folded.latency_seconds > (gpus - 1.01) * 0.25e-6


def test_links_that_come_back() -> None:
    fabric = fabric_of("mpft", endpoints=64, radix=8)
    (down,) = failing(fabric, "nic:3@0.001")
    changes = [Change(seconds=0.004, links=down.links, is_up=True), down]
    whole = deliver(fabric, all_to_all(range(64), 1e9), Adaptive(), changes=changes, reroute_seconds=0.001)
    folded = simulate_folded(fabric, folded_all_to_all(fabric, 1e9, changes), changes, reroute_seconds=0.001)
    check_equal(fabric, 64, whole, folded)
    for_ever = simulate_folded(fabric, folded_all_to_all(fabric, 1e9, [down]), [down], reroute_seconds=0.001)
    assert for_ever.seconds > folded.seconds * (1 + 1e-6)


def test_classes_that_do_not_know_what_fails_are_wrong() -> None:
    """Those of a node that is neither the first nor the second of its class."""
    fabric = fabric_of("mpft", endpoints=128, radix=8)
    changes, demand = failing(fabric, "nic:21"), all_to_all(range(128), 1e9)
    whole, unaware = deliver(fabric, demand, Adaptive(), changes=changes), folded_all_to_all(fabric, 1e9)
    with pytest.raises(ValueError, match="at 0.0 s only some links of a class change"):
        simulate_folded(fabric, unaware, changes)
    up = np.ones(fabric.links, bool)
    up[changes[0].links] = False
    routes = fold(route(fabric, unaware.flows, Adaptive(), up), unaware.counts, unaware.classes)
    wrong = simulate(fabric.capacity[unaware.classes.example], unaware.flows, routes)
    assert abs(wrong.seconds / whole.seconds - 1) > 0.01


def test_what_fails_twice_is_folded_with_what_fails_once() -> None:
    fabric = fabric_of("mpft", endpoints=128, radix=8)
    plane = failing(fabric, "plane:5")
    assert classes_of(fabric, [*plane, *failing(fabric, "nic:5")]).num_flows == classes_of(fabric, plane).num_flows
    assert classes_of(fabric, plane).num_flows == classes_of(fabric).num_flows
    assert classes_of(fabric, [*plane, *failing(fabric, "nic:5@1")]).num_flows == classes_of(fabric).num_flows
    assert classes_of(fabric, failing(fabric, "nic:5")).num_flows > classes_of(fabric).num_flows


def test_parallel_cables_are_one_class_until_one_of_them_fails() -> None:
    fabric = fabric_of("mrft", endpoints=128, radix=32)
    between = np.flatnonzero(fabric.kind == SWITCH)
    classes = classes_of(fabric)
    assert (classes.link_count[classes.link_class[between]] == 4).all()
    changes = failing(fabric, f"link:{between[0]}")
    counts = classes_of(fabric, changes).link_count[classes_of(fabric, changes).link_class[between]]
    assert sorted(np.unique(counts, return_counts=True)[1]) == [2, 6, len(between) - 8]
    whole = deliver(fabric, all_to_all(range(100), 1e9), Adaptive(), changes=changes, forwarding="none")
    flows = folded_all_to_all(fabric, 1e9, changes, 100)
    folded = simulate_folded(fabric, flows, changes, forwarding="none")  # across rails, so through spines
    check_equal(fabric, 100, whole, folded)
    assert folded.link_bytes[between].max() > 0
