"""Writes a directory that appears whole or not at all.

It is filled beside its target, synced, and then renamed.

An existing target is replaced only where asked, and only if it is a checkpoint directory. A process killed
outright can leave a hidden `.NAME.partial-HOST-PID` beside the target, never a partial target; the next one
to write there removes it. Between the two renames of an overwrite the former target is `.NAME.old-PID`.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dovetail.model.checkpoint.inventory import CONFIG, INDEX, SINGLE


@contextmanager
def new_directory(target: Path, num_bytes: int, overwrite: bool) -> Iterator[Path]:
    """A flat directory to fill with files: it becomes `target` on success and disappears on any failure.

    `num_bytes` is what will be written, checked against the free space first. `ValueError` for an existing
    target that may not be replaced, `OSError` for a disk without room; an old target stays until the new one
    is whole.
    """
    target = target.resolve()
    check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if num_bytes > free:
        raise _disk_full(target, f"needs {num_bytes / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free")
    stem = f".{target.name}.partial-{platform.node()}-"
    for stale in target.parent.iterdir():
        if stale.name.startswith(stem) and not _is_running(stale.name.removeprefix(stem)):
            shutil.rmtree(stale)
    partial = target.with_name(stem + str(os.getpid()))
    partial.mkdir()
    try:
        yield partial
        for path in partial.iterdir():
            path.chmod(0o666 & partial.stat().st_mode)  # safetensors makes its files private
            _sync(path)
        _sync(partial)
        _replace(partial, target)
        _sync(target.parent)
    except Exception as error:
        if "os error 28" in str(error) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
            raise _disk_full(target, f"the disk filled up while writing {num_bytes / 1e6:,.1f} MB") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(target: Path, overwrite: bool) -> None:
    """Raise ValueError for a target that exists and may not be replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} exists and is not a directory; choose another place to write to")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{target} exists and is not empty; choose another, or overwrite it explicitly")
    if not (target / CONFIG).is_file() or not ((target / SINGLE).exists() or (target / INDEX).exists()):
        raise ValueError(f"{target} is not a checkpoint, so it is not overwritten; remove it yourself")


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError, OverflowError):
        pass
    return True


def _replace(partial: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        os.replace(partial, target)
        return
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    os.replace(target, old)
    try:
        os.replace(partial, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_full(target: Path, what: str) -> OSError:
    return OSError(errno.ENOSPC, f"no room for the checkpoint: {what}; nothing was left behind", str(target))
