"""The verbs `quickstart`, `train`, `cluster` and `compare`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from dovetail.cli.options import flat
from dovetail.printing import announce_compilation, print_json, print_table

app = typer.Typer()
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def quickstart(
    minutes: Annotated[float, typer.Option(min=1.2, help="Wall-clock minutes for all stages together.")] = 5.0,
    out: Annotated[Path | None, typer.Option(help="Directory of the run [default: quickstart-<minutes>min].")] = None,
) -> None:
    """Train on Python's own library, evaluate, export, generate; the same command continues a stopped run."""
    from dovetail.quickstart import quickstart as stages

    announce_compilation()
    for title, rows in stages(out or Path(f"quickstart-{minutes:g}min"), minutes):
        print_table(f"\n{title}", ("",) * max(map(len, rows)), rows)


@app.command()
def train(
    run: Annotated[Path, typer.Argument(help="A run file (TOML).")],
    change: Annotated[list[str] | None, typer.Option("--set", help="Override a key, such as train.steps=200.")] = None,
    accept_changed_text: Annotated[
        bool, typer.Option("--accept-changed-text", help="Go on though the text changed since the checkpoint.")
    ] = False,
) -> None:
    """Train from a run file, or continue where the run was stopped."""
    from dovetail.config import load_toml
    from dovetail.train.run.loop import train as run_training
    from dovetail.train.run.run_file import RunConfig

    announce_compilation()
    state = run_training(load_toml(run, RunConfig, change or ()), accept_changed_text=accept_changed_text)
    out = state.config.out
    if int(os.environ.get("RANK", "0")) > 0:  # torchrun sets it; one rank prints for all
        return
    print(f"trained {state.num_steps} steps; complete text with: dovetail generate {out} --prompt TEXT")
    print(f"export the weights with: dovetail export {out} OUT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """What a cluster is made of."""

    nodes: Annotated[int, typer.Option(help="Nodes, each a network namespace.")] = 2
    ranks: Annotated[int, typer.Option(help="Ranks of each node.")] = 1
    nic: Annotated[str, typer.Option(help="Rate of each node's link, in each direction.")] = "1Gbit"
    latency: Annotated[str, typer.Option(help="Delay from node to node, such as 0.2ms.")] = "0ms"


@app.command()
@flat
def cluster(
    what: Annotated[list[str], typer.Argument(metavar="RUN.toml | -- COMMAND...", help="What each rank runs.")],
    machines: Machines,
    change: Annotated[list[str] | None, typer.Option("--set", help="Override a key of the run file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; ranks then write to stderr.")] = False,
) -> None:
    """Run ranks on nodes inside this machine, joined by links of limited rate, and count the bytes of each link.

    dovetail cluster run.toml --nodes 2 --ranks 2 --nic 200Mbit

    dovetail cluster --nodes 2 --ranks 2 --nic 200Mbit -- python train.py
    """
    from dovetail.cluster import report
    from dovetail.cluster.counters import read_traffic
    from dovetail.cluster.launch import Streams
    from dovetail.cluster.run import run
    from dovetail.cluster.shape import Shape, parse_latency, parse_rate

    speed = {"nic": parse_rate(machines.nic), "latency": parse_latency(machines.latency)}
    shape = Shape(nodes=machines.nodes, ranks=machines.ranks, **speed)
    command, counts_file = _command(what, change or [])
    outcome = run(command, shape, Streams(sys.stderr if as_json else sys.stdout, sys.stderr))
    told = {} if counts_file is None else read_traffic(counts_file, shape.world_size, outcome.started)
    if as_json:
        print_json(report.as_json(outcome, told))
    else:
        print_table(*report.table(outcome, told))
    if outcome.failure is not None:
        print("dovetail:", outcome.failure, file=sys.stderr)
        raise typer.Exit(outcome.failure.exit_code)


def _command(what: list[str], change: list[str]) -> tuple[list[str], Path | None]:
    """Return what each rank runs, and where a run file's ranks leave their counts."""
    if len(what) > 1 or not what[0].endswith(".toml"):
        if change:
            raise ValueError(f"--set {change[0]}: {what[0]} is no run file (.toml), whose keys --set overrides")
        return what, None
    from dovetail.config import load_toml, user_path
    from dovetail.train.run.run_file import RunConfig

    path = user_path(Path(what[0]))
    config = load_toml(path, RunConfig, change)
    overrides = [word for each in change for word in ("--set", each)]
    return [sys.executable, "-m", "dovetail", "train", str(path), *overrides], config.out / "traffic.json"


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="The run file (TOML) that the other side is held against.")],
    b: Annotated[Path | None, typer.Argument(help="The other run file [default: A again, with --set-b].")] = None,
    both: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key on both sides, such as train.dtype=bfloat16.")
    ] = None,
    only_a: Annotated[list[str] | None, typer.Option("--set-a", help="Override a key of A alone.")] = None,
    only_b: Annotated[
        list[str] | None, typer.Option("--set-b", help="Of B alone, such as train.precision=deepseek-v3.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Of initial weights and data, from train.seed on.")] = 3,
    steps: Annotated[int | None, typer.Option(min=1, help="Of each seed [default: train.steps].")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory [default: beside A's out, named by both].")] = None,
    as_json: Json = False,
) -> None:
    """Train two runs on the same batches, and measure the gap in loss over several seeds.

    dovetail compare run.toml --set-b train.precision=deepseek-v3

    dovetail compare small.toml large.toml --steps 1000 --seeds 5
    """
    from dovetail.config import load_toml
    from dovetail.train.compare import compare as comparing
    from dovetail.train.compare import summary
    from dovetail.train.compare.sides import comparison
    from dovetail.train.run.run_file import RunConfig

    base = load_toml(a, RunConfig, [*(both or ()), *(only_a or ())])
    other = load_toml(b or a, RunConfig, [*(both or ()), *(only_b or ())])
    what = comparison(base, other, (str(a), str(b)) if b else None, steps, out)
    result = comparing.measure(what, seeds)
    if as_json:
        print_json(summary.as_json(result))
        return
    for table in summary.tables(result):
        print_table(*table)
    print(*summary.notes(result), f"log of all steps, and picture: {what.out}", sep="\n")
