"""Runs a command on a cluster inside this machine, and counts what went over each link."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass

from dovetail.cluster.counters import Counts, read_counts
from dovetail.cluster.launch import Failure, Streams, launch, stop_signals
from dovetail.cluster.links import check, links
from dovetail.cluster.shape import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    shape: Shape
    counts: dict[tuple[int, str], Counts]  # by node and interface
    started: float  # seconds since 1970
    seconds: float
    failure: Failure | None


def run(command: Sequence[str], shape: Shape, streams: Streams) -> Outcome:
    """Run `command` once per rank, and return what the interfaces counted meanwhile.

    Whatever happens, no namespace, link or process is left. Raises ValueError where there is no such command, or this
    process may not make links; Interrupted on Ctrl-C, SIGTERM and SIGHUP.
    """
    check()
    if shutil.which(command[0]) is None:
        raise ValueError(f"{command[0]}: no such command, and no run file (.toml)")
    streams.say(describe(shape))
    with stop_signals() as signals, links(shape, streams.say) as made:
        before = read_counts(made)
        started, start = time.time(), time.monotonic()
        failure = launch(command, shape, made, signals, streams)
        seconds = time.monotonic() - start
        after = read_counts(made)
    counts = {key: after[key].since(before[key]) for key in after}
    return Outcome(shape=shape, counts=counts, started=started, seconds=seconds, failure=failure)


def describe(shape: Shape) -> str:
    """Return what is started, in a line."""
    latency = f" and {shape.latency * 1e3:g} ms" if shape.latency else ""
    return (
        f"{shape.nodes} nodes x {shape.ranks} ranks, {shape.nic * 8 / 1e6:g} Mbit/s{latency} between nodes each way; "
        f"each rank has {shape.threads} of the machine's threads (OMP_NUM_THREADS)"
    )
