"""Tables on narrow terminals."""

import sys

import pytest

from dovetail.printing import print_table


def test_numbers_are_whole_on_any_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    header = ("what this is", *(f">number {place}" for place in range(12)))
    rows = [("a long name of it", *(f"{place}234,567.89 GB/s" for place in range(12)))]
    for columns in ("40", "80", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        print_table("title", header, rows)
        text = capsys.readouterr().out
        assert all(number in text for number in rows[0][1:]) and "…" not in text
