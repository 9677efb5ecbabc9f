"""JSON documents: lines or an array, plain or gzipped; what is wrong is named by file and line."""

import gzip
from pathlib import Path

import pytest

from dovetail.text.documents import DataConfig, Document, read_documents

ROWS = [b'{"text": "one"}', b'{"text": null}', b'{"text": "three"}']


def read(path: Path) -> tuple[list[Document], dict[str, str]]:
    skipped: dict[str, str] = {}
    config = DataConfig(kind="jsonl", path=path)
    return list(read_documents(config, on_skip=skipped.__setitem__)), skipped


def test_jsonl(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "one", "id": 1}\n\n{"text": "two \xc3\xa9"}\n{"text": ""}\n')
    (tmp_path / "a.jsonl").write_text('{"text": "zero\\u0000\\nline"}')
    (tmp_path / "notes.txt").write_text("not JSON")
    documents, skipped = read(tmp_path)
    assert [(d.name, d.text) for d in documents] == [
        ("a.jsonl:1", "zero\0\nline"),
        ("b.jsonl:1", "one"),
        ("b.jsonl:3", "two \u00e9"),
    ]
    assert skipped == {"b.jsonl:4": "empty"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"rows\.jsonl, line 2: not JSON \(Unterminated string"),
        ('{"content": "x", "id": 3}', r"line 2: no text under 'text' \(keys with text: content\); set data"),
        ('{"text": 3}', r"rows\.jsonl, line 2: no text under 'text' \(keys with text: none\)"),
        ('["x"]', r"rows\.jsonl, line 2: no text under 'text'"),
    ],
)  # fmt: skip
def test_broken_jsonl_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "rows.jsonl")


def test_jsonl_that_is_not_utf8_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1: not JSON"):
        read(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("is_zipped", [False, True])
@pytest.mark.parametrize("is_array", [False, True])
def test_lines_and_arrays_plain_and_zipped_say_the_same(
    tmp_path: Path, mark: bytes, is_zipped: bool, is_array: bool
) -> None:
    data = mark + (b"\n[" + b",\n".join(ROWS) + b"]" if is_array else b"\n".join(ROWS))
    (tmp_path / "rows.json").write_bytes(gzip.compress(data) if is_zipped else data)
    documents, skipped = read(tmp_path / "rows.json")
    assert [(d.name, d.text) for d in documents] == [("rows.json:1", "one"), ("rows.json:3", "three")]
    assert skipped == {"rows.json:2": "no text"}


def test_zipped_lines_are_found_in_a_directory(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(ROWS[0]))
    assert [d.name for d in read(tmp_path)[0]] == ["rows.jsonl.gz:1"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"text": "one"}, {"content": "x"}]', r"rows, item 2: no text under 'text' \(keys with text: content\)"),
        (b'[{"text": "one"}', r"rows: not a JSON array \(Expecting .*; repair it, or give one object per line"),
        (gzip.compress(ROWS[0], mtime=0)[:-12], r"rows: not a readable gzip file \(.*; copy it again"),
    ],
)
def test_what_is_wrong_with_an_array_or_a_zipped_file(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "rows").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "rows")
