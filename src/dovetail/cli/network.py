"""`dovetail network`: networks shown, and what collectives take. A part of `dovetail.cli.app`, in its manner."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dovetail.printing import GroupedCommand

app = typer.Typer(no_args_is_help=True, help="Show a network, and simulate collectives and failures on it.")
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
WHAT, EXPERTS, ROUTES = "The collective", "Experts, of dispatch and combine", "Routing"
FAILURES, OUTPUT = "Failures", "Output"
CATALOG = "dragonfly, ft2, ft3, h800-2048, mpft, mpft-roce, mrft, mrft3, slim-fly"


@app.command()
def show(
    fabric: Annotated[str, typer.Argument(help=f"Of the catalog ({CATALOG}), or a .toml file.")],
    endpoints: Annotated[int | None, typer.Option(help="GPUs to build it for [default: as the file has it].")] = None,
    svg: Annotated[Path | None, typer.Option(help="Write a picture.")] = None,
    as_json: Json = False,
) -> None:
    """Print a network: layers, a node, parts and prices, ports, diameter and bisection."""
    from dovetail.catalog.fabrics import load_fabric
    from dovetail.network.fabric import show as showing
    from dovetail.network.fabric.topology import build
    from dovetail.printing import print_json

    wired = build(load_fabric(fabric, endpoints))
    if svg is not None:
        try:
            svg.write_text(showing.draw_svg(wired), encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--svg {svg}: cannot be written: {error.strerror}; give another path") from None
        print(f"wrote {svg}", file=sys.stderr)
    if as_json:
        print_json(showing.as_json(wired))
    else:
        print(showing.show(wired))


@app.command(cls=GroupedCommand)
def simulate(
    fabrics: Annotated[
        list[str],
        typer.Option(
            "--fabric", help=f"Of the catalog ({CATALOG}), or a .toml file; several side by side.", rich_help_panel=WHAT
        ),
    ],
    collective: Annotated[
        str,
        typer.Option(
            help="all-to-all, all-gather, reduce-scatter, all-reduce, tree-all-reduce, point-to-point, dispatch, "
            "combine, pipeline or kv-transfer.",
            rich_help_panel=WHAT,
        ),
    ] = "all-to-all",
    size: Annotated[
        str | None,
        typer.Option(help="As nccl-tests counts it, such as 64MiB [default: 1GiB].", rich_help_panel=WHAT),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="That take part, the first ones [default: all].", rich_help_panel=WHAT)
    ] = None,
    channels: Annotated[
        int | None, typer.Option(help="Rings side by side [default: one per GPU of a node].", rich_help_panel=WHAT)
    ] = None,
    stages: Annotated[int | None, typer.Option(help="pipeline: parts of the GPUs.", rich_help_panel=WHAT)] = None,
    both_ways: Annotated[
        bool, typer.Option("--both-ways", help="pipeline: stages send back too.", rich_help_panel=WHAT)
    ] = False,
    prefill_gpus: Annotated[
        int | None, typer.Option(help="kv-transfer: that send, the first [default: half].", rich_help_panel=WHAT)
    ] = None,
    beside: Annotated[
        str | None,
        typer.Option(
            help="At the same time: host-copy:1GiB, node-all-gather:1GiB, or a collective of these GPUs, such as "
            "all-reduce:64MiB or combine:4096 (tokens).",
            rich_help_panel=WHAT,
        ),
    ] = None,
    endpoints: Annotated[
        int | None, typer.Option(help="Build the fabrics for so many GPUs.", rich_help_panel=WHAT)
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Of a GPU, instead of --size [default: 4096].", rich_help_panel=EXPERTS)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="As dovetail inspect takes it [default: deepseek-v3].", rich_help_panel=EXPERTS),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Recipe: bytes of a copy [default: deepseek-v3].", rich_help_panel=EXPERTS),
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="normal or low-latency [default: normal].", rich_help_panel=EXPERTS)
    ] = None,
    skew: Annotated[
        float | None,
        typer.Option(help="Zipf exponent of experts' popularity [default: 0, uniform].", rich_help_panel=EXPERTS),
    ] = None,
    recorded: Annotated[
        str | None, typer.Option(help="Choices as .npy [GPUs, tokens, choices], -1: none.", rich_help_panel=EXPERTS)
    ] = None,
    routing: Annotated[
        str, typer.Option(help="adaptive (packets sprayed), ecmp or static.", rich_help_panel=ROUTES)
    ] = "adaptive",
    queue_pairs: Annotated[
        int, typer.Option(help="ecmp: of a connection, hashed one by one.", rich_help_panel=ROUTES)
    ] = 1,
    seed: Annotated[
        int, typer.Option(help="Of ECMP's hash, of tokens, and of what fails at random.", rich_help_panel=ROUTES)
    ] = 0,
    fail: Annotated[
        list[str] | None,
        typer.Option(
            help="plane:3, switch:40, nic:17 or link:123; with @SECONDS: from then on.", rich_help_panel=FAILURES
        ),
    ] = None,
    fail_random: Annotated[
        list[str] | None, typer.Option(help="A share of the cables, such as 1%.", rich_help_panel=FAILURES)
    ] = None,
    trials: Annotated[
        int, typer.Option(help="Of --fail-random, with --seed, the one after it, ...", rich_help_panel=FAILURES)
    ] = 1,
    reroute_seconds: Annotated[
        float, typer.Option(help="From a failure until routes avoid it.", rich_help_panel=FAILURES)
    ] = 0.0,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="1MiB..1GiB, 1MiB,64MiB, tokens=128..4096 or gpus=16,2048; two of them are crossed.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Of a sweep, .png or .svg.", rich_help_panel=OUTPUT)] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of text.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Simulate a collective: time, bandwidth, busiest links, price, and what failures take.

    dovetail network simulate --fabric mpft --gpus 2048 --collective all-to-all --size 1GiB --routing adaptive

    dovetail network simulate --fabric h800-2048 --gpus 64 --collective dispatch --beside host-copy:1GiB
    """
    options = locals()
    from dovetail.network.ask import pictures, report
    from dovetail.network.ask.ask import ask
    from dovetail.network.ask.question import Question
    from dovetail.printing import print_json, print_table

    question = Question.of(options, sweep or ())
    if picture is not None:
        pictures.check_picture(question, picture)
    answer = ask(question)
    if picture is not None:
        pictures.draw(answer, picture)
        print(f"wrote {picture}", file=sys.stderr)
    if as_json:
        print_json(report.as_json(answer))
        return
    for title, header, rows in report.tables(answer):
        print_table(title, header, rows)
        print()
    print(*report.notes(answer), sep="\n")
