"""Reads documents from JSON: one object per line, or one array of objects, plain or gzipped."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

GZIP = b"\x1f\x8b"


def read_jsonl(path: Path, name: str, text_key: str, skip: Callable[[str, str], None]) -> Iterator[tuple[str, str]]:
    """Yield (name with the number of the line or item, text) of each object; one whose text is null goes to `skip`.

    Raises ValueError, with file and line or item, for what is not JSON and for an object without text.
    """
    for number, where, row in rows(path):
        fields = row if isinstance(row, dict) else {}
        text = fields.get(text_key)
        if isinstance(text, str):
            yield f"{name}:{number}", text
        elif text_key in fields and text is None:
            skip(f"{name}:{number}", "no text")
        else:
            keys = ", ".join(sorted(key for key, value in fields.items() if isinstance(value, str))) or "none"
            raise ValueError(f"{where}: no text under {text_key!r} (keys with text: {keys}); set data.text_key")


def rows(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Yield the number, the place in words and the value of each line that is not blank, or of each item."""
    with open(path, "rb") as plain:
        is_zipped = plain.peek(2).startswith(GZIP)
        with gzip.GzipFile(fileobj=plain) if is_zipped else plain as file:
            try:
                is_array = file.peek(100).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
                yield from array_items(path, file.read()) if is_array else lines(path, file)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise ValueError(f"{path}: not a readable gzip file ({error}); copy it again") from error


def array_items(path: Path, data: bytes) -> Iterator[tuple[int, str, Any]]:
    try:
        items = json.loads(data.removeprefix(codecs.BOM_UTF8))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON array ({error}); repair it, or give one object per line") from error
    yield from ((number, f"{path}, item {number}", item) for number, item in enumerate(items, start=1))


def lines(path: Path, file: Iterator[bytes]) -> Iterator[tuple[int, str, Any]]:
    for number, line in enumerate(file, start=1):
        text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
        if not text:
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(text)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise ValueError(f"{where}: not JSON ({error}); repair or delete the line") from error
        yield number, where, row
