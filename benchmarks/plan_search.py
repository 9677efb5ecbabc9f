"""How long a training plan takes: DeepSeek-V3's own layout on its cluster, and the search over all layouts there.

Every round is a process of its own, since costs of operations are kept within one: the first plan pays for them, the
next ones find them; the search then runs in another process and finds nothing. Imports and files read are not in these
times. Seconds of the processor stand beside those of the clock; with other work on the machine only they are worth
something. The limits are 20 s for the search on two cores and 50 ms for a plan.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import typer
from _sides import append_rows, print_table, progress

from dovetail.catalog.hardware import load_cluster
from dovetail.catalog.precision import load_recipe
from dovetail.catalog.presets import load_model
from dovetail.planner.training.chunks import Workload
from dovetail.planner.training.plan import TrainingGoal, TrainingPlan, evaluate
from dovetail.planner.training.search import Found, search
from dovetail.spec.layout import Layout

MODEL, CLUSTER, GOAL = "deepseek-v3", "h800-2048", TrainingGoal(batch=15360)
LAYOUT = Layout(pp=16, ep=64, dp=128, microbatches=120, schedule="dualpipe")  # [V3 §3.2]
SEQUENCE_LENGTH = 4096
LIMITS = {"first plan": 0.05, "next plan": 0.05, "search": 20.0}  # seconds

Times = tuple[float, float]  # of the clock, of the processor


def work() -> Workload:
    return Workload(
        spec=load_model(MODEL),
        cluster=load_cluster(CLUSTER),
        layout=LAYOUT,
        recipe=load_recipe("deepseek-v3"),
        sequence_length=SEQUENCE_LENGTH,
    )


def plan_times() -> dict[str, Times]:
    """The first plan of a process, and one after it of another layout."""
    own = work()
    other = replace(own, layout=LAYOUT.model_copy(update={"ep": 32}))
    _, first = timed(lambda: evaluate(own, GOAL))
    _, following = timed(lambda: evaluate(other, GOAL))
    return {"first plan": first, "next plan": following}


def search_times() -> tuple[Times, int, int, float]:
    """With the layouts tried and fitting, and the best one's seconds of a step: a check of equal work."""
    own = work()
    found, times = timed(lambda: search(own, GOAL))
    assert isinstance(found, Found)
    return times, found.tried, found.fitting, found.plans[0].step_seconds.value


def timed(run: Callable[[], TrainingPlan | Found]) -> tuple[TrainingPlan | Found, Times]:
    clock, processor = time.perf_counter(), time.process_time()
    result = run()
    return result, (time.perf_counter() - clock, time.process_time() - processor)


def main(
    repeats: Annotated[int, typer.Option(help="Rounds, each in processes of its own.")] = 5,
    record: bool = True,
) -> None:
    laps: dict[str, list[Times]] = {name: [] for name in LIMITS}
    tried = fitting = 0
    best = 0.0
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for index in range(repeats):
            for name, times in pool.apply(plan_times).items():
                laps[name].append(times)
            times, tried, fitting, best = pool.apply(search_times)
            laps["search"].append(times)
            progress(f"round {index + 1}: search {times[0]:.1f} s")
    print(f"{MODEL} on {CLUSTER}: {tried} layouts, {fitting} fit; the best step takes {best:.2f} s")
    lines, rows = [], []
    for name, measured in laps.items():
        clock, processor = (statistics.median(each) for each in zip(*measured, strict=True))
        slowest = max(each for each, _ in measured)
        lines.append([name, *(f"{1e3 * each:.1f}" for each in (clock, slowest, processor, LIMITS[name]))])
        row = {"what": name, "median_s": clock, "max_s": slowest, "median_cpu_s": processor, "repeats": repeats}
        rows.append({**row, "limit_s": LIMITS[name], "layouts": tried, "fitting": fitting, "best_step_s": best})
    print_table(["", "median ms", "slowest", "processor", "limit"], lines)
    if record:
        append_rows("plan_search", rows)


if __name__ == "__main__":
    typer.run(main)
