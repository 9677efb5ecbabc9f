"""Starts the ranks of a cluster, each in the namespace of its node, and watches them to the end.

A rank finds what torchrun would give it in its environment. Rank 0 writes straight to the terminal, so that its display
is as it would be alone; each line of another rank is prefixed with its node and number. Once a rank fails, the others
are told to end, and killed if they do not.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from selectors import EVENT_READ, DefaultSelector
from types import FrameType
from typing import TextIO

from dovetail.cluster.links import NIC, Links
from dovetail.cluster.shape import Shape

PORT = 29500  # each cluster has its own addresses, and so its own ports
END_SECONDS = 3.0  # for the ranks that are left when one has failed
SAVE_SECONDS = 60.0  # after Ctrl-C: a run ends its step and is saved
LOOK_SECONDS = 0.05
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


class Interrupted(RuntimeError):
    """Ctrl-C, SIGTERM or SIGHUP; the ranks have ended."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The rank that failed first."""

    rank: int
    node: int
    code: int  # as Popen gives it: less than 0 for a signal

    @property
    def exit_code(self) -> int:
        """As a shell would give it."""
        return self.code if self.code > 0 else 128 - self.code

    def __str__(self) -> str:
        how = f"ended with exit code {self.code}" if self.code > 0 else f"was killed by {_signal_name(-self.code)}"
        return f"rank {self.rank} (node {self.node}) {how}; the other ranks were stopped"


@dataclass(frozen=True, slots=True)
class Streams:
    """Where ranks write: the first straight to these files, the others by lines."""

    out: TextIO
    error: TextIO

    def say(self, remark: str) -> None:
        self.error.write(f"{remark}\n")
        self.error.flush()


@dataclass(slots=True)
class _Output:
    """One stream of a rank: what has come of its last line, and where whole lines go."""

    prefix: str
    target: TextIO
    line: bytes = b""

    def write(self, data: bytes) -> None:
        """Print the lines that are whole; no data is the end of the stream."""
        *lines, self.line = (self.line + data).split(b"\n")
        if not data and self.line:
            lines, self.line = [self.line], b""
        self.target.writelines(f"{self.prefix}{line.decode(errors='replace')}\n" for line in lines)
        self.target.flush()


@dataclass(slots=True)
class _Rank:
    number: int
    node: int
    process: subprocess.Popen[bytes]

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def send(self, number: int) -> None:
        if self.is_alive():
            os.killpg(self.process.pid, number)


@dataclass(slots=True)
class _Ranks:
    """Ranks that run, and why they are to end."""

    signals: Sequence[int]  # that have come so far; grows
    streams: Streams
    ranks: list[_Rank] = field(default_factory=list)
    selector: DefaultSelector = field(default_factory=DefaultSelector)
    failure: Failure | None = None
    deadline: float = float("inf")
    heard: int = 0  # signals that were passed on

    def add(self, node: int, process: subprocess.Popen[bytes]) -> None:
        number = len(self.ranks)
        self.ranks.append(_Rank(number, node, process))
        for stream, target in ((process.stdout, self.streams.out), (process.stderr, self.streams.error)):
            if stream is not None:
                self.selector.register(stream, EVENT_READ, _Output(f"[node {node} rank {number}] ", target))

    def watch(self) -> None:
        while any(rank.is_alive() for rank in self.ranks):
            self._copy(LOOK_SECONDS)
            self._note_failure()
            if len(self.signals) > self.heard:
                self.heard = len(self.signals)
                self.streams.say("the ranks are told to end; a second signal kills them")
                self._end(signal.SIGINT, SAVE_SECONDS if self.heard == 1 else 0.0)
            if time.monotonic() > self.deadline:
                self._end(signal.SIGKILL, END_SECONDS)
        self._note_failure()

    def drain(self) -> None:
        """Print what is left in the streams."""
        while self.selector.get_map() and self._copy(0.0):
            pass
        for key in list(self.selector.get_map().values()):
            key.data.write(b"")
        self.selector.close()
        for rank in self.ranks:
            for stream in (rank.process.stdout, rank.process.stderr):
                if stream is not None:
                    stream.close()

    def _copy(self, seconds: float) -> bool:
        ready = self.selector.select(seconds)
        for key, _ in ready:
            data = os.read(key.fd, 1 << 16)
            key.data.write(data)
            if not data:
                self.selector.unregister(key.fileobj)
        if not self.selector.get_map():
            time.sleep(seconds)
        return bool(ready)

    def _note_failure(self) -> None:
        ended = [rank for rank in self.ranks if rank.process.poll()]
        if ended and self.failure is None and not self.signals:
            # A rank that was killed comes first: others may have failed of it since the last look.
            first = min(ended, key=lambda rank: (rank.process.returncode > 0, rank.number))
            self.failure = Failure(first.number, first.node, first.process.returncode)
            self._end(signal.SIGTERM, END_SECONDS)

    def _end(self, number: int, seconds: float) -> None:
        for rank in self.ranks:
            rank.send(number)
        self.deadline = time.monotonic() + seconds


@contextmanager
def stop_signals() -> Iterator[Sequence[int]]:
    """Collect Ctrl-C, SIGTERM and SIGHUP, so that links are never left half made or half removed.

    What this process was started to ignore, as with nohup, it goes on to ignore.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    heard = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {each: signal.signal(each, note) for each in heard if signal.getsignal(each) != signal.SIG_IGN}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def launch(
    command: Sequence[str], shape: Shape, links: Links, signals: Sequence[int], streams: Streams
) -> Failure | None:
    """Run `command` once per rank, and return what failed first.

    `signals` are those of `stop_signals`; the first is passed on to the ranks as Ctrl-C, and the next kills them.
    Raises Interrupted if a signal came, once the ranks have ended.
    """
    running = _Ranks(signals, streams)
    try:
        for number in range(shape.world_size):
            node = number // shape.ranks
            inside = ("ip", "netns", "exec", links.nodes[node], *command)
            running.add(node, _start(inside, environment(shape, number, links.address), streams, number == 0))
        running.watch()
    finally:
        for rank in running.ranks:
            rank.send(signal.SIGKILL)
            rank.process.wait()
        running.drain()
    if signals:
        raise Interrupted(f"stopped by {_signal_name(signals[0])}; all ranks have ended")
    return running.failure


def _start(
    command: Sequence[str], environment: Mapping[str, str], streams: Streams, is_first: bool
) -> subprocess.Popen[bytes]:
    streams.out.flush()
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=streams.out if is_first else subprocess.PIPE,
        stderr=streams.error if is_first else subprocess.PIPE,
        env={**os.environ, **environment},
        process_group=0,  # Ctrl-C in the terminal is for this process, which passes it on
        preexec_fn=_die_with_parent,
    )


def environment(shape: Shape, rank: int, address: str) -> Mapping[str, str]:
    """Return what `rank` gets beside the caller's environment: torchrun's variables, its interface and threads."""
    node, local_rank = divmod(rank, shape.ranks)
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(shape.world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(shape.ranks),
        "GROUP_RANK": str(node),
        "GROUP_WORLD_SIZE": str(shape.nodes),
        "ROLE_NAME": "default",
        "ROLE_RANK": str(rank),
        "ROLE_WORLD_SIZE": str(shape.world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(PORT),
        "TORCHELASTIC_RUN_ID": "dovetail-cluster",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "GLOO_SOCKET_IFNAME": NIC,
        "NCCL_SOCKET_IFNAME": NIC,
        "OMP_NUM_THREADS": str(shape.threads),
        "PYTHONUNBUFFERED": "1",  # lines appear when they are written, and a killed rank loses none
    }


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def _signal_name(number: int) -> str:
    return signal.Signals(number).name
