"""A token store, which is a corpus tokenised once, and reading it through memory maps.

A store is a directory of raw little-endian files and an index:

    tokens-00000.bin ..  the stream of all documents, cut every `shard_tokens` tokens; uint16, or uint32
                         where the vocabulary needs it
    documents.bin        uint64, the position in the stream at which each document ends
    index.json           sizes, sha256 of every file, and the fingerprint of what the tokens were made from

`shard_writer` gives a store its name when every byte is on the disk, so a store that has its name is complete.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from dovetail.config import Record

FORMAT = 1


class StoredFile(Record):
    name: str
    num_bytes: int
    sha256: str


class Index(Record):
    """The content of index.json."""

    format: int = FORMAT
    fingerprint: str  # of tokenizer, source and settings: equal ones give equal tokens
    token_dtype: str
    shard_tokens: int
    num_tokens: int
    num_documents: int
    num_bytes: int  # UTF-8 bytes of the documents as read, which bits per byte are divided by
    left_out: dict[str, int]  # number of documents left out, by reason
    shards: tuple[StoredFile, ...]
    documents: StoredFile

    @property
    def digest(self) -> str:
        """Return the sha256 of the contents, by which a checkpoint recognises its data."""
        contents = "".join(file.sha256 for file in (*self.shards, self.documents))
        return hashlib.sha256(contents.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class TokenStore:
    """An open store. Its arrays are read-only memory maps of the files."""

    directory: Path
    index: Index
    shards: tuple[NDArray[np.unsignedinteger], ...]
    document_ends: NDArray[np.uint64]  # [num_documents], ascending; the last is num_tokens

    @property
    def num_tokens(self) -> int:
        return self.index.num_tokens

    @property
    def num_bytes(self) -> int:
        return self.index.num_bytes


def read_tokens(store: TokenStore, start: int, stop: int) -> NDArray[np.int64]:
    """Return the tokens start .. stop-1 of the stream [stop - start], across shard borders."""
    assert 0 <= start <= stop <= store.num_tokens, (start, stop, store.num_tokens)
    size = store.index.shard_tokens
    parts = [
        store.shards[shard][max(start - shard * size, 0) : stop - shard * size]
        for shard in range(start // size, -(-stop // size))
    ]
    return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64)


def open_store(directory: Path, verify: bool = True) -> TokenStore:
    """Open a complete store.

    With `verify` the sha256 of every file is compared, which takes seconds per gigabyte; sizes are always compared.
    Raises ValueError, with the file and the remedy, for a store that is damaged or not complete.
    """
    remedy = f"delete {directory} and run again: it is made again from the text"
    index_path = directory / "index.json"
    try:
        index = Index.model_validate_json(index_path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ValueError(f"{index_path}: no readable index of a token store; {remedy}") from error
    if index.format != FORMAT:
        raise ValueError(f"{index_path}: format {index.format}, this version reads {FORMAT}; {remedy}")
    for file in (*index.shards, index.documents):
        check_file(directory / file.name, file, verify, remedy)
    return TokenStore(
        directory,
        index,
        tuple(map_file(directory / file.name, np.dtype(index.token_dtype)) for file in index.shards),
        map_file(directory / index.documents.name, np.dtype("<u8")),
    )


def check_file(path: Path, expected: StoredFile, verify: bool, remedy: str) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: missing; {remedy}")
    if (size := path.stat().st_size) != expected.num_bytes:
        raise ValueError(f"{path}: {size} bytes, should be {expected.num_bytes} (truncated?); {remedy}")
    if verify:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected.sha256:
            raise ValueError(f"{path}: damaged (sha256 {found[:12]}, not {expected.sha256[:12]}); {remedy}")


def map_file(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.memmap(path, dtype=dtype, mode="r")
