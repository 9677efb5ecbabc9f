"""Sides of a comparison, each in a process of its own, measured in turn: A B C, B C A, ...

A process each, because allocator settings, thread pools and primitive caches belong to a process; in turn,
because the machine's speed drifts by more than the differences looked for. While one runs, the others wait on a
pipe. A ratio is the median over rounds of the two times of one round.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from _machine import provenance

from dovetail import threads

RESULTS = Path(__file__).parent / "results"

Case = tuple[int, ...]  # shape of one measurement; what the numbers mean is the script's business


@dataclass(frozen=True, slots=True, kw_only=True)
class Lap:
    """One turn of one side."""

    seconds: list[float]  # one entry per repetition inside the turn
    check: float  # a number both sides compute: tells whether they did the same work


Turn = Callable[[Case], Lap]
Build = Callable[[], Turn]  # called inside the side's process; must pickle (a function or a partial of one)


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """The laps of one side in one case."""

    laps: list[Lap]

    @property
    def seconds(self) -> list[float]:
        return [second for lap in self.laps for second in lap.seconds]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def summary(self) -> dict[str, Any]:
        return {
            "median_s": round(self.median, 6),
            "min_s": round(min(self.seconds), 6),
            "max_s": round(max(self.seconds), 6),
            "repeats": len(self.seconds),
            "rounds": len(self.laps),
            "check": round(self.laps[0].check, 4),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """How many times slower the other side is."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}-{self.high:.2f})"


def ratio(slower: Series, faster: Series) -> Ratio:
    pairs = zip(slower.laps, faster.laps, strict=True)
    values = [statistics.median(a.seconds) / statistics.median(b.seconds) for a, b in pairs]
    return Ratio(median=statistics.median(values), low=min(values), high=max(values))


def take_turns(
    builds: Mapping[str, Build],
    cases: Sequence[Case],
    warmup: int,
    repeats: int,
    environments: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[tuple[str, Case], Series]:
    """Laps of every side in every case, the first `warmup` rounds left out.

    `environments` are settings of OpenMP for each side's process, which has no others.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    workers = []
    for name, build in builds.items():
        pipes[name], theirs = context.Pipe()
        workers.append(context.Process(target=serve, args=(build, theirs), daemon=True))
        if environments is not None:
            for setting in threads.SETTINGS:
                os.environ.pop(setting, None)
            os.environ.update(environments[name])
        workers[-1].start()
        theirs.close()  # so that a side that died is an EOFError here, not a wait for ever
    for name, pipe in pipes.items():
        pipe.recv()
        progress(f"{name}: ready")
    results: dict[tuple[str, Case], Series] = {}
    for case in cases:
        found = in_rounds({name: partial(_ask, pipe, case) for name, pipe in pipes.items()}, warmup, repeats, str(case))
        results |= {(name, case): series for name, series in found.items()}
    for pipe in pipes.values():
        pipe.send(None)
    for worker in workers:
        worker.join()
    return results


def in_rounds(turns: Mapping[str, Callable[[], Lap]], warmup: int, repeats: int, label: str = "") -> dict[str, Series]:
    """Laps of every side, the first `warmup` rounds left out. Without a label it runs silently."""
    laps: dict[str, list[Lap]] = {name: [] for name in turns}
    order = list(turns)
    for round_index in range(warmup + repeats):
        start = time.perf_counter()
        first = round_index % len(order)  # every side comes first at times: who precedes leaves its mark on caches
        for name in order[first:] + order[:first]:
            lap = turns[name]()
            if round_index >= warmup:
                laps[name].append(lap)
        if label:
            progress(f"{label} round {round_index + 1}/{warmup + repeats}: {time.perf_counter() - start:.1f} s")
    return {name: Series(laps=found) for name, found in laps.items()}


def _ask(pipe: Connection, case: Case) -> Lap:
    pipe.send(case)
    lap: Lap = pipe.recv()
    return lap


def serve(build: Build, pipe: Connection) -> None:
    """In the side's process: build, then take turns until told to end."""
    turn = build()
    pipe.send("ready")
    while (case := pipe.recv()) is not None:
        pipe.send(turn(case))


def timed(work: Callable[[], float]) -> Lap:
    """One repetition; `work` returns the check."""
    start = time.perf_counter()
    check = work()
    return Lap(seconds=[time.perf_counter() - start], check=check)


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """First column to the left, the others to the right."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells]).rstrip())


def append_rows(benchmark: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append to results/BENCHMARK.jsonl, one line per row, each with its provenance."""
    where = provenance()
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{benchmark}.jsonl").open("a") as file:
        for row in rows:
            file.write(json.dumps({"benchmark": benchmark, **row, **where}) + "\n")
