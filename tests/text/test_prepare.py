import os
from itertools import pairwise
from pathlib import Path

import pytest

from dovetail.text import prepare
from dovetail.text.documents import DataConfig
from dovetail.text.prepare import Tally, prepare_store, sha256_of
from dovetail.text.shards import TokenStore, read_tokens
from dovetail.text.tokenizer import Tokenizer


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    (tmp_path / "source").mkdir()
    for i in range(40):
        (tmp_path / "source" / f"{i:02d}.txt").write_text(f"document {i}, line one:\n    line two\n" * 3)
    (tmp_path / "source" / "picture").write_bytes(b"\0\0")
    return DataConfig(kind="files", path=tmp_path / "source", held_out_share=0.3, fim_rate=0.0)


def text_of(store: TokenStore, tokenizer: Tokenizer) -> list[str]:
    edges = [0, *store.document_ends.tolist()]
    return [tokenizer.decode(read_tokens(store, a, b).tolist()) for a, b in pairwise(edges)]


def test_both_splits_hold_all_the_text(config: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    train = prepare_store(config, tokenizer, tmp_path / "data", "train")
    held_out = prepare_store(config, tokenizer, tmp_path / "data", "held_out")
    assert config.path is not None
    everything = [file.read_text() for file in sorted(config.path.glob("*.txt"))]
    texts = [text_of(train, tokenizer), text_of(held_out, tokenizer)]
    assert sorted(texts[0] + texts[1]) == sorted(everything) and all(texts)
    assert train.num_bytes + held_out.num_bytes == sum(len(text.encode()) for text in everything)
    for store in (train, held_out):
        starts = [0, *store.document_ends[:-1].tolist()]
        assert all(read_tokens(store, start, start + 1) == [0] for start in starts)
        assert all(read_tokens(store, int(end) - 1, int(end)) == [1] for end in store.document_ends)
    assert train.index.left_out | held_out.index.left_out == {"binary": 1}


def test_second_call_reads_what_the_first_wrote(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_store(config, tokenizer, tmp_path / "data", "train")

    def forbidden(*arguments: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr("dovetail.text.prepare.encode_documents", forbidden)
    again = prepare_store(config, tokenizer, tmp_path / "data", "train")
    assert (again.directory, again.index) == (first.directory, first.index)


def test_any_change_makes_another_store(config: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    def directory(changed: DataConfig = config, with_tokenizer: Tokenizer = tokenizer) -> Path:
        return prepare_store(changed, with_tokenizer, tmp_path / "data", "train").directory

    seen = [directory()]
    for update in ({"fim_rate": 0.5}, {"seed": 1}, {"newline_split_rate": 0.5}, {"held_out_share": 0.1}):
        seen.append(directory(config.model_copy(update=update)))
    seen.append(directory(with_tokenizer=Tokenizer.train(["other text"], 300)))
    assert config.path is not None
    (config.path / "more.txt").write_text("more")
    seen.append(directory())
    (config.path / "more.txt").write_text("less")
    seen.append(directory())
    assert len(set(seen)) == len(seen)


def test_a_touched_file_is_the_same_text(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its content is read once more, and no other file's."""
    first = prepare_store(config, tokenizer, tmp_path / "data", "train").directory
    assert config.path is not None
    os.utime(config.path / "00.txt", ns=(1, 1))
    hashed: list[Path] = []
    monkeypatch.setattr(prepare, "sha256_of", lambda path: hashed.append(path) or sha256_of(path))
    for _ in range(2):
        assert prepare_store(config, tokenizer, tmp_path / "data", "train").directory == first
    assert hashed == [config.path / "00.txt"]


def test_moved_text_is_the_same_text(config: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = prepare_store(config, tokenizer, tmp_path / "data", "train").directory
    assert config.path is not None
    config.path.rename(tmp_path / "elsewhere")
    moved = config.model_copy(update={"path": tmp_path / "elsewhere"})
    assert prepare_store(moved, tokenizer, tmp_path / "data", "train").directory == first


def test_held_out_text_is_not_cut(config: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    eager = config.model_copy(update={"fim_rate": 1.0, "newline_split_rate": 1.0})
    train = prepare_store(eager, tokenizer, tmp_path / "data", "train")
    held_out = prepare_store(eager, tokenizer, tmp_path / "data", "held_out")
    assert (read_tokens(train, 0, train.num_tokens) == 2).sum() == train.index.num_documents
    assert 2 not in read_tokens(held_out, 0, held_out.num_tokens)
    plain = prepare_store(config, tokenizer, tmp_path / "plain", "held_out")
    assert plain.index.digest == held_out.index.digest


def test_damaged_store_is_not_used(config: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    store = prepare_store(config, tokenizer, tmp_path / "data", "train")
    (store.directory / "documents.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"documents\.bin: 0 bytes, should be .* delete"):
        prepare_store(config, tokenizer, tmp_path / "data", "train")


def test_renamed_store_is_not_taken_for_another(config: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = prepare_store(config, tokenizer, tmp_path / "data", "train").directory
    other = config.model_copy(update={"seed": 1, "fim_rate": 1.0})
    second = prepare_store(other, tokenizer, tmp_path / "data", "train").directory
    second.rename(tmp_path / "aside")
    first.rename(second)
    with pytest.raises(ValueError, match="holds other text than its name says"):
        prepare_store(other, tokenizer, tmp_path / "data", "train")


def test_progress_counts_up_to_the_totals(config: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    seen: list[Tally] = []
    store = prepare_store(config, tokenizer, tmp_path / "data", "train", seen.append)
    assert [progress.num_documents for progress in seen] == list(range(1, store.index.num_documents + 1))
    assert (seen[-1].num_bytes, seen[-1].num_tokens) == (store.num_bytes, store.num_tokens)


def test_one_document_is_in_both_splits(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("one line of the book\n" * 100)
    config = DataConfig(kind="files", path=tmp_path / "book.txt", fim_rate=0.0)
    train, held_out = (prepare_store(config, tokenizer, tmp_path / "data", split) for split in ("train", "held_out"))
    assert (train.num_bytes, held_out.num_bytes) == (95 * 21, 5 * 21)


def test_empty_held_out_part_names_the_remedy(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("the only document")
    config = DataConfig(kind="files", path=tmp_path / "book.txt", held_out_share=0.01)
    with pytest.raises(ValueError, match=r"no documents to tokenise .* data\.held_out_share"):
        prepare_store(config, tokenizer, tmp_path / "data", "held_out")


def test_batches_of_text_do_not_show(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = config.model_copy(update={"fim_rate": 0.5, "newline_split_rate": 0.5})
    whole = prepare_store(eager, tokenizer, tmp_path / "whole", "train")
    monkeypatch.setattr("dovetail.text.prepare.BATCH_BYTES", 1)
    single = prepare_store(eager, tokenizer, tmp_path / "single", "train")
    assert whole.index.digest == single.index.digest
