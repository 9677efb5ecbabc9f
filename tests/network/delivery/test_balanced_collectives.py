"""Closed forms and the simulation, to nine digits."""

import pytest
from balanced_collectives import all_to_all_seconds, ring_seconds

from dovetail.catalog.fabrics import load_fabric
from dovetail.network.delivery.deliver import deliver
from dovetail.network.demands.collectives import all_to_all, in_rings, ring_orders
from dovetail.network.fabric.topology import build
from dovetail.network.routing.route import Adaptive, Static


@pytest.mark.parametrize("name", ["ft2", "mpft", "mrft"])
@pytest.mark.parametrize("ranks", [8, 16, 128, 384])
def test_all_to_all(name: str, ranks: int) -> None:
    fabric = build(load_fabric(name, 384))
    delivery = deliver(fabric, all_to_all(range(ranks), 1e9), Adaptive())
    assert delivery.seconds == pytest.approx(all_to_all_seconds(fabric, ranks, 1e9), rel=1e-9)


@pytest.mark.parametrize("name", ["ft2", "mpft", "mrft"])
@pytest.mark.parametrize("size", [0.0, 1e3, 1e6, 1e9])
def test_all_to_all_of_any_size(name: str, size: float) -> None:
    fabric = build(load_fabric(name, 64))
    delivery = deliver(fabric, all_to_all(range(64), size), Adaptive())
    assert delivery.seconds == pytest.approx(all_to_all_seconds(fabric, 64, size), rel=1e-9)


@pytest.mark.parametrize("name", ["ft2", "mpft", "mrft"])
@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter", "all-reduce"])
@pytest.mark.parametrize(
    ("ranks", "channels", "size"), [(8, 1, 1e9), (64, 1, 1e9), (64, 8, 1e9), (512, 8, 1e9), (64, 20, 1e3)]
)
def test_rings(name: str, kind: str, ranks: int, channels: int, size: float) -> None:
    fabric = build(load_fabric(name, 512))
    demand = in_rings(kind, ring_orders(range(ranks), 8, channels), size)
    delivery = deliver(fabric, demand, Static())
    assert delivery.seconds == pytest.approx(ring_seconds(fabric, demand, channels), rel=1e-9)


def test_half_nodes_have_no_closed_form() -> None:
    with pytest.raises(ValueError, match="12 ranks on nodes of 8"):
        all_to_all_seconds(build(load_fabric("mpft", 64)), 12, 1.0)
