"""Writes a file so that it is either whole or absent.

The data is written under another name, flushed to the disk and renamed. A reader, or the same program after a kill,
never sees half a file under the final name.
"""

from __future__ import annotations

import os
from pathlib import Path


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the content of `path` by `data` in one step; a missing directory is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable: a rename survives a power cut only after this."""
    descriptor = os.open(directory, os.O_RDONLY)
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
