"""Makes a token store from a data source, or opens the one that is there.

Documents are read, some are cut for fill-in-the-middle, and all are tokenised and written. Every document becomes
`<bos> text <eos>`. DeepSeek's published tokenizer puts the bos before every prompt, so a model trained here knows it
as the start of a text; the eos ends the document. With a tokenizer that has no bos a document is `text <eos>`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dovetail.text.documents import DataConfig, Document, read_documents, source_files, walk
from dovetail.text.fim import fill_in_middle
from dovetail.text.newline_split import combined_tokens, split_combined
from dovetail.text.shard_writer import EncodedDocument, write_store
from dovetail.text.shards import FORMAT, TokenStore, open_store
from dovetail.text.tokenizer import Tokenizer

BATCH_BYTES = 1 << 22  # text given to the tokenizer at once: enough to occupy every core, and little memory


@dataclass(frozen=True, slots=True)
class Tally:
    """How far tokenising has come, in totals."""

    num_documents: int
    num_bytes: int
    num_tokens: int


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
    fingerprint = store_fingerprint(config, tokenizer, split)
    store_directory = directory / f"{split}-{fingerprint[:16]}"
    if store_directory.exists():
        store = open_store(store_directory, verify)
        if store.index.fingerprint != fingerprint:
            raise ValueError(f"{store_directory}: holds other text than its name says (renamed?); delete it")
        return store
    if split == "held_out":
        config = config.model_copy(update={"fim_rate": 0.0, "newline_split_rate": 0.0})
    left_out: Counter[str] = Counter()
    documents = read_documents(config, split, lambda name, reason: left_out.update([reason]))
    encoded = encode_documents(documents, tokenizer, config)
    if on_progress is not None:
        encoded = report(encoded, on_progress)
    return write_store(encoded, store_directory, tokenizer.vocab_size, fingerprint, left_out)


def store_fingerprint(config: DataConfig, tokenizer: Tokenizer, split: str) -> str:
    """Return the sha256 of all that the tokens depend on; a source file counts by name, size and time of change."""
    parts = {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "split": split,
        "data": config.model_dump(mode="json", exclude={"path"}),
        "files": fingerprint_files(config),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fingerprint_files(config: DataConfig) -> list[tuple[str, int, int]]:
    files = source_files(config)
    if config.kind == "datasets" and config.path is not None and config.path.expanduser().is_dir():
        files = sorted(walk(config.path.expanduser(), ("*",), ()), key=lambda file: file.name)
    rows = []
    for file in files:
        try:
            status = file.path.stat()
            rows.append((file.name, status.st_size, status.st_mtime_ns))
        except OSError:  # a dangling link, which reading leaves out
            rows.append((file.name, -1, -1))
    return rows


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
