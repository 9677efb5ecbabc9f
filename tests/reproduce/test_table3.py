"""Table 3 of the ISCA paper, digit for digit, and what of it can be built."""

import json
from pathlib import Path

import pytest

from dovetail.reproduce.table3 import (
    HEADER,
    PAPER,
    QUANTITIES,
    Row,
    Size,
    as_json,
    fat_tree_size,
    printed_notes,
    printed_rows,
    reproduce,
    slim_fly_size,
)

TABLE = reproduce()


def test_every_number_that_is_printed_comes_out() -> None:
    found = {(row.network, row.quantity): row for row in TABLE.rows}
    assert TABLE.is_reproduced
    for network, printed in PAPER.items():
        for quantity, paper in zip(QUANTITIES, printed, strict=True):
            row = found[network, quantity]
            decimals = len(paper.partition(".")[2])
            assert row.paper == paper and f"{row.ours:.{decimals}f}" == paper


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
def test_built_networks(network: str, endpoints: int, switches: int, links: int, diameter: int) -> None:
    rows = {row.quantity: row for row in TABLE.rows if row.network == network}
    assert [rows[quantity].ours for quantity in QUANTITIES[:3]] == [endpoints, switches, links]
    graph = TABLE.graphs[network]
    assert rows["links"].is_built and graph.is_connected and graph.diameter == diameter
    assert graph.ports <= graph.radix == 64


def test_the_slim_fly_that_does_not_exist_is_not_built() -> None:
    assert "SF" not in TABLE.graphs
    assert not any(row.is_built for row in TABLE.rows if row.network == "SF")
    assert any("28 is no prime power" in note for note in printed_notes(TABLE))


def test_formulas() -> None:
    assert fat_tree_size(4, 2) == Size(endpoints=8, switches=6, links=8)
    assert fat_tree_size(4, 3) == Size(endpoints=16, switches=20, links=32)
    assert slim_fly_size(5) == Size(endpoints=200, switches=50, links=175, group_links=50)


def test_another_number_would_be_seen() -> None:
    row = Row(network="FT2", quantity="cost, M$", formula="", paper="9", ours=9.6, is_built=True)
    assert not row.is_reproduced and row.difference == pytest.approx(0.6 / 9)


def test_what_is_printed() -> None:
    rows = list(printed_rows(TABLE))
    assert all(len(row) == len(HEADER) for row in rows)
    assert ("DF", "links", "g a (a - 1) / 2 + g a h / 2, h = 16", "384,272", "384,272", "+0.00%", "yes") in rows
    assert "unverified" in next(iter(printed_notes(TABLE)))
    data = json.loads(json.dumps(as_json(TABLE)))
    assert data["is_reproduced"] and len(data["rows"]) == 8 * 5


def test_it_has_no_picture() -> None:
    with pytest.raises(ValueError, match="no picture"):
        reproduce(Path("table3.png"))
