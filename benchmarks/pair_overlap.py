"""A training step with pairs overlapped and not, where exchanges with experts take about as long as arithmetic.

In a pair a forward and a backward take turns: while the rows of one are on their way to experts or back, the other
computes (`parallel.turns`). Two ranks share the experts, each on a node of its own, in a cluster whose links are as
slow as it takes: first a step is measured on fast links, and its bytes are counted, then the rate is chosen so that
these bytes need as long as that step (`--exchange 1`), by what a plain exchange reaches at that rate. Both ways to run
a step then take turns on that link. "waits" are what rank 0 waits for exchanges without overlap, by what it computes.

Layouts: DualPipeV on one rank of a pipeline, which has both ends of the V, with two ranks of experts: each rank has a
core of a two-core machine. DualPipe on two ranks of a pipeline with two of experts: four ranks. On two cores these
share cores, so that one stage computes on two while the other one waits; that hides a part without any overlap.

Exposed is the share of a step beyond the one on fast links. Beside it stands what the planner's replay says
(`planner.training.chunks.pair_seconds`, and `timeline.replay`), fed with the pieces of rank 0's forwards and backwards
as measured without overlap. Needs root, for network namespaces.

Bar: a step gets at least 1.3 times faster (the limit is 2), and the replay's step is within 10 % of the measured one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from _pieces import medians, noted, replayed, share_of_waits
from _ranks import in_cluster, link_rate, timed_together
from _sides import Lap, Series, append_rows, in_rounds, print_table, progress, ratio
from schedules import Work, aims

from dovetail.cluster.shape import Shape, parse_rate
from dovetail.cost.memory.stages import stages
from dovetail.model.transformer import initialize
from dovetail.parallel.experts.dispatch import OneHop
from dovetail.parallel.mesh import form_mesh
from dovetail.parallel.part import take_part
from dovetail.parallel.pipeline.pipeline import Pipeline, build_stages
from dovetail.parallel.schedules.pipelines import make_schedule
from dovetail.spec.family import Dial, dovetail_spec
from dovetail.spec.layout import Layout

EP = 2
ON, OFF = "overlapped", "one after the other"
LAYOUTS = {"dualpipev": 1, "dualpipe": 2}  # ranks of a pipeline
FAST = "20Gbit"
WATCHED = 2  # steps in which pieces are noted


def work_of(pp: int, settings: dict[str, int]) -> Work:
    spec = dovetail_spec(Dial(width=settings["width"], layers=settings["layers"], mtp_depth=0))
    microbatches, length = settings["microbatches"], settings["length"]
    return Work(spec=spec, ranks=pp, microbatches=microbatches, length=length, dtype=torch.bfloat16)


def on_rank(schedule: str, settings: dict[str, int], warmup: int, repeats: int) -> dict[str, Any]:
    """Laps of both ways; the bytes that the busiest rank sends to the other one's experts, and all that it sends; the
    pieces of rank 0's halves."""
    pp = LAYOUTS[schedule]
    work, layout = work_of(pp, settings), layout_of(schedule, settings)
    mesh = form_mesh(layout, ranks_per_node=1)
    scheduled = make_schedule(schedule, pp, work.microbatches)
    models = build_stages(work.spec, stages(work.spec, layout, work.length), scheduled.held_by(mesh.pp.index))
    dispatcher = OneHop(mesh)  # with one rank on each node two hops would be the same
    for model in models.values():
        initialize(model, 0)
        take_part(model, mesh, dispatcher)
    batches, aim = work.batches(mesh.dp.index), aims(work)
    pipelines = {name: Pipeline(models, scheduled, mesh, is_overlapped=name == ON) for name in (ON, OFF)}
    made = [pipeline.run(batches, aim).gradients for pipeline in pipelines.values()]
    if not all(torch.equal(made[0][name], made[1][name]) for name in made[1]):
        raise ValueError(f"{schedule}: overlapped gradients are not those of the plain step")
    sent = torch.tensor([dispatcher.traffic.nic // 2, pipelines[ON].traffic.nic])  # both have run once
    dist.all_reduce(sent, op=dist.ReduceOp.MAX)
    turns: dict[str, Callable[[], Lap]] = {}
    for name, pipeline in pipelines.items():
        turns[name] = partial(timed_together, partial(_step, pipeline, batches, aim))
    found = in_rounds(turns, warmup, repeats, "" if mesh.rank else schedule)
    with noted() as marks:
        for _ in range(WATCHED):
            timed_together(partial(_step, pipelines[OFF], batches, aim))
    laps = {name: [asdict(lap) for lap in series.laps] for name, series in found.items()}
    return {"laps": laps, "sent": sent.tolist(), "pieces": medians(marks)}


def _step(pipeline: Pipeline, batches: Any, aim: Any) -> float:
    reports = pipeline.run(batches, aim).reports
    return sum(float(each) for each in reports.values() if isinstance(each, torch.Tensor))


def layout_of(schedule: str, settings: dict[str, int]) -> Layout:
    fields = {"pp": LAYOUTS[schedule], "dp": EP, "ep": EP, "schedule": schedule}
    return Layout.model_validate({**fields, "microbatches": settings["microbatches"]})


def main(
    schedule: Annotated[list[str], typer.Option(help="dualpipev or dualpipe; may be repeated.")] = list(LAYOUTS),  # noqa: B006
    exchange: Annotated[float, typer.Option(help="Seconds that bytes need, by those of a step on fast links.")] = 1.0,
    width: int = 256,
    layers: int = 6,
    microbatches: int = 8,
    length: int = 512,
    warmup: int = 1,
    repeats: int = 7,
    record: bool = True,
) -> None:
    settings = {"width": width, "layers": layers, "microbatches": microbatches, "length": length}
    found = {name: measure(name, settings, exchange, warmup, repeats) for name in schedule}
    print(f"{layers} layers of {width}, {microbatches} micro-batches of {length} tokens a rank; links of one rank each")
    report(found, settings, record)


def measure(schedule: str, settings: dict[str, int], exchange: float, warmup: int, repeats: int) -> dict[str, Any]:
    """What rank 0 says on the slow link; the seconds of a step on fast ones; the link's rate, and what it carries."""
    nodes = LAYOUTS[schedule] * EP
    call = {"schedule": schedule, "settings": settings, "warmup": warmup}
    fast = in_cluster(on_rank, {**call, "repeats": 3}, Shape(nodes=nodes, ranks=1, nic=parse_rate(FAST)))
    alone, sent = series_of(fast)[OFF].median, sum(fast["sent"])
    wanted = sent / (alone * exchange)
    reached = in_cluster(link_rate, {}, Shape(nodes=nodes, ranks=1, nic=wanted))
    rate = wanted * wanted / reached
    progress(f"{schedule}: {alone:.2f} s on fast links, {sent / 1e6:.1f} MB a rank: {rate * 8 / 1e6:.0f} Mbit/s")
    slow = in_cluster(on_rank, {**call, "repeats": repeats}, Shape(nodes=nodes, ranks=1, nic=rate))
    return {**slow, "alone": alone, "rate": rate, "carried": wanted}


def report(answers: dict[str, dict[str, Any]], settings: dict[str, int], record: bool) -> None:
    lines, rows = [], []
    for schedule, answer in answers.items():
        found, pieces, alone = series_of(answer), answer["pieces"], answer["alone"]
        scheduled = make_schedule(schedule, LAYOUTS[schedule], settings["microbatches"])
        send = 2 * settings["width"] * settings["length"] / answer["carried"]
        steps = {side: replayed(pieces, scheduled, send, is_overlapped=side == ON) for side in (ON, OFF)}
        gain, waits = ratio(found[OFF], found[ON]), share_of_waits(pieces)
        for side, series in found.items():
            cells = [f"{answer['rate'] * 8 / 1e6:.0f}", f"{alone * 1e3:.0f}", f"{waits:.2f}"]
            cells += [f"{series.median * 1e3:.0f}", f"{1 - alone / series.median:.0%}"]
            cells += [f"{steps[side] * 1e3:.0f}", f"{1 - alone / steps[side]:.0%}"]
            cells += [f"{steps[side] / series.median - 1:+.1%}", str(gain) if side == ON else ""]
            lines.append([f"{schedule}, {side}", *cells])
        row = {"schedule": schedule, "pp": LAYOUTS[schedule], "ep": EP, **settings, "nic_bytes_per_s": answer["rate"]}
        row |= {"fast_s": alone, "waits": waits, "sent_to_experts_and_stages": answer["sent"], "gain": asdict(gain)}
        sides = {side: series.summary() for side, series in found.items()}
        rows.append({**row, "replayed_s": steps, "sides": sides})
    columns = ["", "Mbit/s", "fast ms", "waits", "ms", "exposed", "replayed ms", "exposed", "off by", "gain"]
    print_table(columns, lines)
    if record:
        append_rows("pair_overlap", rows)


def series_of(answer: dict[str, Any]) -> dict[str, Series]:
    return {name: Series(laps=[Lap(**lap) for lap in laps]) for name, laps in answer["laps"].items()}


if __name__ == "__main__":
    typer.run(main)
