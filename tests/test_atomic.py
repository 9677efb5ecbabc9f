"""Files and directories are whole or absent, and what cannot be written is known beforehand."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dovetail.atomic import check_folder, check_new_file, clear_leftovers, only_process, whole_directory, write_bytes

WRITER = """
import sys, time
from pathlib import Path
from dovetail.atomic import whole_directory

with whole_directory(Path(sys.argv[1])) as partial:
    (partial / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@contextmanager
def writing(target: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, while it is writing the directory `target`; killed at the end."""
    environment = {"PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    command = [sys.executable, "-c", WRITER, str(target)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "writing\n"
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


def fill(target: Path, text: str) -> None:
    with whole_directory(target) as partial:
        (partial / "file").write_text(text)


def test_a_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for text in ("one", "two"):
        fill(tmp_path / "out", text)
        assert (tmp_path / "out" / "file").read_text() == text
    with pytest.raises(KeyboardInterrupt), whole_directory(tmp_path / "out"):
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "file").read_text() == "two"
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_a_second_writer_is_refused_and_a_killed_one_replaced(tmp_path: Path) -> None:
    with writing(tmp_path / "out") as process:
        message = rf"out is being written by another process \(pid {process.pid} on host"
        with pytest.raises(ValueError, match=message):
            fill(tmp_path / "out", "refused")
        assert (tmp_path / ".out.partial" / "half").exists()
    assert sorted(each.name for each in tmp_path.iterdir()) == [".out.lock", ".out.partial"]
    fill(tmp_path / "out", "whole")
    assert [each.name for each in tmp_path.rglob("*")] == ["out", "file"]


def test_what_was_put_aside_comes_back_if_its_successor_never_got_the_name(tmp_path: Path) -> None:
    for name in (".out.old", ".out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    clear_leftovers(tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == ".out.old"


def test_a_lock_goes_when_it_is_given_back(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with only_process(lock, "taken"), pytest.raises(ValueError, match=rf"taken \(pid {os.getpid()} on host"):
        only_process(lock, "taken").__enter__()
    assert not lock.exists()


def test_a_file_system_without_locks_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    fill(tmp_path / "out", "whole")
    write_bytes(tmp_path / "file", b"whole")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "out"]


def test_a_leftover_of_a_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".file.partial").write_bytes(b"longer than what is written now")
    write_bytes(tmp_path / "file", b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole" and [each.name for each in tmp_path.iterdir()] == ["file"]


def test_what_passes_the_check_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    check_new_file(path)
    assert not path.parent.exists()  # a check writes nothing
    write_bytes(path, b"whole")
    check_new_file(path)
    write_bytes(path, b"again")
    assert path.read_bytes() == b"again" and [each.name for each in path.parent.iterdir()] == ["file.txt"]


def test_what_does_not_pass_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path, message in ((tmp_path, "is a directory"), (tmp_path / "file" / "below", "is a file, not a directory")):
        with pytest.raises(ValueError, match=message):
            check_new_file(path)
        with pytest.raises(OSError):
            write_bytes(path, b"")


def test_a_folder_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere, so the answer of the system is given here."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match=rf"{tmp_path} cannot be written to; give another place"):
        check_folder(tmp_path / "out")
