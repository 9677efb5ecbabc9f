"""Tables 1 and 2 of the ISCA paper: what comes out, and what the paper itself contradicts."""

import json

import pytest

from dovetail.reproduce.tables import Row, Table, as_json, printed_notes, printed_rows, reproduce, table_names

# Ours, to the last digit shown; a change here is a change of a count.
GOLDEN = {
    ("table1", "deepseek-v3", "KB per token"): 70.272,
    ("table1", "qwen2.5-72b", "KB per token"): 327.68,
    ("table1", "llama-3.1-405b", "KB per token"): 516.096,
    ("table1", "qwen2.5-72b", "times DeepSeek-V3"): 4.66302,
    ("table1", "llama-3.1-405b", "times DeepSeek-V3"): 7.34426,
    ("table2", "deepseek-v2", "parameters, B"): 235.741,
    ("table2", "deepseek-v2", "active parameters, B"): 20.8515,
    ("table2", "deepseek-v2", "GFLOP per token"): 155.308,
    ("table2", "deepseek-v3", "parameters, B"): 671.026,
    ("table2", "deepseek-v3", "active parameters, B"): 36.6256,
    ("table2", "deepseek-v3", "GFLOP per token"): 250.456,
    ("table2", "qwen2.5-72b", "GFLOP per token"): 444.869,
    ("table2", "llama-3.1-405b", "GFLOP per token"): 2473.25,
}


def test_every_number_is_the_golden_one() -> None:
    found = {(name, row.model, row.quantity): row.ours for name in table_names() for row in reproduce(name).rows}
    assert found.keys() == GOLDEN.keys()
    for key, ours in found.items():
        assert float(f"{ours:.6g}") == GOLDEN[key], key


@pytest.mark.parametrize("name", table_names())
def test_each_row_comes_out_or_the_paper_contradicts_itself(name: str) -> None:
    table = reproduce(name)
    assert table.is_reproduced and table.source.startswith("[ISCA Table")
    for row in table.rows:
        assert row.is_reproduced != row.is_inconsistent, row
        assert row.note or not row.is_inconsistent, "an inconsistency has to be said aloud"


def test_the_inconsistent_rows() -> None:
    rows = [(row.model, row.paper) for name in table_names() for row in reproduce(name).rows if row.is_inconsistent]
    assert rows == [("llama-3.1-405b", "7.28"), ("qwen2.5-72b", "394"), ("llama-3.1-405b", "2448")]


def test_a_row_that_differs_fails_its_table() -> None:
    row = Row(model="m", quantity="q", paper="2.0", ours=2.1, is_inconsistent=False, note="")
    table = Table(name="t", title="", source="", rows=(row,))
    assert row.difference == pytest.approx(0.05)
    assert not row.is_reproduced and not table.is_reproduced
    assert next(iter(printed_rows(table)))[-1] == "NO"
    assert as_json(table)["rows"][0]["is_reproduced"] is False


def test_ours_has_to_round_to_the_printed_digits() -> None:
    for ours, is_reproduced in ((4.6549, False), (4.6551, True), (4.6649, True), (4.6651, False)):
        row = Row(model="m", quantity="q", paper="4.66", ours=ours, is_inconsistent=False, note="")
        assert row.is_reproduced == is_reproduced, ours


def test_json_and_notes() -> None:
    table = reproduce("table2")
    record = json.loads(json.dumps(as_json(table)))
    assert [row["is_reproduced"] for row in record["rows"]] == [row.is_reproduced for row in table.rows]
    assert record["is_reproduced"] is True
    notes = list(printed_notes(table))
    assert notes[0].startswith("qwen2.5-72b, GFLOP per token: the paper is inconsistent:")


def test_an_unknown_table() -> None:
    with pytest.raises(ValueError, match="no table 'table3' to reproduce; did you mean"):
        reproduce("table3")
