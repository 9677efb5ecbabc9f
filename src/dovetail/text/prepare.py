"""Makes a token store from a data source, or opens the one that is there.

Documents are read, some are cut for fill-in-the-middle, and all are tokenised and written. Every document becomes
`<bos> text <eos>`. DeepSeek's published tokenizer puts the bos before every prompt, so a model trained here knows it
as the start of a text; the eos ends the document. With a tokenizer that has no bos a document is `text <eos>`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dovetail.atomic import write_bytes
from dovetail.text.documents import DataConfig, Document, read_documents, source_files, walk
from dovetail.text.fim import fill_in_middle
from dovetail.text.newline_split import combined_tokens, split_combined
from dovetail.text.shard_writer import EncodedDocument, write_store
from dovetail.text.shards import FORMAT, TokenStore, open_store
from dovetail.text.tokenizer import Tokenizer

SOURCES = "sources.json"  # in a store: the files that it was made from
BATCH_BYTES = 1 << 22  # text given to the tokenizer at once: enough to occupy every core, and little memory


@dataclass(frozen=True, slots=True)
class Tally:
    """How far tokenising has come, in totals."""

    num_documents: int
    num_bytes: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Source:
    """A file of the text. A time of change that is another one is no change of the text."""

    name: str  # below data.path
    num_bytes: int
    changed_ns: int
    sha256: str  # "" for what is no readable file


def prepare_store(
    config: DataConfig,
    tokenizer: Tokenizer,
    directory: Path,
    split: Literal["train", "held_out"],
    on_progress: Callable[[Tally], None] | None = None,
    verify: bool = True,
) -> TokenStore:
    """Open the token store of one split below `directory`, or make it if it is not there.

    The store's name contains the fingerprint of tokenizer, source files and settings, so that a change of any of
    them leads to a new store. Held-out text is measured as it is, and never cut or split. `verify` is that of
    `open_store`. Raises ValueError for a store whose content does not match its name.
    """
    sources = read_sources(config, directory)
    fingerprint = store_fingerprint(config, tokenizer, split, sources)
    store_directory = directory / f"{split}-{fingerprint[:16]}"
    if store_directory.exists():
        store = open_store(store_directory, verify)
        if store.index.fingerprint != fingerprint:
            raise ValueError(f"{store_directory}: holds other text than its name says (renamed?); delete it")
    else:
        if split == "held_out":
            config = config.model_copy(update={"fim_rate": 0.0, "newline_split_rate": 0.0})
        left_out: Counter[str] = Counter()
        documents = read_documents(config, split, lambda name, reason: left_out.update([reason]))
        encoded = encode_documents(documents, tokenizer, config)
        if on_progress is not None:
            encoded = report(encoded, on_progress)
        store = write_store(encoded, store_directory, tokenizer.vocab_size, fingerprint, left_out)
    if sources != kept_sources(store_directory):
        rows = [dataclasses.astuple(each) for each in sources]
        write_bytes(store_directory / SOURCES, json.dumps(rows).encode())
    return store


def store_fingerprint(config: DataConfig, tokenizer: Tokenizer, split: str, sources: Sequence[Source]) -> str:
    """Return the sha256 of all that the tokens depend on; a source file counts by name and content."""
    parts = {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "split": split,
        "data": config.model_dump(mode="json", exclude={"path"}),
        "files": [(source.name, source.sha256) for source in sources],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_sources(config: DataConfig, stores: Path) -> list[Source]:
    """Return the files that text is read from, as they are now.

    A file whose size and time of change are those that a store below `stores` knows is not read again.
    """
    known = {
        (source.name, source.num_bytes, source.changed_ns): source.sha256
        for path in stores.glob(f"*/{SOURCES}")
        for source in kept_sources(path.parent)
    }
    files = source_files(config)
    if config.kind == "datasets" and config.path is not None and config.path.expanduser().is_dir():
        files = sorted(walk(config.path.expanduser(), ("*",), ()), key=lambda file: file.name)
    sources = []
    for file in files:
        try:
            status = file.path.stat()
            key = (file.name, status.st_size, status.st_mtime_ns)
            digest = known.get(key) or (sha256_of(file.path) if file.path.is_file() else "")
            sources.append(Source(*key, digest))
        except OSError:  # a dangling link or an unreadable file, which reading leaves out
            sources.append(Source(file.name, -1, -1, ""))
    return sources


def kept_sources(store_directory: Path) -> list[Source]:
    """Return the files that a store was made from; none if it has no list of them."""
    path = store_directory / SOURCES
    return [Source(*row) for row in json.loads(path.read_bytes())] if path.is_file() else []


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, config: DataConfig
) -> Iterator[EncodedDocument]:
    """Yield the token ids of each document in order, special tokens included.

    Raises ValueError if the tokenizer lacks a token that the settings need.
    """
    check_special_tokens(tokenizer, config)
    assert tokenizer.eos_id is not None
    fim_ids = (tokenizer.fim_begin, tokenizer.fim_hole, tokenizer.fim_end)
    combined = combined_tokens(tokenizer) if config.newline_split_rate else {}
    numbered = enumerate(documents)
    for batch in by_size(numbered):
        pieces: list[tuple[str, ...]] = [
            fill_in_middle(document.text, config.seed, index, config.fim_rate) or (document.text,)
            for index, document in batch
        ]
        encoded = iter(tokenizer.encode_batch([piece for parts in pieces for piece in parts]))
        for (index, document), parts in zip(batch, pieces, strict=True):
            ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
            for before, part in zip(fim_ids, itertools.islice(encoded, len(parts)), strict=False):
                ids += part if before is None or len(parts) == 1 else [before, *part]
            ids.append(tokenizer.eos_id)
            ids = split_combined(ids, combined, config.seed, index, config.newline_split_rate)
            yield EncodedDocument(ids, document.num_bytes)


def check_special_tokens(tokenizer: Tokenizer, config: DataConfig) -> None:
    """Raise ValueError if the tokenizer lacks a token that the settings need."""
    if tokenizer.eos_id is None:
        raise ValueError("the tokenizer has no end-of-text token; name eos_token in tokenizer_config.json")
    if config.fim_rate and None in (tokenizer.fim_begin, tokenizer.fim_hole, tokenizer.fim_end):
        raise ValueError("the tokenizer has no fill-in-the-middle tokens; set data.fim_rate to 0")


def by_size(documents: Iterable[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    batch: list[tuple[int, Document]] = []
    num_bytes = 0
    for numbered in documents:
        batch.append(numbered)
        num_bytes += numbered[1].num_bytes
        if num_bytes >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def report(documents: Iterable[EncodedDocument], on_progress: Callable[[Tally], None]) -> Iterator[EncodedDocument]:
    num_bytes = num_tokens = 0
    for count, document in enumerate(documents, start=1):
        num_bytes += document.num_bytes
        num_tokens += len(document.ids)
        yield document
        on_progress(Tally(count, num_bytes, num_tokens))
