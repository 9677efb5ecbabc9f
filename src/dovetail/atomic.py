"""Writes files and directories so that they are whole or absent, also after a kill or on a full disk.

The data is written beside its target under the name `.NAME.partial`, flushed to the disk and renamed. A reader, or the
same program after a kill, never sees half of it under the final name.

The name is the same for every process, and a lock says whether its writer still runs: the system takes the lock back
when a process dies, so what a killed writer left is replaced. Process numbers cannot say it, because a container gives
the same ones again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the content of `path` by `data` in one step; a missing directory is created.

    Raises OSError, with the remedy if the disk is full. The old content is there then, and nothing else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial_name(path)
    with _explaining_full_disk(path), _locked(temporary, wait=True) as file:
        try:
            file.truncate(0)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync(path.parent)


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Yield a directory to fill with files: it becomes `target` if the block ends well, and is removed if not.

    An old `target` stays until the new one is whole. Raises ValueError if another process is writing `target`, and
    OSError, with the remedy, if the disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(target)
    with only_process(target.with_name(f".{target.name}.lock"), f"{target} is being written by another process"):
        clear_leftovers(target)
        partial.mkdir()
        try:
            with _explaining_full_disk(target, partial):
                yield partial
                for path in partial.iterdir():
                    sync(path)
                publish(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, target: Path) -> None:
    """Give the filled directory `partial` its final name, in place of what may be there."""
    sync(partial)
    try:
        os.replace(partial, target)
    except OSError as error:
        if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
            raise
        shutil.rmtree(_old_name(target), ignore_errors=True)
        os.replace(target, _old_name(target))
        try:
            os.replace(partial, target)
        except OSError:
            os.replace(_old_name(target), target)
            raise
    sync(target.parent)
    shutil.rmtree(_old_name(target), ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Take the final name away first, so that a kill in between leaves no half-removed directory."""
    retired = partial_name(path)
    shutil.rmtree(retired, ignore_errors=True)
    os.replace(path, retired)
    shutil.rmtree(retired, ignore_errors=True)


def clear_leftovers(target: Path) -> None:
    """Remove what a killed writer of the directory `target` left; an old one that it had put aside comes back."""
    old, partial = _old_name(target), partial_name(target)
    if old.exists() and not target.exists():
        os.replace(old, target)
    for leftover in (old, partial):
        if leftover.exists():
            shutil.rmtree(leftover)


def partial_name(target: Path) -> Path:
    """Return where `target` is written before it has its name."""
    return target.with_name(f".{target.name}.partial")


def _old_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


@contextmanager
def only_process(lock: Path, refusal: str) -> Iterator[None]:
    """Hold the file `lock` during the block, so that no other process enters such a block meanwhile.

    A process that was killed holds nothing any more. Raises ValueError if another one holds the file: `refusal`, with
    its number and host.
    """
    try:
        file = _locked(lock, wait=False)
    except BlockingIOError:
        raise ValueError(f"{refusal} ({lock.read_text()})") from None
    with file:
        try:
            with _explaining_full_disk(lock):
                file.truncate(0)
                file.write(f"pid {os.getpid()} on host {platform.node()}".encode())
                file.flush()
            yield
        finally:
            lock.unlink(missing_ok=True)


def _locked(path: Path, wait: bool) -> BinaryIO:
    """Open the file `path`, which is made if need be, and lock it until it is closed.

    Raises BlockingIOError if another process has locked it, unless `wait` is set.
    """
    while True:
        file = open(path, "ab")  # noqa: SIM115 - closed by the caller
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            raise
        except OSError:  # a file system without locks: there a second process goes unnoticed
            pass
        if _is_at(file, path):
            return file
        file.close()  # whoever held it has renamed or removed it meanwhile


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _explaining_full_disk(target: Path, partial: Path | None = None) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number not in _DISK_FULL and "os error 28" not in str(error):  # the latter is how safetensors says it
            raise
        written = 0 if partial is None else sum(path.stat().st_size for path in partial.iterdir())
        after = f" after {written / 1e6:.1f} MB" if written else ""
        remedy = "nothing was left behind; free some space, or choose a place on another disk"
        raise OSError(number or errno.ENOSPC, f"the disk is full{after}, {remedy}", str(target)) from error


def sync(path: Path) -> None:
    """Flush a file or directory to the disk: a rename survives a power cut only after this, done to its directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_new_file(path: Path) -> None:
    """Raise ValueError if `write_bytes` could not write `path`: called before the work whose result it will hold."""
    if path.is_dir():
        raise ValueError(f"{path}: is a directory; give the name of a file")
    check_folder(path.absolute().parent)


def check_folder(folder: Path) -> None:
    """Raise ValueError if nothing can be written into `folder`, which need not exist yet."""
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    name = str(folder) if there == folder.absolute() else f"{folder}: {there}"
    if not there.is_dir():
        raise ValueError(f"{name} is a file, not a directory; give another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{name} cannot be written to; give another place, or change its permissions")
