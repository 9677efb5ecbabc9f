"""Compiles numba kernels, keeps their machine code on the disk, and says so before the first.

A kernel is compiled by a process beside this one, and this one loads what that has kept. For numba's code of a
parallel kernel is optimised once more on its way to the disk, and sums may come in another order in it: a run that
used what it had just compiled would differ in the last bits from all later ones.

Nothing here knows torch: the kernels of the network simulation are compiled by it too.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numba
from numba.core import event
from numba.core.caching import FunctionCache

_PACKAGE = Path(__file__).parent
_IDLE = 30.0  # seconds after which the process that compiles ends
_DIRECTORY = "DOVETAIL_COMPILES_INTO"  # set for the process that compiles


def compiled(**options: Any) -> Callable[[Any], Any]:
    """Return a decorator that compiles a function on first use, as numba.njit with `options` does.

    The machine code is kept in `kernel_directory`.
    """

    def decorate(function: Any) -> Any:
        dispatcher = numba.njit(**options)(function)
        config: Any = numba.config
        before, config.CACHE_DIR = config.CACHE_DIR, str(kernel_directory())
        try:
            dispatcher._cache = _Kept(function)  # type: ignore[no-untyped-call]  # as njit(cache=True) has its own
        finally:
            config.CACHE_DIR = before
        return dispatcher

    return decorate


@functools.cache
def kernel_directory() -> Path:
    """Return where compiled kernels are kept: one directory per version of their sources.

    numba looks at a kernel's own file only, and would go on using one compiled with an older `load` or `exp`.
    Where no directory can be written to, it is a temporary one, which goes with the process.
    """
    if _DIRECTORY in os.environ:
        return Path(os.environ[_DIRECTORY])
    digest = hashlib.sha256()
    for path in sorted([Path(__file__), *_PACKAGE.rglob("kernels.py"), *_PACKAGE.rglob("*_numba.py")]):
        digest.update(path.read_bytes())
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        directory = caches / "dovetail" / f"kernels-{digest.hexdigest()[:16]}"
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):  # it may be there, and belong to another user
            return directory
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        scratch = tempfile.TemporaryDirectory(prefix="dovetail-kernels-", ignore_cleanup_errors=True)
        weakref.finalize(_Kept, scratch.cleanup)  # at the end of the process
        return Path(scratch.name)


class _Kept(FunctionCache):  # type: ignore[misc]
    """The compiled forms of one kernel on the disk; a form that is missing is compiled before it is loaded."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        found = super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        if found is None and _DIRECTORY not in os.environ:
            dispatcher = getattr(import_module(self._py_func.__module__), self._py_func.__name__, None)
            is_ours = getattr(dispatcher, "py_func", None) is self._py_func  # a test's own kernel has no such name
            if is_ours:
                with event.trigger_event("numba:compile", {"dispatcher": dispatcher}):  # type: ignore[no-untyped-call]
                    _compiler().compile(self._py_func.__module__, self._py_func.__name__, sig)
                found = super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        return found


class _Compiler:
    """A process that compiles kernels, one after the other, until it has had nothing to do for a while."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def compile(self, module: str, name: str, signature: Any) -> None:
        """Return when it is done; a failure is no matter, the caller then compiles for itself."""
        request = pickle.dumps((module, name, signature))
        for _ in range(2):  # the process may have ended while the request was on its way
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            assert self._process.stdin is not None and self._process.stdout is not None
            try:
                self._process.stdin.write(request)
                self._process.stdin.flush()
            except OSError:
                continue
            if self._process.stdout.readline():
                return

    def _start(self) -> subprocess.Popen[bytes]:
        paths = os.pathsep.join(path for path in sys.path if path)
        return subprocess.Popen(
            [sys.executable, "-c", "from dovetail.kernel_cache import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths, _DIRECTORY: str(kernel_directory())},
            process_group=0,  # Ctrl-C is for the process that waits
        )


@functools.cache
def _compiler() -> _Compiler:
    return _Compiler()


def serve() -> None:
    """Compile what standard input asks for, until it ends or says nothing; a line on standard output for each."""
    while True:
        idle = threading.Timer(_IDLE, os._exit, [0])
        idle.daemon = True
        idle.start()
        try:
            module, name, signature = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        idle.cancel()
        with suppress(Exception):  # who asked compiles it too, and is told why that cannot be
            _compile(module, name, signature)
        sys.stdout.write("\n")
        sys.stdout.flush()


def _compile(module: str, name: str, signature: Any) -> None:
    """Where several processes want a kernel, as ranks do, one compiles it; those that waited find it on the disk."""
    with (kernel_directory() / f"{module}.{name}.lock").open("w") as lock:
        with suppress(OSError):  # a file system without locks: they all compile it
            fcntl.flock(lock, fcntl.LOCK_EX)
        getattr(import_module(module), name).compile(signature)


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
