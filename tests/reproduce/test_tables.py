"""The tables that are counted: what comes out, what the paper contradicts, and how it is shown."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dovetail.cli import app as cli
from dovetail.config import read_toml
from dovetail.planner.training.bubbles import published_bubble
from dovetail.reproduce import pipelines, tables
from dovetail.reproduce.rows import Found
from dovetail.reproduce.tables import (
    EXPERIMENTS,
    FINDERS,
    HEADER,
    Report,
    as_json,
    make_table,
    printed_notes,
    printed_rows,
    reproduce,
)
from dovetail.spec.band import Band

COUNTED = ("table1", "table2", "speed_limit", "cost", "deployment", "dualpipe")  # nothing predicted in them
EXPECTED = read_toml(Path(tables.__file__).with_name("expected.toml"))

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


def test_every_number_of_tables_1_and_2_is_the_golden_one() -> None:
    found = {
        (name, row.subject, row.quantity): row.ours for name in ("table1", "table2") for row in make_table(name).rows
    }
    assert found.keys() == GOLDEN.keys()
    for key, ours in found.items():
        assert ours.low == ours.value == ours.high and float(f"{ours.value:.6g}") == GOLDEN[key], key


@pytest.mark.parametrize("name", COUNTED)
def test_each_counted_row_comes_out_or_the_paper_contradicts_itself(name: str) -> None:
    table = make_table(name)
    assert table.is_reproduced
    for row in table.rows:
        assert row.verdict in ("exact", "paper inconsistent", ""), row
        assert row.source.startswith("[") and (row.note or not row.is_inconsistent), row
        assert row.is_inconsistent != row.is_reproduced, row


def test_the_rows_that_the_paper_contradicts() -> None:
    rows = [
        (row["subject"], row["paper"])
        for entry in EXPECTED.values()
        for row in entry["rows"]
        if "is_inconsistent" in row
    ]
    assert rows == [
        ("llama-3.1-405b", "7.28"),
        ("qwen2.5-72b", "394"),
        ("llama-3.1-405b", "2448"),
        ("MPFT, from itself", "2.06"),
    ]


def test_expected_has_every_table_and_nothing_of_ours() -> None:
    assert list(EXPECTED) == list(FINDERS)
    keys = {key for entry in EXPECTED.values() for row in entry["rows"] for key in row}
    assert keys <= {
        *("subject", "quantity", "paper", "within", "printed", "source"),
        *("is_inconsistent", "is_hindsight", "note", "cause"),
    }


def test_what_is_published_of_limits_and_arithmetic() -> None:
    """The digits of expected.toml are the papers'."""
    printed = {row.paper for name in ("speed_limit", "cost", "deployment") for row in make_table(name).rows}
    assert printed >= {"120.96", "14.76", "67", "6.72", "0.82", "1200"}
    assert printed >= {"2788", "5.576", "180", "3.7", "288", "320", "226.75", "87072", "8.72"}


def test_the_width_of_the_model_does_not_give_the_papers_digits() -> None:
    rows = {(row.subject, row.quantity): row for row in make_table("speed_limit").rows}
    printed = rows["400G InfiniBand, hidden 7000", "token, ms"]
    model = rows["400G InfiniBand, hidden 7168", "token, ms"]
    assert printed.verdict == "exact" and f"{model.ours.value:.2f}" == "15.11"
    assert replace(model, paper=printed.paper).verdict == "NO"


def test_bubbles_in_expected_are_those_of_the_published_formulas() -> None:
    rows = {row.subject: row.paper for row in make_table("dualpipe").rows if row.quantity == "bubble"}
    for subject, (schedule, ranks, _) in pipelines.PIPELINES.items():
        formula = published_bubble(schedule, ranks, forward=1.0, backward=2.0, weight_backward=1.0, pair=2.5)
        assert float(rows[subject]) == formula


def test_what_is_printed_of_a_table() -> None:
    report = reproduce(["table2"])
    lines = list(printed_rows(report))
    assert {len(line) for line in lines} == {len(HEADER)} and len(lines) == 8
    assert lines[0][:2] == ("deepseek-v2", "parameters, B") and lines[1][0] == ""
    notes = list(printed_notes(report))
    assert notes[0].startswith("qwen2.5-72b, GFLOP per token: the paper is inconsistent:")
    assert notes[-1] == "exact: 6 of 6 reproduced; contradicted by the paper's own numbers: 2"


def test_json_has_the_verdicts() -> None:
    record = json.loads(json.dumps(as_json(reproduce(["table2"]))))
    (table,) = record["tables"]
    assert record["is_reproduced"] is table["is_reproduced"] is True
    assert [row["verdict"] for row in table["rows"]] == ["exact"] * 6 + ["paper inconsistent"] * 2
    assert table["rows"][5]["ours"]["value"] == pytest.approx(250.456, abs=1e-3)


def test_all_tables_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is counted, one that is predicted and missed: what is exact, met and missed is told at the end."""
    keys = [(row["subject"], row["quantity"]) for row in EXPECTED["table4"]["rows"]]
    published = {(row["subject"], row["quantity"]): float(row.get("paper", 1)) for row in EXPECTED["table4"]["rows"]}
    values = {key: Band(published[key], published[key] * 0.9, published[key] * 1.1) for key in keys}
    values["predicted", "step, s"] = Band(15.0, 14.0, 16.0)
    finders = {"table1": FINDERS["table1"], "table4": lambda: Found(values=values, remarks=("a remark",))}
    monkeypatch.setattr(tables, "FINDERS", finders)
    report = reproduce()
    assert [table.name for table in report.tables] == ["table1", "table4"] and not report.is_reproduced
    assert sum(row.verdict == "MISSED" for row in report.rows) == 1
    lines = list(printed_rows(report))
    assert {len(line) for line in lines} == {len(HEADER)}
    assert [line[0] for line in lines if not any(line[1:])] == ["table1", "table4"]
    assert ("predicted", "step, s", "19.926", "15 (14 to 16)", "-24.72%", "5 %", "MISSED", "[ISCA Table 4]") in lines
    notes = list(printed_notes(report))
    missed = [note for note in notes if note.startswith("MISSED: predicted, step, s: -24.72%; likely cause: ")]
    assert len(missed) == 1 and "table4: a remark" in notes
    assert notes[-3].startswith("run by name: ") and all(name in notes[-3] for name in EXPERIMENTS)
    assert notes[-2].startswith("exact: ")
    counts = "predicted: 11 of 12 within their target; 1 missed; 11 have the published value in their band"
    assert notes[-1] == counts
    done = CliRunner().invoke(cli.app, ["reproduce"])
    assert isinstance(done.exception, ValueError) and "not every published number was reproduced" in str(done.exception)
    assert "MISSED" in done.stdout and "[ISCA Table 1]" in done.stdout


def test_the_command_succeeds_where_all_comes_out() -> None:
    done = CliRunner().invoke(cli.app, ["reproduce", "cost"])
    assert done.exit_code == 0 and "5.576" in done.stdout


def test_help_names_every_table_and_experiment() -> None:
    words = CliRunner().invoke(cli.app, ["reproduce", "--help"], env={"COLUMNS": "200"}).stdout
    for name in (*FINDERS, *EXPERIMENTS):
        kind, digit = name[:-1], name[-1]
        ranges = {"table": "table1 to table5", "fig": "fig5 to fig8"}
        assert (ranges.get(kind, name) if digit.isdigit() else name) in words, name


def test_an_unknown_table_and_a_picture() -> None:
    with pytest.raises(ValueError, match="no table 'table6' to reproduce; did you mean"):
        reproduce(["table6"])
    with pytest.raises(ValueError, match="cost: no picture to write to x.png; --out is for fp8_accumulation"):
        reproduce(["cost"], Path("x.png"))
    with pytest.raises(ValueError, match="all tables together: no picture"):
        reproduce([], Path("x.png"))


def test_a_report_of_nothing_missed_is_reproduced() -> None:
    assert Report(title="", source="", tables=(make_table("cost"), make_table("table1"))).is_reproduced


def test_several_tables_by_name() -> None:
    report = reproduce(["table1", "table2"])
    assert [table.name for table in report.tables] == ["table1", "table2"]
    assert "run by name" not in "\n".join(printed_notes(report))
    with pytest.raises(ValueError, match="fp8_accumulation is an experiment, which is run by itself"):
        reproduce(["table1", "fp8_accumulation"])
