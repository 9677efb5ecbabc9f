"""Network namespaces joined by links of limited rate: built for one run, and removed after it.

Each node is a namespace with an interface `nic`. Its other end is a port of a bridge, the switch, which has a namespace
of its own, so that nothing of it is seen outside and two clusters may have the same addresses:

    dovetail-0-node0            dovetail-0-switch            dovetail-0-node1
      lo                         bridge `switch`               lo
      nic 10.77.0.1  --------  port0       port1  --------  nic 10.77.0.2

`nic` limits what its node sends, and the port what its node receives. A port holds back what it cannot pass on at once,
up to QUEUE, so that nothing is dropped, as on InfiniBand. The kernel would hand a network card packets of up to 64 KB
to cut; here each packet has at most MTU bytes already, so that interfaces count the bytes that a wire would carry.

The number in the names belongs to the process that holds the lock of that number. A killed process holds none: its
namespaces are then removed, with what still runs in them, by the next cluster.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from dovetail.atomic import only_process
from dovetail.cluster.shape import Shape

NIC = "nic"
MTU = 9000  # bytes, as of jumbo frames
HEADER = 14  # bytes of Ethernet's header, which the limit counts too
BURST = 1e-3  # seconds that a link may send ahead; timers are not finer
QUEUE = 64 << 20  # bytes
LOCKS = Path("/run/dovetail")
NAMESPACES = Path("/run/netns")  # where `ip netns` keeps them
HOSTS = Path("/etc/netns")  # what stands here under a namespace's name replaces files of /etc in it
IPV6 = Path("/proc/net/if_inet6")  # there where the kernel speaks it
REMOVAL_SECONDS = 5.0
_NAME = re.compile(r"dovetail-(\d+)-\w+")


@dataclass(frozen=True, slots=True)
class Links:
    nodes: tuple[str, ...]  # names of the namespaces
    switch: str

    @property
    def address(self) -> str:
        """Of the first node, where ranks meet."""
        return _address(0)


def check() -> None:
    """Raise ValueError, with the remedy, where this process cannot make namespaces and links."""
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        raise ValueError(f"a cluster needs {' and '.join(missing)} of iproute2: install it (apt install iproute2)")
    if os.geteuid() != 0:
        raise ValueError("a cluster is made of network namespaces, which root alone may make: run it as root (sudo)")


@contextmanager
def links(shape: Shape, say: Callable[[str], None]) -> Iterator[Links]:
    """Yield the links of a cluster, which are removed at the end with all processes in them.

    `say` is told of leftovers that were removed. Raises ValueError where the system refuses.
    """
    check()
    _remove_leftovers(say)
    with _own_number() as number:
        made = Links(tuple(f"dovetail-{number}-node{node}" for node in range(shape.nodes)), f"dovetail-{number}-switch")
        try:
            _build(made, shape)
            yield made
        finally:
            _remove(number)


def _build(made: Links, shape: Shape) -> None:
    switch, size = made.switch, ("mtu", str(MTU))
    # IPv6 would send packets of its own; where the kernel is without it, the word is unknown.
    silent = ("addrgenmode", "none") if IPV6.exists() else ()
    run_program("ip", "netns", "add", switch)
    run_program("ip", "-n", switch, "link", "add", "switch", *size, "type", "bridge", "mcast_snooping", "0")
    run_program("ip", "-n", switch, "link", "set", "switch", *silent, "up")
    for node, name in enumerate(made.nodes):
        port = f"port{node}"
        ends = (port, *size, "type", "veth", "peer", "name", NIC, "netns", name)
        run_program("ip", "netns", "add", name)
        _name_hosts(name, node, shape.nodes)
        run_program("ip", "-n", switch, "link", "add", *ends)
        run_program("tc", "-n", name, "qdisc", "add", "dev", NIC, "root", *_limit(shape.nic))
        run_program("tc", "-n", switch, "qdisc", "add", "dev", port, "root", *_limit(shape.nic, shape.latency))
        run_program("ip", "-n", name, "address", "add", f"{_address(node)}/24", "dev", NIC)
        run_program("ip", "-n", name, "link", "set", "lo", "up")
        run_program("ip", "-n", name, "link", "set", NIC, *size, *silent, "gso_max_segs", "1", "up")
        run_program("ip", "-n", switch, "link", "set", port, *silent, "master", "switch", "up")


def _name_hosts(name: str, node: int, nodes: int) -> None:
    """Give addresses names in the namespace `name`: libraries look them up, and there is no server to ask."""
    named = [("127.0.0.1", "localhost"), (_address(node), platform.node())]
    for each in range(nodes):  # the second is how a socket that takes IPv6 too sees the first
        named += [(address, f"node{each}") for address in (_address(each), f"::ffff:{_address(each)}")]
    (HOSTS / name).mkdir(parents=True, exist_ok=True)
    (HOSTS / name / "hosts").write_text("".join(f"{address} {host}\n" for address, host in named))


def _limit(rate: float, latency: float = 0.0) -> tuple[str, ...]:
    """What `tc` is told to keep a rate, and to hold each packet back for `latency`."""
    bits = f"{rate * 8:.0f}bit"
    if latency:
        return "netem", "delay", f"{latency * 1e6:.0f}us", "rate", bits, "limit", str(QUEUE // MTU)
    burst = max(2 * (MTU + HEADER), round(rate * BURST))
    return "tbf", "rate", bits, "burst", str(burst), "limit", str(QUEUE)


def _address(node: int) -> str:
    return f"10.77.0.{node + 1}"


def run_program(*words: str) -> str:
    """Run a program in a group of its own, where Ctrl-C does not reach it. Raises ValueError if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, process_group=0)
    if done.returncode:
        reason = done.stderr.strip() or f"exit code {done.returncode}"
        remedy = "use a machine or container in which root may make network namespaces (docker run --privileged)"
        if "netem" in words and "qdisc" in reason:
            remedy = "this kernel has no netem, which delays packets: load it (modprobe sch_netem), or omit --latency"
        raise ValueError(f"{' '.join(words)}: {reason}; {remedy}")
    return done.stdout


@contextmanager
def _own_number() -> Iterator[int]:
    """Hold the lowest number that no other cluster has."""
    LOCKS.mkdir(exist_ok=True)
    for number in count():
        with ExitStack() as held:
            try:
                held.enter_context(_lock(number))
            except (ValueError, FileNotFoundError):  # another one has it, or is just giving it back
                continue
            yield number
            return


def _remove_leftovers(say: Callable[[str], None]) -> None:
    LOCKS.mkdir(exist_ok=True)
    for number in sorted({int(match[1]) for path in NAMESPACES.glob("*") if (match := _NAME.fullmatch(path.name))}):
        with suppress(ValueError, FileNotFoundError), _lock(number):
            _remove(number)
            say(f"removed what a killed cluster left: the namespaces dovetail-{number}-*")


def _lock(number: int) -> AbstractContextManager[None]:
    return only_process(LOCKS / f"cluster-{number}.lock", f"cluster {number} is another process's")


def _remove(number: int) -> None:
    """Kill what runs in the namespaces of cluster `number`, and delete them; links go with their namespaces.

    Raises OSError if a process does not end, which is said with its number.
    """
    names = [path.name for path in NAMESPACES.glob(f"dovetail-{number}-*")]
    end = time.monotonic() + REMOVAL_SECONDS
    while pids := [int(pid) for name in names for pid in run_program("ip", "netns", "pids", name).split()]:
        if time.monotonic() > end:
            raise OSError(f"processes {pids} in the namespaces dovetail-{number}-* do not end; end them, and run again")
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    for name in names:
        shutil.rmtree(HOSTS / name, ignore_errors=True)
        run_program("ip", "netns", "delete", name)
    with suppress(OSError):  # there was such a folder before, or another cluster has files in it
        HOSTS.rmdir()
