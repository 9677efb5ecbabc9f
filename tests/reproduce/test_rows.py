"""When a number counts as reproduced: digits, rounding of inputs, targets, contradictions."""

import pytest

from dovetail.reproduce.rows import Row, Table, rounded
from dovetail.spec.band import Band


def row(ours: Band | float, paper: str, **more: object) -> Row:
    band = ours if isinstance(ours, Band) else Band.exact(ours)
    return Row(subject="s", quantity="q", ours=band, source="[x]", paper=paper, **more)


@pytest.mark.parametrize(
    ("ours", "paper", "printed", "verdict"),
    [
        (4.6549, "4.66", "rounded", "NO"),
        (4.6551, "4.66", "rounded", "exact"),
        (4.6649, "4.66", "rounded", "exact"),
        (4.6651, "4.66", "rounded", "NO"),
        (67.76, "67", "rounded", "NO"),
        (67.76, "67", "cut off", "exact"),
        (66.99, "67", "cut off", "NO"),
        (1219.75, "1200", "rounded", "NO"),
        (1219.75, "1200", "to hundreds", "exact"),
        (1251.0, "1200", "to hundreds", "NO"),
        (87072.0, "87072", "rounded", "exact"),
        (87073.0, "87072", "rounded", "NO"),
    ],
)
def test_ours_has_to_give_the_printed_digits_as_the_paper_rounds(
    ours: float, paper: str, printed: str, verdict: str
) -> None:
    assert row(ours, paper, printed=printed).verdict == verdict


def test_what_the_rounding_of_inputs_leaves_open_may_give_the_digits() -> None:
    parts = [rounded(part, 0.01) for part in (1.13, 2.06, 1.99, 0.48, 13.95, 0.29)]
    total = sum(parts, Band.exact(0.0))
    assert (total.low, total.high) == pytest.approx((19.87, 19.93))
    assert row(total, "19.926").verdict == "exact"
    assert row(total.value, "19.926").verdict == "NO"  # without the rounding 19.90
    assert row(total, "19.931").verdict == "NO"


@pytest.mark.parametrize(
    ("value", "paper", "within", "difference", "verdict"),
    [
        (104.9, "100", "5 %", 0.049, "yes"),
        (105.1, "100", "5 %", 0.051, "MISSED"),
        (94.9, "100", "5 %", -0.051, "MISSED"),
        (40.9, "38.94", "2 points", 1.96, "yes"),
        (41.0, "38.94", "2 points", 2.06, "MISSED"),
        (21.0, "20 to 22", "8 %", 0.0, "yes"),
        (23.7, "20 to 22", "8 %", 23.7 / 22 - 1, "yes"),
        (18.3, "20 to 22", "8 %", 18.3 / 20 - 1, "MISSED"),
    ],
)
def test_a_prediction_has_to_be_near_whatever_its_band(
    value: float, paper: str, within: str, difference: float, verdict: str
) -> None:
    found = row(Band(value, value / 10, value * 10), paper, within=within)
    assert found.difference == pytest.approx(difference)
    assert found.verdict == verdict and found.is_in_band
    assert not row(value, "1", within=within).is_in_band


def test_hindsight_is_told_from_foresight() -> None:
    assert row(100.0, "100", within="5 %", is_hindsight=True).verdict == "yes, in hindsight"
    assert row(150.0, "100", within="5 %", is_hindsight=True).verdict == "MISSED"


def test_nothing_printed_is_nothing_to_judge() -> None:
    beside = row(3.0, "")
    assert beside.verdict == "" and beside.difference is None and beside.is_reproduced


def test_a_row_that_fails_fails_its_table_unless_the_paper_contradicts_itself() -> None:
    def table(*rows: Row) -> Table:
        return Table(name="t", title="", source="", rows=rows)

    assert table(row(2.0, "2.0"), row(9.0, "")).is_reproduced
    assert not table(row(2.0, "2.0"), row(2.1, "2.0")).is_reproduced
    assert not table(row(2.0, "1.0", within="5 %")).is_reproduced
    contradicted = row(2.1, "2.0", is_inconsistent=True)
    assert contradicted.verdict == "paper inconsistent" and table(contradicted).is_reproduced
