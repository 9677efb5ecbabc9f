"""Folded demands give the times, and the bytes on links, of the whole ones."""

import numpy as np
import pytest

from dovetail.catalog.fabrics import load_fabric, resized
from dovetail.network.demands import all_to_all
from dovetail.network.flows import share_matrix
from dovetail.network.routing import Adaptive, route
from dovetail.network.simulation import simulate
from dovetail.network.symmetry import classes_of, fold, folded_all_to_all, simulate_folded
from dovetail.network.topology import Fabric, build


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
