"""Reads documents from directories, JSON, Parquet, saved `datasets` or Python's own library.

The order is fixed: sorted paths, and rows in the order of the file. Whether a document is held out depends on its
name alone, so it stays the same with another seed, on another machine, and among other documents. Only where there is
one document and no other, it is cut in two: its last lines are held out.
"""

from __future__ import annotations

import codecs
import fnmatch
import hashlib
import importlib
import itertools
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from dovetail.config import Record, UserPath
from dovetail.text.jsonl import read_jsonl

Skip = Callable[[str, str], None]  # (document, why it was left out)
Split = Literal["train", "held_out", "all"]

# Files of the standard library that are left out of the corpus:
# - installed packages and tests, which not every distribution ships; the corpus should be the same everywhere;
# - character maps, help topics and entity lists, which are data in Python syntax: they would be a fifth of the
#   bytes, and a few huge files would decide the held-out figure by chance;
# - _sysconfigdata, the build settings of one machine.
STDLIB_LEFT_OUT = (
    *("site-packages/*", "dist-packages/*", "config-*/*", "_sysconfigdata*"),
    *("test/*", "*/test/*", "*/tests/*", "idlelib/idle_test/*"),
    *("encodings/*", "pydoc_data/*", "html/entities.py"),
)

PATTERNS: dict[str, tuple[str, ...]] = {
    "stdlib": ("*.py",),
    "files": ("*",),
    "jsonl": ("*.jsonl", "*.ndjson", "*.jsonl.gz", "*.ndjson.gz"),
    "parquet": ("*.parquet",),
    "datasets": ("*",),
}


class DataConfig(Record):
    """Where text comes from and what is done to it before it is tokenised."""

    kind: Literal["stdlib", "files", "jsonl", "parquet", "datasets"] = "stdlib"
    path: UserPath | None = None  # a file or a directory; None for stdlib
    patterns: tuple[str, ...] = ()  # shell patterns for paths below `path`; * matches / too. Empty: the kind's own
    text_key: str = "text"  # the field of a JSONL line, or the column of Parquet and of datasets
    held_out_share: float = Field(default=0.05, ge=0, lt=1)
    fim_rate: float = Field(default=0.1, ge=0, le=1)  # share of training documents [V3 §4.1]
    newline_split_rate: float = Field(default=0.0, ge=0, le=1)  # V3's rate is not published [V3 §4.1]
    seed: int = Field(default=0, ge=0)  # for fill-in-the-middle and newline splitting

    @model_validator(mode="after")
    def check(self) -> DataConfig:
        if (self.path is None) != (self.kind == "stdlib"):
            remedy = "leave path out" if self.kind == "stdlib" else "set path to a file or a directory"
            raise ValueError(f"data.kind {self.kind!r} with data.path {str(self.path)!r}: {remedy}")
        return self


@dataclass(frozen=True, slots=True)
class Document:
    name: str  # the path below the source, and the row where a file holds many documents
    text: str
    num_bytes: int  # of the UTF-8 text


@dataclass(frozen=True, slots=True)
class SourceFile:
    name: str  # relative, with forward slashes
    path: Path


def read_documents(config: DataConfig, split: Split = "all", on_skip: Skip | None = None) -> Iterator[Document]:
    """Yield the documents of one split in their fixed order.

    With kind "files" and "stdlib", a file that is not UTF-8 text is left out and reported to `on_skip`. Raises
    ValueError, with file and line, for a broken line or a missing column of a data set.
    """
    skip = on_skip or _tell_nobody
    is_split = split != "all" and config.held_out_share > 0
    document = only_document(config, skip if split == "train" else _tell_nobody) if is_split else None
    if document is not None:
        part = cut_in_two(document.text, config.held_out_share)[split == "held_out"]
        texts = iter([(document.name, part)] if part else [])
    else:
        texts = named_texts(
            config,
            lambda name: not is_split or is_held_out(name, config.held_out_share) == (split == "held_out"),
            skip,
        )
    for name, text in texts:
        if not text:
            skip(name, "empty")
            continue
        try:
            yield Document(name, text, len(text.encode()))
        except UnicodeEncodeError:  # "\ud800" is legal JSON
            skip(name, "lone surrogate")


def _tell_nobody(name: str, reason: str) -> None:
    pass


def only_document(config: DataConfig, skip: Skip = _tell_nobody) -> Document | None:
    """Return the document of a source that has no other; what is left out beside it goes to `skip`."""
    left_out: list[tuple[str, str]] = []
    first = list(itertools.islice(read_documents(config, on_skip=lambda *why: left_out.append(why)), 2))
    if len(first) != 1:
        return None
    for why in left_out:
        skip(*why)
    return first[0]


def cut_in_two(text: str, share: float) -> tuple[str, str]:
    """Return the lines to train on and the last lines, about a `share` of the characters, to hold out.

    One line cannot be cut: nothing is held out then.
    """
    wanted = min(round(len(text) * (1 - share)), len(text) - 1)
    at = text.rfind("\n", 0, wanted) + 1 or text.find("\n") + 1 or len(text)
    return text[:at], text[at:]


def is_held_out(name: str, share: float) -> bool:
    """Return whether the document of this name is held out: whether a hash of the name falls below `share`."""
    digest = hashlib.sha256(f"dovetail held out:{name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def named_texts(config: DataConfig, wanted: Callable[[str], bool], skip: Skip) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every wanted document; files of the other split are not opened."""
    if config.kind == "datasets":
        yield from (row for row in read_dataset(config, skip) if wanted(row[0]))
        return
    for file in source_files(config):
        if config.kind == "jsonl":
            yield from (row for row in read_jsonl(file.path, file.name, config.text_key, skip) if wanted(row[0]))
        elif config.kind == "parquet":
            yield from (row for row in read_parquet(file, config.text_key, skip) if wanted(row[0]))
        elif wanted(file.name) and (text := read_text(file, skip)) is not None:
            yield file.name, text


def source_files(config: DataConfig) -> list[SourceFile]:
    """Return the files that the documents come from, sorted by name. Raises ValueError if there are none."""
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
    """Yield the files below `root` that match; hidden, linked and __pycache__ directories are not entered."""

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
    """Return the file's exact characters (line ends untouched), or None after telling `skip` why not.

    A byte order mark at the start is none of them.
    """
    try:
        if not file.path.is_file():  # a pipe would block, and a dangling link has no content
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
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError:
        skip(file.name, "not UTF-8")
        return None


def read_parquet(file: SourceFile, text_key: str, skip: Skip) -> Iterator[tuple[str, str]]:
    """Yield one document per row; rows without text are reported to `skip`."""
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
    """Read a data set that Hugging Face `datasets` wrote with save_to_disk; of several splits, "train" is read.

    Data files are for the kinds "jsonl" and "parquet", because `load_dataset` contacts a server even for local files.
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
