"""The flow simulation beside SimGrid's: the same flows over the same routes in one run, and how far the ends are apart.

SimGrid's time is that of its simulation alone, without making network and routes. Ours is with routing; kernels are
compiled before, which takes some seconds on a machine's first run. Ours is the median of several runs, SimGrid's a
single one right after them; the ratio is of times of the clock, and the processor's stand beside them. SimGrid is
stopped at a limit, and the ratio is then the least that it can be.

Flows of equal size that start together are shared out once here, and for these the claim is that SimGrid takes at least
100 times as long on 512 hosts. Where sizes differ, each flow has an end of its own that changes the rates of others,
here as there: those cases are there to show it and have no limit.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import typer

FABRIC = "ft2"  # two layers of 64-port switches
SIZE = 1e9  # bytes of a flow
LEAST = 100.0  # times slower
AGREEMENT = 0.01  # relative, of the time until all flows have ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    hosts: int
    policy: str  # static, ecmp
    others: int | None = None  # that each host sends to, drawn; None: all
    has_equal_sizes: bool = True


CASES = (
    *(Case(name="all-to-all, static", hosts=hosts, policy="static") for hosts in (64, 128, 256, 512)),
    *(Case(name="all-to-all, ECMP", hosts=hosts, policy="ecmp") for hosts in (64, 128, 256, 512)),
    Case(name="to 16 others, ECMP", hosts=512, policy="ecmp", others=16),
    Case(name="to 16 others, ECMP, 1 to 3 GB", hosts=512, policy="ecmp", others=16, has_equal_sizes=False),
    Case(name="to 1 other, ECMP, 1 to 3 GB", hosts=512, policy="ecmp", others=1, has_equal_sizes=False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ours:
    route_s: float
    simulate_s: float
    cpu_s: float  # of both

    @property
    def seconds(self) -> float:
        return self.route_s + self.simulate_s


def measure(case: Case, repeats: int) -> tuple[list[Ours], np.ndarray, dict[str, Any]]:
    """Our times, our ends, and the demand for SimGrid."""
    from _ask_simgrid import on_routes, without_latency

    from dovetail.catalog.fabrics import load_fabric
    from dovetail.network.fabric.topology import build
    from dovetail.network.flows.simulation import simulate
    from dovetail.network.routing.route import Ecmp, Static, route

    fabric = build(load_fabric(FABRIC, case.hosts))
    flows = flows_of(case)
    policy = Static() if case.policy == "static" else Ecmp()
    laps = []
    for _ in range(1 + repeats):  # the first one compiles
        begun, cpu = time.perf_counter(), time.process_time()
        routes = without_latency(route(fabric, flows, policy))
        routed = time.perf_counter()
        outcome = simulate(fabric.capacity, flows, routes)
        done, done_cpu = time.perf_counter(), time.process_time()
        laps.append(Ours(route_s=routed - begun, simulate_s=done - routed, cpu_s=done_cpu - cpu))
    return laps[1:], outcome.end, on_routes(fabric.capacity, flows, routes)


def flows_of(case: Case) -> Any:
    from dovetail.network.demands.collectives import all_to_all
    from dovetail.network.flows.flows import Flows

    if case.others is None:
        return all_to_all(range(case.hosts), case.hosts * SIZE).steps[0].flows
    random = np.random.default_rng(0)
    away = [1 + random.choice(case.hosts - 1, case.others, replace=False) for _ in range(case.hosts)]
    source = np.repeat(np.arange(case.hosts), case.others)
    size = SIZE if case.has_equal_sizes else np.rint(random.uniform(1, 3, len(source)) * SIZE)
    return Flows.of(source, (source + np.concatenate(away)) % case.hosts, size)


def compare(case: Case, repeats: int, limit: float) -> dict[str, Any]:
    from _ask_simgrid import ask_simgrid
    from _sides import progress

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        laps, ends, demand = pool.apply(measure, (case, repeats))
    middle = sorted(laps, key=lambda lap: lap.seconds)[len(laps) // 2]
    row = {
        **asdict(case),
        "fabric": FABRIC,
        "flows": len(ends),
        **asdict(middle),
        "total_s": [lap.seconds for lap in laps],
        "predicted_s": float(ends.max()),
    }
    progress(f"{case.name}, {case.hosts} hosts: ours {middle.seconds:.4f} s")
    try:
        theirs = ask_simgrid(demand, limit)
    except subprocess.TimeoutExpired:
        return {**row, "simgrid_stopped_s": limit, "ratio": limit / middle.seconds}
    return {
        **row,
        **{f"simgrid_{name}": value for name, value in asdict(theirs).items() if name != "end"},
        "ratio": theirs.run_s / middle.seconds,
        "apart": float(abs(theirs.end.max() / ends.max() - 1)),
        "ends_apart": float(np.abs(theirs.end / ends - 1).max()),
    }


def failure(row: dict[str, Any]) -> str | None:
    where = f"{row['name']}, {row['hosts']} hosts"
    if row.get("apart", 0.0) > AGREEMENT:
        return f"{where}: times {row['apart']:.1%} apart"
    if row["hosts"] == max(case.hosts for case in CASES) and row["has_equal_sizes"] and row["ratio"] < LEAST:
        return f"{where}: SimGrid {row['ratio']:.0f} times slower, not {LEAST:.0f}"
    return None


def main(
    repeats: Annotated[int, typer.Option(help="Runs of ours; the median of their times is taken.")] = 5,
    limit: Annotated[float, typer.Option(help="Seconds after which SimGrid is stopped, in each case.")] = 1800.0,
    hosts: Annotated[list[int] | None, typer.Option(help="Only the cases of so many hosts.")] = None,
    record: bool = True,
) -> None:
    from _ask_simgrid import MISSING, is_installed
    from _sides import append_rows, print_table

    if not is_installed():
        sys.exit(MISSING)
    rows = [compare(case, repeats, limit) for case in CASES if not hosts or case.hosts in hosts]
    heads = [
        "flows of equal size, or drawn",
        "hosts",
        "flows",
        "ours s",
        "CPU s",
        "SimGrid s",
        "CPU s",
        "ratio",
        "apart",
    ]
    print_table(heads, [line(row) for row in rows])
    if record:
        append_rows("network_simgrid", rows)
    failures = [text for row in rows if (text := failure(row))]
    if failures:
        sys.exit("\n".join(failures))


def line(row: dict[str, Any]) -> list[str]:
    ours = [f"{row['route_s'] + row['simulate_s']:.4f}", f"{row['cpu_s']:.4f}"]
    cells = [row["name"], str(row["hosts"]), str(row["flows"]), *ours]
    if "simgrid_stopped_s" in row:
        return [*cells, f"> {row['simgrid_stopped_s']:.0f}", "", f"> {row['ratio']:.0f}", ""]
    return [
        *cells,
        f"{row['simgrid_run_s']:.2f}",
        f"{row['simgrid_run_cpu_s']:.2f}",
        f"{row['ratio']:.0f}",
        f"{row['ends_apart']:.1e}",
    ]


if __name__ == "__main__":
    typer.run(main)
