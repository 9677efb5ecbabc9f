import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.text.corpus import Windows, evaluation_windows, num_samples, read_batch
from dovetail.text.shard_writer import EncodedDocument, write_store
from dovetail.text.shards import TokenStore
from dovetail.text.yardstick import bits_per_byte

LENGTHS = [5, 1, 12, 30, 3, 3, 46]  # documents of 100 tokens; token i of the stream is i
ENDS = np.cumsum(LENGTHS)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    documents = [
        EncodedDocument(list(range(end - length, end)), length)
        for end, length in zip(ENDS.tolist(), LENGTHS, strict=True)
    ]
    return write_store(documents, tmp_path_factory.mktemp("corpus") / "store", 300, "abc", {}, shard_tokens=17)


def test_samples_tile_the_stream(store: TokenStore) -> None:
    assert num_samples(store, 9) == 11 and num_samples(store, 99) == 1
    batch = read_batch(store, 9, seed=0, consumed=0, count=11)
    assert batch.tokens.dtype == torch.int64 and batch.tokens.shape == (11, 10)
    rows = sorted(batch.tokens.tolist())
    assert rows == [list(range(9 * i, 9 * i + 10)) for i in range(11)]  # each ends with the next one's first


def test_targets_are_met_once_per_epoch(store: TokenStore) -> None:
    targets = read_batch(store, 9, 0, 11 * 4, 11).tokens[:, 1:].flatten()
    assert sorted(targets.tolist()) == list(range(1, 100))


def test_document_ids_change_where_documents_end(store: TokenStore) -> None:
    batch = read_batch(store, 19, seed=3, consumed=0, count=5)
    assert batch.document_ids.dtype == torch.int32
    expected = np.searchsorted(ENDS, batch.tokens.numpy(), side="right")
    assert np.array_equal(batch.document_ids.numpy(), expected - expected[:, :1])
    assert (batch.document_ids[:, 0] == 0).all() and batch.document_ids.max() > 1


def test_resume_goes_on_where_training_stopped(store: TokenStore) -> None:
    whole = read_batch(store, 9, seed=5, consumed=4, count=24)
    parts = [read_batch(store, 9, 5, consumed, count) for consumed, count in ((4, 8), (12, 2), (14, 14))]
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    assert torch.equal(torch.cat([part.document_ids for part in parts]), whole.document_ids)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_world_size_sees_the_same_batch(store: TokenStore, world: int) -> None:
    alone = read_batch(store, 9, seed=1, consumed=8, count=8)
    ranks = [read_batch(store, 9, 1, 8, 8, rank, world) for rank in range(world)]
    assert torch.equal(torch.cat([batch.tokens for batch in ranks]), alone.tokens)
    assert torch.equal(torch.cat([batch.document_ids for batch in ranks]), alone.document_ids)


def test_too_little_text(store: TokenStore) -> None:
    with pytest.raises(ValueError, match=r"100 tokens make no sample of 100 \+ 1"):
        read_batch(store, 100, 0, 0, 1)


def gather(windows: list[Windows]) -> list[tuple[int, int]]:
    """(scored token, tokens before it in its window) over all windows, in order."""
    found = []
    for window in windows:
        for tokens, scored in zip(window.batch.tokens.tolist(), window.scored.tolist(), strict=True):
            found += [(tokens[t + 1], t + 1) for t in range(len(scored)) if scored[t]]
    return found


@settings(deadline=None, max_examples=80)
@given(length=st.integers(1, 130), data=st.data(), batch_size=st.integers(1, 9))
def test_every_token_is_scored_once_with_its_context(
    store: TokenStore, length: int, data: st.DataObject, batch_size: int
) -> None:
    stride = data.draw(st.integers(1, length))
    windows = list(evaluation_windows(store, length, stride, batch_size))
    found = gather(windows)
    assert [token for token, _ in found] == list(range(1, 100))
    assert all(context == token or context > length - stride for token, context in found)
    assert all(1 <= len(window.batch.tokens) <= batch_size for window in windows)
    assert {window.batch.tokens.shape[1] for window in windows} == {min(length, 99) + 1}
    assert all(window.scored.shape == window.batch.tokens[:, 1:].shape for window in windows)


def test_window_that_is_not_moved_back_would_score_twice(store: TokenStore) -> None:
    """20 targets every 10 of 99: the last window overlaps by 11, and only 9 of its targets are new."""
    windows = list(evaluation_windows(store, 20, 10, 100))
    scored = windows[0].scored.sum(dim=1).tolist()
    assert scored == [20, *[10] * 7, 9]
    last_stride = windows[0].batch.tokens[:, -10:].flatten().tolist()  # the wrong variant: always the last stride
    assert len(set(last_stride)) < len(last_stride)


def test_uniform_model_costs_log_vocabulary(store: TokenStore) -> None:
    nats = sum(float(window.scored.sum()) * math.log(256) for window in evaluation_windows(store, 16, 8, 4))
    assert store.num_bytes == 100
    assert bits_per_byte(nats, store.num_bytes) == pytest.approx(8 * 99 / 100)


def test_stride_beyond_the_window(store: TokenStore) -> None:
    for stride in (0, 17):
        with pytest.raises(ValueError, match=f"stride {stride} must be between 1 and the window length 16"):
            list(evaluation_windows(store, 16, stride, 4))


def test_stream_of_one_token_has_nothing_to_score(tmp_path: Path) -> None:
    single = write_store([EncodedDocument([1], 0)], tmp_path / "store", 300, "abc", {})
    assert gather(list(evaluation_windows(single, 8, 4, 2))) == []
