"""All-to-all in the flow simulation: every flow hashed for itself, and at full size folded by symmetry or told from the
loads of links.

Each case runs in a process of its own, so that its peak of memory is its own; kernels are compiled before (the first
run on a machine takes some seconds more). The time of an all-to-all of equal flows has a closed form, the busiest
link's bytes over its capacity and the latency; a row says how far the simulation is from it. The folded case is also
run whole where that fits, and must agree.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dovetail.network.fabric.topology import Fabric
    from dovetail.network.flows.simulation import Change

SIZE = 2e9  # bytes per rank; of hundreds of thousands more, or posting messages is what takes longest
GIBIBYTE = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    fabric: str
    gpus: int
    policy: str  # ecmp, adaptive, static; folded; loads, without flows
    failure: str = ""  # a part, or a share of the cables
    limit_seconds: float
    limit_gib: float = 2.0
    size: float = SIZE


CASES = (
    Case(name="two layers, ECMP per flow", fabric="ft2", gpus=2048, policy="ecmp", limit_seconds=10),
    Case(name="eight planes, ECMP per flow", fabric="mpft", gpus=2048, policy="ecmp", limit_seconds=10),
    Case(name="eight planes, sprayed", fabric="mpft", gpus=2048, policy="adaptive", limit_seconds=10),
    Case(name="eight planes, sprayed, folded", fabric="mpft", gpus=2048, policy="folded", limit_seconds=10),
    Case(name="eight planes, sprayed, folded", fabric="mpft", gpus=16384, policy="folded", limit_seconds=60),
    Case(name="and a plane lost", fabric="mpft", gpus=16384, policy="folded", failure="plane:3", limit_seconds=60),
    Case(name="and 1 % of the cables", fabric="mpft", gpus=16384, policy="folded", failure="1%", limit_seconds=60),
    Case(name="three layers, from loads", fabric="ft3", gpus=65536, policy="loads", limit_seconds=60),
    Case(name="slim fly, from loads", fabric="slim-fly", gpus=30616, policy="loads", limit_seconds=60),
    Case(name="dragonfly, from loads", fabric="dragonfly", gpus=261632, policy="loads", limit_seconds=60, size=64e9),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    build_s: float
    route_s: float
    simulate_s: float
    cpu_s: float  # of all three; less than their sum where others share the machine
    peak_gib: float
    flows: float  # simulated or stood for
    simulated: int
    predicted_s: float  # the collective's time
    from_bound: float  # relative, of the busiest link's bytes over its capacity, latency aside


def measure(case: Case) -> Measured:
    from dovetail.catalog.fabrics import load_fabric
    from dovetail.network.delivery.loads import all_to_all_loads
    from dovetail.network.delivery.symmetry import folded_all_to_all, simulate_folded
    from dovetail.network.demands.collectives import all_to_all
    from dovetail.network.fabric.topology import build
    from dovetail.network.flows.simulation import simulate
    from dovetail.network.routing.route import Adaptive, Ecmp, Static, route

    small = build(load_fabric(case.fabric, 64))
    flows = all_to_all(range(64), SIZE).steps[0].flows
    simulate(small.capacity, flows, route(small, flows, Adaptive()))  # compiles
    all_to_all_loads(build(load_fabric("ft2", 64)), 64)

    begun, cpu = time.perf_counter(), time.process_time()
    fabric = build(load_fabric(case.fabric, case.gpus))
    built = time.perf_counter()
    if case.policy == "folded":
        changes = changes_of(fabric, case.failure)
        folded = folded_all_to_all(fabric, case.size, changes)
        routed = time.perf_counter()
        outcome = simulate_folded(fabric, folded, changes)  # routes, too
        done = time.perf_counter()
        seconds, count, carried, latency = outcome.seconds, folded.counts.sum(), outcome.link_bytes, 0.0
        flows = folded.flows
    elif case.policy == "loads":
        routed = time.perf_counter()
        loads = all_to_all_loads(fabric, case.gpus)
        assert loads is not None
        done = time.perf_counter()
        part = case.size / case.gpus
        seconds, count, flows = loads.seconds(part), case.gpus * (case.gpus - 1.0), ()
        carried, latency = loads.link_flows * part, loads.path_seconds
    else:
        flows = all_to_all(range(case.gpus), case.size).steps[0].flows
        routes = route(fabric, flows, {"ecmp": Ecmp(), "adaptive": Adaptive(), "static": Static()}[case.policy])
        routed = time.perf_counter()
        outcome = simulate(fabric.capacity, flows, routes)
        done = time.perf_counter()
        seconds, count, carried = outcome.seconds, len(flows), outcome.link_bytes
        latency = float(routes.latency.max())
    cpu = time.process_time() - cpu
    bound = (carried / fabric.capacity).max()
    return Measured(
        build_s=built - begun,
        route_s=routed - built,
        simulate_s=done - routed,
        cpu_s=cpu,
        peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIBIBYTE,
        flows=float(count),
        simulated=len(flows),
        predicted_s=seconds,
        from_bound=float((seconds - latency) / bound - 1),
    )


def changes_of(fabric: Fabric, failure: str) -> list[Change]:
    from dovetail.network.flows.failures import parse_failure, random_links
    from dovetail.network.flows.simulation import Change

    if failure.endswith("%"):
        return [Change(seconds=0.0, links=random_links(fabric, float(failure[:-1]) / 100))]
    return [parse_failure(failure, fabric)] if failure else []


def main(
    repeats: Annotated[int, typer.Option(help="Runs of each case; the median of its times is taken.")] = 3,
    record: bool = True,
) -> None:
    rows, lines, failures = [], [], []
    for case in CASES:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            runs = [pool.apply(measure, (case,)) for _ in range(repeats)]
        middle = sorted(runs, key=total)[len(runs) // 2]
        if total(middle) > case.limit_seconds or middle.peak_gib > case.limit_gib:
            failures.append(f"{case.name}, {case.gpus} GPUs: over {case.limit_seconds} s or {case.limit_gib} GiB")
        times = [
            f"{each:.2f}" for each in (middle.build_s, middle.route_s, middle.simulate_s, total(middle), middle.cpu_s)
        ]
        cells = [
            f"{middle.simulated:,}",
            *times,
            f"{middle.peak_gib:.2f}",
            f"{middle.predicted_s * 1e3:.4f}",
            f"{middle.from_bound:.1e}",
        ]
        lines.append([case.name, str(case.gpus), f"{middle.flows:.3g}", *cells])
        rows.append({"case": case.name, "gpus": case.gpus, **asdict(middle), "total_s": [total(run) for run in runs]})
    # Not above: a case's process would load it, and torch with it.
    from _sides import append_rows, print_table

    heads = [
        "case",
        "GPUs",
        "flows",
        "simulated",
        "build s",
        "route s",
        "simulate s",
        "all s",
        "CPU s",
        "GiB",
        "time ms",
        "from bound",
    ]
    print_table(heads, lines)
    if record:
        append_rows("network_flows", rows)
    if failures:
        sys.exit("\n".join(failures))


def total(measured: Measured) -> float:
    return measured.build_s + measured.route_s + measured.simulate_s


if __name__ == "__main__":
    typer.run(main)
