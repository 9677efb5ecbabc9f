import os
import sys
from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError

from dovetail.text.documents import DataConfig, Document, cut_in_two, is_held_out, read_documents, source_files


def read(config: DataConfig, split: str = "all") -> tuple[list[Document], dict[str, str]]:
    skipped: dict[str, str] = {}
    return list(read_documents(config, split, skipped.__setitem__)), skipped


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, data in {
        "b.txt": b"second\r\nline",
        "a/x.py": b"first \xc3\xa9",
        "a/y.md": b"# third",
        ".git/config": b"hidden",
        "a/__pycache__/x.py": b"cached",
        "empty.txt": b"",
        "latin.txt": b"caf\xe9",
        "picture.txt": b"\x89PNG\0\0",
        "windows.txt": b"\xef\xbb\xbfmarked",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe.txt")
    return tmp_path


def test_directory_in_sorted_order_with_everything_left_out_counted(tree: Path) -> None:
    documents, skipped = read(DataConfig(kind="files", path=tree))
    assert documents == [
        Document("a/x.py", "first \u00e9", 8),
        Document("a/y.md", "# third", 7),
        Document("b.txt", "second\r\nline", 12),  # line ends are not touched
        Document("windows.txt", "marked", 6),  # a byte order mark is no text
    ]
    assert skipped == {
        "dangling.txt": "not a regular file",
        "empty.txt": "empty",
        "latin.txt": "not UTF-8",
        "picture.txt": "binary",
        "pipe.txt": "not a regular file",  # reading it would never end
    }


def test_unreadable_file_is_skipped(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    documents, skipped = read(DataConfig(kind="files", path=tree, patterns=("a/*",)))
    assert not documents and skipped == dict.fromkeys(["a/x.py", "a/y.md"], "unreadable: Permission denied")


def test_patterns(tree: Path) -> None:
    documents, _ = read(DataConfig(kind="files", path=tree, patterns=("*.py", "*.md")))
    assert [document.name for document in documents] == ["a/x.py", "a/y.md"]
    with pytest.raises(ValueError, match=r"no file matches \*\.rs; set data\.patterns"):
        read(DataConfig(kind="files", path=tree, patterns=("*.rs",)))


def test_one_file(tree: Path) -> None:
    documents, _ = read(DataConfig(kind="files", path=tree / "b.txt"))
    assert documents == [Document("b.txt", "second\r\nline", 12)]
    with pytest.raises(ValueError, match=r"missing: no such file or directory; set data\.path"):
        read(DataConfig(kind="files", path=tree / "missing"))


def test_path_and_kind_go_together() -> None:
    with pytest.raises(ValidationError, match="set path to a file or a directory"):
        DataConfig(kind="files")
    with pytest.raises(ValidationError, match="leave path out"):
        DataConfig(path=Path("x"))
    with pytest.raises(ValidationError, match="less than 1"):
        DataConfig(held_out_share=1.0)


def test_held_out_depends_on_the_name_alone(tree: Path) -> None:
    names = [f"package/module_{i}.py" for i in range(4000)]
    held_out = {name for name in names if is_held_out(name, 0.05)}
    assert 140 < len(held_out) < 260  # 200 +- 4.3 standard deviations
    assert held_out < {name for name in names if is_held_out(name, 0.1)}  # a larger share keeps the smaller
    assert not any(is_held_out(name, 0.0) for name in names)
    # Pinned: a changed hash would move files that runs have trained on into their held-out part.
    assert [name for name in names[:60] if name in held_out] == PINNED_HELD_OUT


PINNED_HELD_OUT = ["package/module_19.py", "package/module_46.py", "package/module_47.py"]


def test_splits_part_the_documents(tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    everything, train, held_out = (
        read(DataConfig(kind="files", path=tmp_path, held_out_share=0.3, seed=seed), split)[0]
        for split, seed in (("all", 0), ("train", 1), ("held_out", 2))
    )
    assert train and held_out
    assert sorted([*train, *held_out], key=lambda document: document.name) == everything


def test_one_document_is_cut_at_a_line(tmp_path: Path) -> None:
    """Whatever the hash of its name says, and whatever lies beside it that is no text."""
    text = "".join(f"line {number}\n" for number in range(100))
    (tmp_path / "book.txt").write_text(text)
    (tmp_path / "cover.png").write_bytes(b"\0")
    config = DataConfig(kind="files", path=tmp_path, held_out_share=0.1)
    (train,), skipped = read(config, "train")
    (held_out,), _ = read(config, "held_out")
    assert train.text + held_out.text == text and train.text.endswith("\n")
    assert held_out.text.splitlines() == [f"line {number}" for number in range(90, 100)]
    assert skipped == {"cover.png": "binary"}
    (whole,), _ = read(config.model_copy(update={"held_out_share": 0.0}), "train")
    assert whole.text == text


@pytest.mark.parametrize(
    ("text", "share", "held_out"),
    [
        ("a\nb\nc\n", 1e-6, "c\n"),  # the last line at least
        ("a\nb\nc\n", 0.999, "b\nc\n"),  # and the first one is trained on
        ("long first line\nb", 0.5, "b"),
        ("one line\n", 0.5, ""),
        ("one line", 0.5, ""),
    ],
)
def test_where_one_document_is_cut(text: str, share: float, held_out: str) -> None:
    assert cut_in_two(text, share) == (text.removesuffix(held_out) if held_out else text, held_out)


def test_stdlib_is_source_without_tests_tables_and_packages() -> None:
    names = [file.name for file in source_files(DataConfig())]
    assert names == sorted(set(names))
    assert {"argparse.py", "json/decoder.py", "unittest/case.py"} <= set(names)
    unwanted = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "encodings",
        "pydoc_data",
        "__pycache__",
    }
    assert not [name for name in names if unwanted & set(name.split("/"))]
    assert "html/entities.py" not in names and not [name for name in names if name.startswith("_sysconfigdata")]


def test_stdlib_splits_by_file() -> None:
    skipped: Counter[str] = Counter()
    sizes = {
        split: sum(d.num_bytes for d in read_documents(DataConfig(), split, lambda name, why: skipped.update([why])))
        for split in ("train", "held_out")
    }
    assert sizes["train"] > 5e6
    assert 0.01 < sizes["held_out"] / sum(sizes.values()) < 0.15
    assert set(skipped) <= {"empty"}


def test_lone_surrogate_in_json_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "\\ud800"}\n{"text": "\\ud83c\\udf89"}\n')
    documents, skipped = read(DataConfig(kind="jsonl", path=tmp_path))
    assert [d.text for d in documents] == ["\U0001f389"]
    assert skipped == {"rows.jsonl:1": "lone surrogate"}


def write_parquet(path: Path, columns: dict[str, list[object]], rows_per_group: int = 2) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=rows_per_group)


def test_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "b.parquet", {"body": ["three", None, "four \u00e9"], "n": [1, 2, 3]})
    write_parquet(tmp_path / "a.parquet", {"body": ["one", "two"], "n": [1, 2]})
    documents, skipped = read(DataConfig(kind="parquet", path=tmp_path, text_key="body"))
    assert [(d.name, d.text) for d in documents] == [
        ("a.parquet:0", "one"),
        ("a.parquet:1", "two"),
        ("b.parquet:0", "three"),
        ("b.parquet:2", "four \u00e9"),
    ]
    assert skipped == {"b.parquet:1": "no text"}


def test_parquet_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_parquet(path, {"body": ["one"], "n": [1]})
    with pytest.raises(ValueError, match=r"rows\.parquet: no column 'text'; it has body, n; set data\.text_key"):
        read(DataConfig(kind="parquet", path=path))
    with pytest.raises(ValueError, match=r"rows\.parquet, row 0: 'n' holds int, not text"):
        read(DataConfig(kind="parquet", path=path, text_key="n"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"rows\.parquet: not a readable Parquet file"):
        read(DataConfig(kind="parquet", path=path, text_key="body"))


@pytest.mark.parametrize(("kind", "package"), [("parquet", "pyarrow"), ("datasets", "datasets")])
def test_missing_package_gives_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, package: str
) -> None:
    (tmp_path / "rows.parquet").touch()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"needs the {package} package: pip install {package}"):
        read(DataConfig(kind=kind, path=tmp_path / "rows.parquet"))


TEXTS = ["one", "two \u00e9", None, "three"]


def test_saved_datasets(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": TEXTS, "n": [0, 1, 2, 3]})
    rows.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": rows, "validation": rows.select([0])}).save_to_disk(tmp_path / "splits")
    datasets.DatasetDict({"validation": rows}).save_to_disk(tmp_path / "no_train")
    for name in ("plain", "splits"):
        documents, skipped = read(DataConfig(kind="datasets", path=tmp_path / name))
        assert [(d.name, d.text) for d in documents] == [
            (f"{name}:0", "one"),
            (f"{name}:1", "two \u00e9"),
            (f"{name}:3", "three"),
        ]
        assert skipped == {f"{name}:2": "no text"}
    with pytest.raises(ValueError, match="splits validation, none of them 'train'"):
        read(DataConfig(kind="datasets", path=tmp_path / "no_train"))
    with pytest.raises(ValueError, match="no column 'body'; it has text, n"):
        read(DataConfig(kind="datasets", path=tmp_path / "plain", text_key="body"))


def test_data_files_are_no_saved_dataset(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").touch()
    for path in (tmp_path, tmp_path / "rows.parquet"):
        with pytest.raises(ValueError, match=r"not a directory that `datasets` wrote .* 'jsonl' or 'parquet'"):
            read(DataConfig(kind="datasets", path=path))
