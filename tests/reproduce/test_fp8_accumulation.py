"""Error of the Tensor Core model over K and N_C: the paper's claims, the table, the picture, the command."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib.image
import pytest
from typer.testing import CliRunner

from dovetail.cli import app as cli
from dovetail.reproduce import fp8_accumulation
from dovetail.reproduce.fp8_accumulation import (
    HEADER,
    INTERVALS,
    PAPER,
    Result,
    as_json,
    measure,
    printed_notes,
    printed_rows,
    reproduce,
)

SMALL = partial(reproduce, lengths=(256, 4096), outputs=24)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return SMALL(tmp_path_factory.mktemp("reproduce") / "pictures" / "accumulation.png")


def test_the_paper_s_claims_come_out(result: Result) -> None:
    assert result.is_reproduced
    signed, positive = result.readings(None)
    assert PAPER / 4 < signed < PAPER < positive < 5 * PAPER
    assert all(after < before / 10 for before, after in zip((signed, positive), result.readings(128), strict=True))


def test_error_falls_with_the_interval_and_without_one_grows_with_k(result: Result) -> None:
    for values in ("normal", "uniform 0..1"):
        errors = [result.row(values, 4096, interval).rms for interval in INTERVALS]
        assert errors == sorted(errors, reverse=True)
        assert result.row(values, 4096, None).rms > 4 * result.row(values, 256, None).rms
        kept, alone = (result.row(values, length, 128).rms for length in (4096, 256))
        assert 0.8 < kept / alone < 1.25  # promoted: K does not matter


def test_a_seed_gives_the_same_numbers_and_an_interval_of_k_is_none(result: Result) -> None:
    again = [row for row in result.rows if (row.values, row.length) == ("normal", 256)]
    assert list(measure("normal", 256, 24)) == again
    assert [row.promotion for row in again] == [None, 128, 64]


def test_an_error_that_promotion_leaves_is_no_reproduction(result: Result) -> None:
    spoilt = [replace(row, max=PAPER, max_of_rms=PAPER) if row.promotion == 128 else row for row in result.rows]
    assert not replace(result, rows=tuple(spoilt)).is_reproduced
    exact = [replace(row, max=row.max / 100, max_of_rms=row.max_of_rms / 100) for row in result.rows]
    assert not replace(result, rows=tuple(exact)).is_reproduced  # 2 % is then beyond both readings


def test_the_table_has_a_column_per_interval_and_the_paper_beside_ours(result: Result) -> None:
    rows = list(printed_rows(result))
    assert {len(row) for row in rows} == {len(HEADER)} and len(rows) == 2 * (3 + 2)
    beside = [row for row in rows if row[-1]]
    assert [row[:3] for row in beside] == [("normal", "max of RMS", "4096"), ("uniform 0..1", "max", "4096")]
    for row, ours in zip(beside, result.readings(None), strict=True):
        assert row[3] == f"{100 * ours:.3g}%" and row[-1] == "nearly 2%"
    assert rows[0][2:6] == ("256", rows[0][3], "", "")  # N_C of 512 and 256 are no shorter than K
    notes = " ".join(printed_notes(result))
    assert "neither how values were drawn" in notes and str(result.picture) in notes


def test_the_record_is_plain_data_with_the_verdict(result: Result) -> None:
    record = json.loads(json.dumps(as_json(result)))
    assert record["is_reproduced"] is True and record["paper"] == PAPER
    assert len(record["rows"]) == len(result.rows) and record["rows"][0]["promotion"] is None


def test_the_picture_is_a_png_alone_in_its_directory(result: Result) -> None:
    pixels = matplotlib.image.imread(result.picture)
    assert pixels.shape == (660, 1500, 4) and pixels[..., :3].min() < 0.2
    assert [path.name for path in result.picture.parent.iterdir()] == ["accumulation.png"]


def test_the_command_writes_its_picture_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_accumulation, "reproduce", SMALL)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, ["reproduce", "fp8_accumulation"])
    assert done.exit_code == 0 and (tmp_path / "fp8_accumulation.png").exists()
    assert "max of RMS" in done.stdout and "nearly 2%" in done.stdout
    done = CliRunner().invoke(cli.app, ["reproduce", "fp8_accumulation", "--json", "--out", "deeper/a.png"])
    assert json.loads(done.stdout)["picture"] == "deeper/a.png" and (tmp_path / "deeper" / "a.png").exists()


def test_what_fails_to_come_out_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_accumulation, "REMOVED", 1e6)
    monkeypatch.setattr(fp8_accumulation, "reproduce", SMALL)
    done = CliRunner().invoke(cli.app, ["reproduce", "fp8_accumulation", "--out", str(tmp_path / "a.png")])
    assert isinstance(done.exception, ValueError) and "not every published number was reproduced" in str(done.exception)
    assert "max of RMS" in done.stdout  # the table is printed all the same


def test_a_table_has_no_picture_and_a_wrong_name_a_near_one() -> None:
    done = CliRunner().invoke(cli.app, ["reproduce", "table1", "--out", "a.png"])
    assert isinstance(done.exception, ValueError) and "table1: no picture to write to a.png" in str(done.exception)
    done = CliRunner().invoke(cli.app, ["reproduce", "fp8_acumulation"])
    assert "did you mean fp8_accumulation" in str(done.exception)
