"""Parts of a network are counted on it, and prices add up."""

import numpy as np
import pytest

from dovetail.catalog.fabrics import load_fabric
from dovetail.config import validate
from dovetail.network.fabric.price import TABLE_3, PriceBasis, bill, cables_by_length, dollars
from dovetail.network.fabric.topology import build


def quantities(name: str, endpoints: int | None = None) -> dict[str, int]:
    return {part.name: part.quantity for part in bill(build(load_fabric(name, endpoints))).parts}


def test_parts_of_full_fat_trees() -> None:
    assert quantities("mpft") == {
        "leaf switch, 64 ports": 8 * 64,
        "spine switch, 64 ports": 8 * 32,
        "cable between switches": 16_384,
        "cable to a NIC": 16_384,
        "NIC": 16_384,
        "transceiver": 2 * 16_384,
    }
    parts = quantities("ft3")
    assert (parts["leaf switch, 64 ports"], parts["spine switch, 64 ports"]) == (2048, 2048)
    assert parts["core switch, 64 ports"] == 1024 and parts["cable between switches"] == 131_072


def test_parts_with_storage_are_more() -> None:
    parts, without = quantities("h800-2048"), quantities("mpft", 2048)
    assert parts["NIC"] == without["NIC"] + 256 + 180 * 2
    assert parts["storage switch, 64 ports"] == 20 + 16, "616 ports on 20 leaves, as few spines as divide 32 cables"
    assert parts["leaf switch, 64 ports"] == without["leaf switch, 64 ports"]


def test_cables_within_groups() -> None:
    assert cables_by_length(build(load_fabric("dragonfly"))) == (511 * 496, 511 * 256)
    assert cables_by_length(build(load_fabric("slim-fly"))) == (27 * 27 * 14, 27**3)
    assert cables_by_length(build(load_fabric("h800-2048")))[0] == 0


def test_price_is_the_sum_of_the_parts_and_of_the_closed_form() -> None:
    for name in ("ft2", "ft3", "mpft", "slim-fly", "dragonfly"):
        fabric = build(load_fabric(name))
        priced = bill(fabric)
        short, long = cables_by_length(fabric)
        assert priced.dollars == pytest.approx(dollars(fabric.switches, short + long, short), rel=1e-12)
        assert priced.dollars_per_endpoint * fabric.endpoints == pytest.approx(priced.dollars)
    assert bill(build(load_fabric("ft2"))).dollars == 96 * 83_400 + 2048 * 485


def test_no_single_price_of_cables_gives_all_costs_of_the_paper() -> None:
    """Why the basis has two [ISCA Table 3]: what the costs allow for, to half of their last digit, are strips of pairs
    of prices, which would meet in a corner of two of them."""
    table = [(96, 2048, 9), (768, 16_384, 72), (5120, 131_072, 491), (1568, 32_928, 146), (16_352, 384_272, 1522)]
    rows = np.array([row[:2] for row in table]) / 1e6
    costs = np.array([row[2] for row in table])

    def can_be_met(count: int) -> bool:
        corners = [
            np.linalg.solve(rows[[one, other]], costs[[one, other]] + [above, beside])
            for one in range(count)
            for other in range(one)
            for above in (-0.5, 0.5)
            for beside in (-0.5, 0.5)
            if abs(np.linalg.det(rows[[one, other]])) > 1e-12
        ]
        return any((np.abs(rows[:count] @ corner - costs[:count]) <= 0.5 + 1e-9).all() for corner in corners)

    assert can_be_met(4) and not can_be_met(5)


def test_own_prices() -> None:
    table = {"name": "mine", "source": "an offer", "switch_dollars": 20_000, "cable_dollars": 0, "nic_dollars": 1_000}
    basis = validate(PriceBasis, table, "prices.toml")
    priced = bill(build(load_fabric("ft2")), basis)
    assert priced.dollars == 96 * 20_000 + 2048 * 1_000
    assert priced.dollars_per_rate(2048 * 40e9) == pytest.approx(priced.dollars / (2048 * 40))
    with pytest.raises(ValueError, match="expected more than 0"):
        priced.dollars_per_rate(0)
    with pytest.raises(ValueError, match="switch_dollars = -1"):
        validate(PriceBasis, table | {"switch_dollars": -1}, "prices.toml")
    with pytest.raises(ValueError, match="unknown key 'switch_dollar'; did you mean switch_dollars"):
        validate(PriceBasis, table | {"switch_dollar": 1}, "prices.toml")


def test_basis_says_where_it_comes_from() -> None:
    assert "unverified" in TABLE_3.source and "[ISCA Table 3]" in TABLE_3.source


def test_switches_of_other_ports_cost_in_proportion() -> None:
    """Else a fabric of larger switches would look half as expensive."""
    parts = bill(build(load_fabric("mpft-roce", 16384))).parts
    switches = [part for part in parts if "128 ports" in part.name]
    assert switches and all(
        part.dollars == 2 * TABLE_3.switch_dollars and "unverified" in part.note for part in switches
    )
    flat = TABLE_3.model_copy(update={"switch_ports": None})
    assert bill(build(load_fabric("mpft-roce", 16384)), flat).parts[0].dollars == TABLE_3.switch_dollars
