"""Table 3 of the ISCA paper, digit for digit, and what of it can be built."""

import pytest

from dovetail.reproduce.rows import Table
from dovetail.reproduce.table3 import Size, fat_tree_size, slim_fly_size
from dovetail.reproduce.tables import make_table


@pytest.fixture(scope="module")
def table() -> Table:
    return make_table("table3")


def test_every_number_that_is_printed_comes_out(table: Table) -> None:
    assert table.is_reproduced
    assert [row.verdict for row in table.rows].count("exact") == 25
    assert {row.subject for row in table.rows if row.paper} == {"FT2", "MPFT", "FT3", "SF", "DF"}


@pytest.mark.parametrize(
    ("network", "endpoints", "switches", "links", "diameter"),
    [
        ("FT2", 2048, 96, 2048, 2),
        ("FT3", 65_536, 5120, 131_072, 4),
        ("SF, q = 27", 30_618, 1458, 29_889, 2),
        ("SF, q = 29", 35_322, 1682, 36_163, 2),
        ("DF", 261_632, 16_352, 384_272, 3),
        ("DF, g = 513", 262_656, 16_416, 385_776, 3),
    ],
)
def test_built_networks(table: Table, network: str, endpoints: int, switches: int, links: int, diameter: int) -> None:
    rows = [row.ours.value for row in table.rows if row.subject == network]
    assert rows[:3] == [endpoints, switches, links]
    (remark,) = (remark for remark in table.remarks if remark.startswith(f"{network}, built: "))
    assert f"at most {diameter} hops" in remark


def test_the_slim_fly_that_does_not_exist_is_not_built(table: Table) -> None:
    assert not any(remark.startswith("SF, built") for remark in table.remarks)
    assert any("28 is not a prime power" in row.note for row in table.rows if row.subject == "SF")


def test_formulas() -> None:
    assert fat_tree_size(4, 2) == Size(endpoints=8, switches=6, links=8)
    assert fat_tree_size(4, 3) == Size(endpoints=16, switches=20, links=32)
    assert slim_fly_size(5) == Size(endpoints=200, switches=50, links=175, group_links=50)


def test_prices_are_said_to_predict_nothing(table: Table) -> None:
    assert any("unverified" in remark for remark in table.remarks)
    assert any("predicts nothing" in row.note for row in table.rows)
