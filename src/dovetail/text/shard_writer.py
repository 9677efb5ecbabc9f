"""Writes a token store, which has its final name only once every byte is on the disk."""

from __future__ import annotations

import array
import contextlib
import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.atomic import whole_directory, write_bytes
from dovetail.text.shards import Index, StoredFile, TokenStore, open_store

SHARD_TOKENS = 1 << 28  # half a gigabyte in uint16


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    ids: list[int]
    num_bytes: int


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def write_store(
    documents: Iterable[EncodedDocument],
    directory: Path,
    vocab_size: int,
    fingerprint: str,
    left_out: Mapping[str, int],
    shard_tokens: int = SHARD_TOKENS,
) -> TokenStore:
    """Write the store `directory` from a stream of documents and open it.

    `left_out` is read after the last document. Raises ValueError if there are no documents or another process is
    writing the store, and OSError if the disk is full; nothing is left behind then.
    """
    with whole_directory(directory) as partial:
        tokens = TokenFiles(partial, token_dtype(vocab_size), shard_tokens)
        try:
            index = write_files(documents, tokens, fingerprint, left_out)
        finally:
            tokens.abandon()
        write_bytes(partial / "index.json", index.model_dump_json(indent=1).encode())
    return open_store(directory, verify=False)


def write_files(
    documents: Iterable[EncodedDocument], tokens: TokenFiles, fingerprint: str, left_out: Mapping[str, int]
) -> Index:
    ends, num_bytes = array.array("Q"), 0
    for document in documents:
        tokens.write(document.ids)
        ends.append(tokens.num_tokens)
        num_bytes += document.num_bytes
    if not ends:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items())) or "none"
        raise ValueError(
            f"no documents to tokenise (left out: {reasons}); check data.path, data.patterns and data.held_out_share"
        )
    shards = tokens.close()
    boundaries = np.asarray(ends, "<u8").tobytes()
    write_bytes(tokens.directory / "documents.bin", boundaries)
    return Index(
        fingerprint=fingerprint,
        token_dtype=tokens.dtype.str,
        shard_tokens=tokens.shard_tokens,
        num_tokens=tokens.num_tokens,
        num_documents=len(ends),
        num_bytes=num_bytes,
        left_out=dict(left_out),
        shards=shards,
        documents=StoredFile(
            name="documents.bin", num_bytes=len(boundaries), sha256=hashlib.sha256(boundaries).hexdigest()
        ),
    )


class HashedFile:
    """A file being written, with the sha256 of its content.

    It is written plainly, because a full disk is an error then, while a memory map would crash.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = open(path, "wb")  # noqa: SIM115 (closed by close)
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: NDArray[Any]) -> None:
        block = data.tobytes()
        self.file.write(block)
        self.sha256.update(block)
        self.num_bytes += len(block)

    def close(self) -> StoredFile:
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        return StoredFile(name=self.path.name, num_bytes=self.num_bytes, sha256=self.sha256.hexdigest())


class TokenFiles:
    """The token stream being written, with a new file after every `shard_tokens` tokens."""

    def __init__(self, directory: Path, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self.directory, self.dtype, self.shard_tokens = directory, dtype, shard_tokens
        self.num_tokens = 0
        self.finished: list[StoredFile] = []
        self.current: HashedFile | None = None

    def write(self, ids: list[int]) -> None:
        data = np.asarray(ids, self.dtype)
        while len(data):
            if self.current is None:
                self.current = HashedFile(self.directory / f"tokens-{len(self.finished):05d}.bin")
            room = self.shard_tokens - self.num_tokens % self.shard_tokens
            self.current.write(data[:room])
            self.num_tokens += len(data[:room])
            data = data[room:]
            if self.num_tokens % self.shard_tokens == 0:
                self.close()

    def close(self) -> tuple[StoredFile, ...]:
        if self.current is not None:
            current, self.current = self.current, None
            self.finished.append(current.close())
        return tuple(self.finished)

    def abandon(self) -> None:
        """Close the open file if that is possible; on a full disk even closing fails."""
        if self.current is not None:
            with contextlib.suppress(OSError):
                self.current.file.close()
