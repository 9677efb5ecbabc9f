"""Compiles numba kernels, keeps their machine code on the disk, and says so before the first.

Nothing here knows torch: the kernels of the network simulation are compiled by it too.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core import event

_PACKAGE = Path(__file__).parent


def compiled(**options: Any) -> Callable[[Any], Any]:
    """Return a decorator that compiles a function on first use, as numba.njit with `options` does.

    The machine code is kept in `kernel_directory`.
    """

    def decorate(function: Any) -> Any:
        config: Any = numba.config
        before, config.CACHE_DIR = config.CACHE_DIR, str(kernel_directory())
        try:
            return numba.njit(cache=True, **options)(function)
        finally:
            config.CACHE_DIR = before

    return decorate


@functools.cache
def kernel_directory() -> Path:
    """Return where compiled kernels are kept: one directory per version of their sources.

    numba looks at a kernel's own file only, and would go on using one compiled with an older `load` or `exp`.
    """
    digest = hashlib.sha256()
    for path in sorted([Path(__file__), *_PACKAGE.rglob("kernels.py"), *_PACKAGE.rglob("*_numba.py")]):
        digest.update(path.read_bytes())
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = caches / "dovetail" / f"kernels-{digest.hexdigest()[:16]}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written to: compile once per process
        return Path(tempfile.mkdtemp(prefix="dovetail-kernels-"))
    return directory


class _Once(event.Listener):  # type: ignore[misc]
    """Calls `say` when the first of our kernels is compiled; a kernel that is read from the disk is none."""

    def __init__(self, say: Callable[[], None]) -> None:
        self._say = say
        self._is_said = False

    def on_start(self, event: Any) -> None:
        if not self._is_said and event.data["dispatcher"].py_func.__module__.startswith("dovetail."):
            self._is_said = True
            self._say()

    def on_end(self, event: Any) -> None:
        """Nothing is said at the end."""


def before_compiling(say: Callable[[], None]) -> None:
    """Call `say` once in this process, right before the first kernel is compiled that is not on the disk yet."""
    event.register("numba:compile", _Once(say))  # type: ignore[no-untyped-call]
