"""`dovetail network`: networks shown, and what collectives take on them. A part of `dovetail.cli`, in its manner."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Show a network, and simulate collectives and failures on it.")
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.command()
def show(
    fabric: Annotated[str, typer.Argument(help="Of the catalog, such as mpft, or a .toml file.")],
    endpoints: Annotated[int | None, typer.Option(help="GPUs to build it for [default: as the file has it].")] = None,
    svg: Annotated[Path | None, typer.Option(help="Write a picture.")] = None,
    as_json: Json = False,
) -> None:
    """Print a network: layers, a node, parts and prices, ports, diameter and bisection."""
    from dovetail.catalog.fabrics import load_fabric
    from dovetail.network import show as showing
    from dovetail.network.topology import build
    from dovetail.printing import print_json

    wired = build(load_fabric(fabric, endpoints))
    if svg is not None:
        svg.write_text(showing.draw_svg(wired), encoding="utf-8")
        print(f"wrote {svg}", file=sys.stderr)
    if as_json:
        print_json(showing.as_json(wired))
    else:
        print(showing.show(wired))


@app.command()
def simulate(
    fabrics: Annotated[
        list[str], typer.Option("--fabric", help="Of the catalog, or a .toml file; several are put side by side.")
    ],
    size: Annotated[str, typer.Option(help="As nccl-tests counts it, with a unit, such as 64MiB.")] = "1GiB",
    gpus: Annotated[int | None, typer.Option(help="That take part, the first ones [default: all].")] = None,
    collective: Annotated[
        str,
        typer.Option(help="all-to-all, all-gather, reduce-scatter, all-reduce, tree-all-reduce or point-to-point."),
    ] = "all-to-all",
    routing: Annotated[str, typer.Option(help="adaptive (packets sprayed), ecmp or static.")] = "adaptive",
    queue_pairs: Annotated[int, typer.Option(help="ecmp: of a connection, hashed one by one.")] = 1,
    channels: Annotated[int | None, typer.Option(help="Rings side by side [default: one per GPU of a node].")] = None,
    seed: Annotated[int, typer.Option(help="Of ECMP's hash, and of what fails at random.")] = 0,
    fail: Annotated[
        list[str] | None, typer.Option(help="plane:3, switch:40, nic:17 or link:123; with @SECONDS: from then on.")
    ] = None,
    fail_random: Annotated[list[str] | None, typer.Option(help="A share of the cables, such as 1%.")] = None,
    trials: Annotated[int, typer.Option(help="Of --fail-random, with --seed, the one after it, ...")] = 1,
    reroute_seconds: Annotated[float, typer.Option(help="From a failure until routes avoid it.")] = 0.0,
    endpoints: Annotated[int | None, typer.Option(help="Build the fabrics for so many GPUs.")] = None,
    sweep: Annotated[str | None, typer.Option(help="1MiB..1GiB, 1MiB,64MiB, gpus=16..128 or gpus=16,2048.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Of a sweep, .png or .svg.")] = None,
    as_json: Json = False,
) -> None:
    """Simulate a collective: time, bandwidth, busiest links, price, and what failures take.

    dovetail network simulate --fabric mpft --gpus 2048 --collective all-to-all --size 1GiB --routing adaptive
    """
    from dovetail.network import ask_picture, ask_report
    from dovetail.network import question as questions
    from dovetail.network.ask import ask
    from dovetail.printing import print_json, print_table

    question = questions.Question(
        fabrics=tuple(fabrics),
        collective=collective,
        sizes=(questions.parse_size(size),),
        gpu_counts=(gpus,),
        routing=routing,
        queue_pairs=queue_pairs,
        channels=channels,
        seed=seed,
        failures=tuple(fail or ()),
        random_failures=tuple(fail_random or ()),
        trials=trials,
        reroute_seconds=reroute_seconds,
        endpoints=endpoints,
    )
    question = questions.with_sweep(question, sweep)
    if picture is not None:
        ask_picture.check_picture(question, picture)
    answer = ask(question)
    if picture is not None:
        ask_picture.draw(answer, picture)
        print(f"wrote {picture}", file=sys.stderr)
    if as_json:
        print_json(ask_report.as_json(answer))
        return
    for title, header, rows in ask_report.tables(answer):
        print_table(title, header, rows)
        print()
    print(*ask_report.notes(answer), sep="\n")
