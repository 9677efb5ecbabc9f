"""Batches of tokens for training, and windows of held-out text to measure a model on.

Documents are packed without gaps. With T tokens per sample, sample i is tokens i*T .. i*T+T of the store's stream;
its last token is also the first of sample i+1, so each token is a target at most once per epoch. The first token of
the stream and what does not fill a sample at its end are never targets. Pre-training attends across the documents of
a sample [V3 §4.1]; `document_ids` lets attention stop at their borders if a run asks for that.

This is the one file of `text` that needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dovetail.text.order import rank_slice, sample_indices
from dovetail.text.shards import TokenStore, read_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Samples, one per row. The inputs are tokens[:, :-1], the targets tokens[:, 1:]."""

    tokens: Tensor  # [B, T+1] int64
    document_ids: Tensor  # [B, T+1] int32: the number of the token's document, counted from 0 in each row


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Windows of held-out text, and which of their targets are scored in this window."""

    batch: Batch
    scored: Tensor  # [B, T] bool, of the targets tokens[:, 1:]


def num_samples(store: TokenStore, sequence_length: int) -> int:
    """Return the number of samples in one epoch. Raises ValueError if the text is shorter than one sample."""
    count = (store.num_tokens - 1) // sequence_length
    if count < 1:
        raise ValueError(
            f"{store.directory}: {store.num_tokens} tokens make no sample of {sequence_length} + 1; "
            "give more text or a shorter sequence"
        )
    return count


def read_batch(
    store: TokenStore,
    sequence_length: int,
    seed: int,
    consumed: int,
    count: int,
    rank: int = 0,
    world: int = 1,
) -> Batch:
    """Read the block of `rank` out of the training samples number `consumed` .. `consumed + count - 1`.

    `consumed` and `count` are those of all ranks together. The result depends on the arguments alone.
    """
    samples = sample_indices(num_samples(store, sequence_length), seed, consumed, count)
    return read_windows(store, samples[rank_slice(count, rank, world)] * sequence_length, sequence_length + 1)


def evaluation_windows(store: TokenStore, length: int, stride: int, batch_size: int) -> Sequence[Windows]:
    """Return windows of `length` inputs over the whole stream, in batches of up to `batch_size` rows.

    A batch is read when it is asked for. Every token is scored exactly once, except the stream's first, which nothing
    precedes. The first window scores all its targets. Each later window starts `stride` tokens further and scores its
    last `stride` targets, so every scored target is predicted from more than `length - stride` tokens. The last window
    is moved back so that it ends with the stream. As in training, and as a compressor does, a window sees the documents
    before. The nats summed over scored targets and `store.num_bytes` give `yardstick.bits_per_byte`; predicting eos and
    bos costs nats and adds no bytes.
    """
    if not 1 <= stride <= length:
        raise ValueError(f"stride {stride} must be between 1 and the window length {length}")
    num_targets = store.num_tokens - 1
    length = min(length, num_targets)
    starts = np.array([*range(0, num_targets - length, stride), num_targets - length], dtype=np.int64)
    done = np.concatenate([[0], starts[:-1] + length])  # targets scored by the windows before
    scored = starts[:, None] + np.arange(length) >= done[:, None]
    return _EvaluationWindows(store, starts, scored, batch_size)


class _EvaluationWindows(Sequence[Windows]):
    """Batches of windows that begin at `starts`, each read when it is asked for."""

    def __init__(
        self, store: TokenStore, starts: NDArray[np.int64], scored: NDArray[np.bool_], batch_size: int
    ) -> None:
        self._store, self._starts, self._scored, self._batch_size = store, starts, scored, batch_size

    def __len__(self) -> int:
        return -(-len(self._starts) // self._batch_size)

    def __getitem__(self, index: int) -> Windows:  # type: ignore[override]  # no slices: a list of batches is no batch
        if not 0 <= index < len(self):
            raise IndexError(index)
        rows = slice(index * self._batch_size, (index + 1) * self._batch_size)
        batch = read_windows(self._store, self._starts[rows], self._scored.shape[1] + 1)
        return Windows(batch=batch, scored=torch.from_numpy(self._scored[rows]))


def read_windows(store: TokenStore, starts: NDArray[np.int64], width: int) -> Batch:
    tokens = np.empty((len(starts), width), np.int64)
    document_ids = np.empty((len(starts), width), np.int32)
    for row, start in enumerate(starts.tolist()):
        tokens[row] = read_tokens(store, start, start + width)
        document_ids[row] = documents_of(store, start, start + width)
    return Batch(tokens=torch.from_numpy(tokens), document_ids=torch.from_numpy(document_ids))


def documents_of(store: TokenStore, start: int, stop: int) -> NDArray[np.int32]:
    """Return the document of each token start .. stop-1 [stop - start]; the first token's document is 0."""
    first, last = np.searchsorted(store.document_ends, np.array([start, stop - 1], np.uint64), side="right")
    ends = store.document_ends[first:last].astype(np.int64)
    return np.searchsorted(ends, np.arange(start, stop), side="right").astype(np.int32)
