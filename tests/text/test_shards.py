import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.text.shard_writer import EncodedDocument, token_dtype, write_store
from dovetail.text.shards import TokenStore, open_store, read_tokens

DOCUMENTS = [
    EncodedDocument([0, 5, 6, 1], 2),
    EncodedDocument([0, 1], 0),
    EncodedDocument([0, *range(7, 300), 1], 500),
]
STREAM = [token_id for document in DOCUMENTS for token_id in document.ids]


def write(directory: Path, vocab_size: int = 300, shard_tokens: int = 64) -> TokenStore:
    return write_store(DOCUMENTS, directory, vocab_size, "abc", {"binary": 2}, shard_tokens)


@pytest.mark.parametrize("shard_tokens", [50, 64, 301, 10**6])
def test_stream_comes_back(tmp_path: Path, shard_tokens: int) -> None:
    assert len(STREAM) == 301
    for store in (write(tmp_path / "store", shard_tokens=shard_tokens), open_store(tmp_path / "store")):
        assert read_tokens(store, 0, 301).tolist() == STREAM
        assert store.document_ends.tolist() == [4, 6, 301]
        assert (store.num_tokens, store.num_bytes) == (301, 502)
        assert len(store.shards) == -(-301 // shard_tokens)
        assert store.index.left_out == {"binary": 2} and store.index.fingerprint == "abc"
    assert [file.name for file in tmp_path.iterdir()] == ["store"]


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_any_span_across_shards(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    directory = tmp_path_factory.getbasetemp() / "spans"
    store = open_store(directory, verify=False) if directory.exists() else write(directory, shard_tokens=7)
    start = data.draw(st.integers(0, 301))
    stop = data.draw(st.integers(start, 301))
    tokens = read_tokens(store, start, stop)
    assert tokens.dtype == np.int64 and tokens.tolist() == STREAM[start:stop]


def test_two_bytes_per_token_where_they_suffice(tmp_path: Path) -> None:
    assert token_dtype(65536).itemsize == 2 and token_dtype(65537).itemsize == 4
    assert write(tmp_path / "small").shards[0].dtype == np.uint16
    store = write_store([EncodedDocument([0, 129279], 1)], tmp_path / "large", 129280, "abc", {})
    assert read_tokens(store, 0, 2).tolist() == [0, 129279]


def test_digest_is_of_the_contents(tmp_path: Path) -> None:
    first, again = write(tmp_path / "a"), write(tmp_path / "b")
    assert first.index.digest == again.index.digest
    other = write_store(DOCUMENTS[:2], tmp_path / "c", 300, "abc", {})
    assert other.index.digest != first.index.digest


@pytest.mark.parametrize("name", ["tokens-00001.bin", "documents.bin", "index.json"])
@pytest.mark.parametrize("damage", ["truncate", "remove", "flip"])
def test_damage_names_file_and_remedy(tmp_path: Path, name: str, damage: str) -> None:
    write(tmp_path / "store")
    path = tmp_path / "store" / name
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(data[:-3])
    elif damage == "remove":
        path.unlink()
    else:
        data[0] ^= 1
        path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"store/{name}: .*; delete .*store and run again"):
        open_store(tmp_path / "store")
    if damage != "flip" or name == "index.json":
        with pytest.raises(ValueError, match=name):
            open_store(tmp_path / "store", verify=False)


def test_index_of_another_format(tmp_path: Path) -> None:
    write(tmp_path / "store")
    path = tmp_path / "store" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(ValueError, match=r"format 2, this version reads 1; delete"):
        open_store(tmp_path / "store")


def test_no_documents(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no documents to tokenise \(left out: 3 binary, 1 empty\); check data\.path"):
        write_store([], tmp_path / "store", 300, "abc", {"empty": 1, "binary": 3})
    assert list(tmp_path.iterdir()) == []


def test_interruption_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> Iterator[EncodedDocument]:
        yield DOCUMENTS[2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(interrupted(), tmp_path / "store", 300, "abc", {}, shard_tokens=64)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
from pathlib import Path
from dovetail.text.shard_writer import EncodedDocument, write_store

def documents():
    yield EncodedDocument(list(range(300)), 300)
    print("writing", flush=True)
    time.sleep(60)

write_store(documents(), Path(sys.argv[1]), 300, "abc", {}, 64)
"""


def test_kill_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "store")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert list((tmp_path / ".store.partial").glob("tokens-*.bin"))
    with pytest.raises(ValueError, match="no readable index"):
        open_store(tmp_path / "store")
    write(tmp_path / "store")
    assert [file.name for file in tmp_path.iterdir()] == ["store"]  # the next run cleans up


def test_full_disk_is_said_cleanly(tmp_path: Path) -> None:
    """A file size limit refuses writes as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    many = (EncodedDocument(list(range(300)), 300) for _ in range(2000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(OSError, match=r"the disk is full after 0\.\d MB, nothing was left behind; free some space"):
            write_store(many, tmp_path / "store", 300, "abc", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_called_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        write(tmp_path / "file" / "store")
