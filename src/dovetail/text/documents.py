"""Documents from where text is kept: directories, JSONL, Parquet, saved `datasets`, Python's own library.

Order is deterministic (sorted paths, rows in file order). Which documents are held out depends on their names
alone, so it stays the same whatever the seed, the machine or the neighbours.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from dovetail.config import Record

Skip = Callable[[str, str], None]  # (document, why it was left out)
Split = Literal["train", "held_out", "all"]

# What of the standard library is no text to learn from.
# - Installed packages and tests: a distribution may ship them or not; the corpus should be alike everywhere.
# - Tables: character maps, help topics and entity lists are data in Python syntax. They would be a fifth of
#   the bytes, and a few huge files would decide the held-out figure by chance.
# - _sysconfigdata: the build settings of one machine.
STDLIB_LEFT_OUT = (
    *("site-packages/*", "dist-packages/*", "config-*/*", "_sysconfigdata*"),
    *("test/*", "*/test/*", "*/tests/*", "idlelib/idle_test/*"),
    *("encodings/*", "pydoc_data/*", "html/entities.py"),
)

PATTERNS: dict[str, tuple[str, ...]] = {
    "stdlib": ("*.py",),
    "files": ("*",),
    "jsonl": ("*.jsonl", "*.ndjson"),
    "parquet": ("*.parquet",),
    "datasets": ("*",),
}


class DataConfig(Record):
    """Where text comes from and what is done to it before it is tokenised."""

    kind: Literal["stdlib", "files", "jsonl", "parquet", "datasets"] = "stdlib"
    path: Path | None = None  # a file or a directory; none for stdlib
    patterns: tuple[str, ...] = ()  # shell patterns on the path below `path`; * crosses /. Empty: by kind
    text_key: str = "text"  # field of a JSONL line, column of Parquet and of datasets
    held_out_share: float = Field(default=0.05, ge=0, lt=1)
    fim_rate: float = Field(default=0.1, ge=0, le=1)  # share of training documents [V3 §4.1]
    newline_split_rate: float = Field(default=0.0, ge=0, le=1)  # V3 does it at an unpublished rate [V3 §4.1]
    seed: int = Field(default=0, ge=0)  # of fill-in-the-middle and newline splitting

    @model_validator(mode="after")
    def check(self) -> DataConfig:
        if (self.path is None) != (self.kind == "stdlib"):
            remedy = "leave path out" if self.kind == "stdlib" else "set path to a file or a directory"
            raise ValueError(f"data.kind {self.kind!r} with data.path {str(self.path)!r}: {remedy}")
        return self


@dataclass(frozen=True, slots=True)
class Document:
    name: str  # path below the source, with the row for formats of many documents
    text: str
    num_bytes: int  # of the UTF-8 text


@dataclass(frozen=True, slots=True)
class SourceFile:
    name: str  # relative, with forward slashes
    path: Path


def read_documents(config: DataConfig, split: Split = "all", on_skip: Skip | None = None) -> Iterator[Document]:
    """The documents of one split in their fixed order.

    Files of kind "files" and "stdlib" that cannot be read as UTF-8 text are left out and reported to
    `on_skip`; a broken line or a missing column of a data set is a ValueError that names file and line.
    """
    skip = on_skip or (lambda name, reason: None)

    def wanted(name: str) -> bool:
        return split == "all" or is_held_out(name, config.held_out_share) == (split == "held_out")

    for name, text in named_texts(config, wanted, skip):
        if not text:
            skip(name, "empty")
            continue
        try:
            yield Document(name, text, len(text.encode()))
        except UnicodeEncodeError:  # "\ud800" is legal JSON
            skip(name, "lone surrogate")


def is_held_out(name: str, share: float) -> bool:
    """Whether the document of this name is kept from training: a hash of the name falls below `share`."""
    digest = hashlib.sha256(f"dovetail held out:{name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def named_texts(config: DataConfig, wanted: Callable[[str], bool], skip: Skip) -> Iterator[tuple[str, str]]:
    """(name, text) of every wanted document; files of the other split are not even opened."""
    if config.kind == "datasets":
        yield from (row for row in read_dataset(config, skip) if wanted(row[0]))
        return
    for file in source_files(config):
        if config.kind == "jsonl":
            yield from (row for row in read_jsonl(file, config.text_key) if wanted(row[0]))
        elif config.kind == "parquet":
            yield from (row for row in read_parquet(file, config.text_key, skip) if wanted(row[0]))
        elif wanted(file.name) and (text := read_text(file, skip)) is not None:
            yield file.name, text


def source_files(config: DataConfig) -> list[SourceFile]:
    """The files that the documents come from, sorted by name. Raises ValueError if there are none."""
    root = config.path.expanduser() if config.path else Path(sysconfig.get_path("stdlib"))
    patterns = config.patterns or PATTERNS[config.kind]
    left_out = STDLIB_LEFT_OUT if config.kind == "stdlib" else ()
    if root.is_file():
        return [SourceFile(root.name, root)]
    if not root.is_dir():
        raise ValueError(f"{root}: no such file or directory; set data.path to where the text is")
    files = list(walk(root, patterns, left_out))
    if not files:
        raise ValueError(f"{root}: no file matches {', '.join(patterns)}; set data.patterns or data.path")
    return sorted(files, key=lambda file: file.name)


def walk(root: Path, patterns: tuple[str, ...], left_out: tuple[str, ...]) -> Iterator[SourceFile]:
    """Files below `root` by pattern; hidden, linked and __pycache__ directories are not entered."""

    def matches(name: str, among: tuple[str, ...]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in among)

    for directory, subdirectories, names in os.walk(root):
        below = Path(directory).relative_to(root)
        subdirectories[:] = [
            name
            for name in subdirectories
            if not matches(name, (".*", "__pycache__")) and not matches(f"{(below / name).as_posix()}/", left_out)
        ]
        for file_name in names:
            name = (below / file_name).as_posix()
            if matches(name, patterns) and not matches(name, left_out):
                yield SourceFile(name, Path(directory, file_name))


def read_text(file: SourceFile, skip: Skip) -> str | None:
    """The file's exact characters (line ends untouched), or None after telling `skip` why not."""
    try:
        if not file.path.is_file():  # a pipe would block, a dangling link has nothing
            skip(file.name, "not a regular file")
            return None
        data = file.path.read_bytes()
    except OSError as error:
        skip(file.name, f"unreadable: {error.strerror}")
        return None
    if b"\0" in data:
        skip(file.name, "binary")
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        skip(file.name, "not UTF-8")
        return None


def read_jsonl(file: SourceFile, text_key: str) -> Iterator[tuple[str, str]]:
    """One document per line; blank lines are nothing."""
    with open(file.path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.strip()
            if not line:
                continue
            where = f"{file.path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
                raise ValueError(f"{where}: not JSON ({error}); repair or delete the line") from error
            fields = row if isinstance(row, dict) else {}
            if not isinstance(fields.get(text_key), str):
                keys = ", ".join(sorted(key for key, value in fields.items() if isinstance(value, str))) or "none"
                raise ValueError(f"{where}: no text under {text_key!r} (keys with text: {keys}); set data.text_key")
            yield f"{file.name}:{number}", fields[text_key]


def read_parquet(file: SourceFile, text_key: str, skip: Skip) -> Iterator[tuple[str, str]]:
    """One document per row; rows without text are reported to `skip`."""
    pyarrow = optional_import("pyarrow", "pyarrow", f"reading {file.path}")
    parquet = optional_import("pyarrow.parquet", "pyarrow", f"reading {file.path}")
    try:
        with parquet.ParquetFile(file.path) as table:
            check_column(str(file.path), text_key, table.schema_arrow.names)
            batches = table.iter_batches(columns=[text_key])
            rows = (row for batch in batches for row in batch.column(0).to_pylist())
            yield from check_rows(rows, file.name, str(file.path), text_key, skip)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{file.path}: not a readable Parquet file ({error}); write it again") from error


def read_dataset(config: DataConfig, skip: Skip) -> Iterator[tuple[str, str]]:
    """A data set that Hugging Face `datasets` wrote with save_to_disk; of several splits, "train".

    Data files are read by kinds "jsonl" and "parquet": `load_dataset` asks a server even for local ones.
    """
    assert config.path is not None
    path = config.path.expanduser()
    datasets = optional_import("datasets", "datasets", f"reading {path} as a data set")
    if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        raise ValueError(
            f"{path}: not a directory that `datasets` wrote with save_to_disk; for data files set "
            "data.kind to 'jsonl' or 'parquet'"
        )
    rows = datasets.load_from_disk(str(path))
    if isinstance(rows, datasets.DatasetDict):
        if "train" not in rows:
            names = ", ".join(rows)
            raise ValueError(f"{path}: splits {names}, none of them 'train'; set data.path to {path}/<split>")
        rows = rows["train"]
    check_column(str(path), config.text_key, rows.column_names)
    texts = (row[config.text_key] for row in rows.select_columns([config.text_key]))
    yield from check_rows(texts, path.name, str(path), config.text_key, skip)


def check_column(where: str, text_key: str, columns: list[str]) -> None:
    if text_key not in columns:
        raise ValueError(f"{where}: no column {text_key!r}; it has {', '.join(columns)}; set data.text_key")


def check_rows(texts: Iterator[Any], name: str, where: str, text_key: str, skip: Skip) -> Iterator[tuple[str, str]]:
    for number, text in enumerate(texts):
        if isinstance(text, str):
            yield f"{name}:{number}", text
        elif text is None:
            skip(f"{name}:{number}", "no text")
        else:
            kind = type(text).__name__
            raise ValueError(f"{where}, row {number}: {text_key!r} holds {kind}, not text; set data.text_key")


def optional_import(module: str, package: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{purpose} needs the {package} package: pip install {package}") from error
