"""The ranks of a benchmark: a process each, joined by gloo.

    Ranks        stay on this machine and take a turn together when they are told to
    in_cluster   run a function on each rank of a cluster of limited links, and give back what rank 0 made

In both, `timed_together` is how long the slowest rank took. Run as a program it is a rank of a cluster.
"""

from __future__ import annotations

import inspect
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _sides import Build, Case, Lap, Turn, serve, timed

from dovetail import threads
from dovetail.cluster.launch import Streams
from dovetail.cluster.run import run
from dovetail.cluster.shape import Shape
from dovetail.numerics.cpu.process import settle_process

START_SECONDS = 60.0


class Ranks:
    """Processes with `cores` threads each, in which `build` was called; while nobody takes a turn they sleep."""

    def __init__(self, build: Build, count: int, cores: int = 1) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        for name in threads.SETTINGS:
            os.environ.pop(name, None)
        os.environ |= {"OMP_NUM_THREADS": str(cores), "GOMP_SPINCOUNT": str(threads.SPINS)}  # as the command line does
        for rank in range(count):
            ours, theirs = context.Pipe()
            joined = partial(_join, build, rank, count, f"file://{self._folder.name}/store")
            self._processes.append(context.Process(target=serve, args=(joined, theirs), daemon=True))
            self._processes[-1].start()
            theirs.close()  # so that a rank that died is an EOFError here
            self._pipes.append(ours)
        for pipe in self._pipes:
            pipe.recv()

    def turn(self, case: Case) -> Lap:
        """What rank 0 says, with the seconds of the slowest."""
        for pipe in self._pipes:
            pipe.send(case)
        laps = [pipe.recv() for pipe in self._pipes]
        first: Lap = laps[0]
        return replace(first, seconds=[max(each) for each in zip(*(lap.seconds for lap in laps), strict=True)])

    def stop(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(START_SECONDS)
        self._folder.cleanup()


def _join(build: Build, rank: int, count: int, store: str) -> Turn:
    settle_process()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
    return build()


def timed_together(work: Callable[[], float]) -> Lap:
    """One repetition, which all ranks begin together."""
    dist.barrier()
    lap = timed(work)
    slowest = torch.tensor(lap.seconds, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return replace(lap, seconds=slowest.tolist())


def link_rate(size: int = 4_000_000, repeats: int = 3) -> float:
    """On a rank of a cluster: bytes per second that a node's link carries in each direction at once, while each rank
    exchanges `size` bytes with one of another node."""
    peer = (dist.get_rank() + dist.get_world_size() // 2) % dist.get_world_size()
    sent, came = torch.zeros(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)

    def exchange() -> float:
        for work in (dist.irecv(came, peer), dist.isend(sent, peer)):
            if work is not None:
                work.wait()
        return 0.0

    exchange()  # the first one connects
    seconds = statistics.median(timed_together(exchange).seconds[0] for _ in range(repeats))
    return size * int(os.environ["LOCAL_WORLD_SIZE"]) / seconds


def in_cluster(function: Callable[..., Any], settings: Mapping[str, Any], shape: Shape) -> Any:
    """Call `function(**settings)`, of a module in this folder, on each rank; what rank 0's returns is JSON, as settings
    are. Raises RuntimeError where a rank fails."""
    module = Path(inspect.getfile(function)).stem
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        words = [f"{module}:{function.__name__}", json.dumps(dict(settings)), str(answer)]
        outcome = run([sys.executable, __file__, *words], shape, Streams(sys.stdout, sys.stderr))
        if outcome.failure is not None:
            raise RuntimeError(f"{module}.{function.__name__}: {outcome.failure}")
        return json.loads(answer.read_text())


def _be_rank(target: str, settings: str, answer: str) -> None:
    settle_process()
    dist.init_process_group("gloo")
    module, _, name = target.partition(":")
    found = getattr(import_module(module), name)(**json.loads(settings))
    if dist.get_rank() == 0:
        Path(answer).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    _be_rank(*sys.argv[1:])
