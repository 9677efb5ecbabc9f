"""Writes a checkpoint directory, which appears whole or not at all.

An existing target is replaced only where asked, and only if it is a checkpoint directory.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dovetail.atomic import whole_directory
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
        what = f"no room for the checkpoint: it needs {num_bytes / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free"
        raise OSError(errno.ENOSPC, what, str(target))
    with whole_directory(target) as partial:
        yield partial
        for path in partial.iterdir():
            path.chmod(0o666 & partial.stat().st_mode)  # safetensors makes its files private


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
