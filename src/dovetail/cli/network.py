"""The verbs `network show` and `network simulate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dovetail.printing import GroupedCommand

app = typer.Typer(no_args_is_help=True, help="Show a network, and simulate collectives and failures on it.")
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
WHAT, EXPERTS, ROUTES = "The collective", "Experts, for dispatch and combine", "Routing"
FAILURES, OUTPUT = "Failures", "Output"
CATALOG = "dragonfly, ft2, ft3, h800-2048, mpft, mpft-roce, mrft, mrft3, slim-fly"


@app.command()
def show(
    fabric: Annotated[str, typer.Argument(help=f"A fabric's name ({CATALOG}), or a .toml file.")],
    endpoints: Annotated[
        int | None, typer.Option(help="Build it for this many GPUs [default: as the file says].")
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Write a picture to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Describe a network: its layers, a node, parts and prices, ports, diameter and bisection."""
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
            "--fabric",
            help=f"A fabric's name ({CATALOG}), or a .toml file; give it several times to compare.",
            rich_help_panel=WHAT,
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
        typer.Option(help="Size as nccl-tests counts it, such as 64MiB [default: 1GiB].", rich_help_panel=WHAT),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(help="How many GPUs take part, from the first on [default: all].", rich_help_panel=WHAT),
    ] = None,
    channels: Annotated[
        int | None, typer.Option(help="Rings side by side [default: one per GPU of a node].", rich_help_panel=WHAT)
    ] = None,
    stages: Annotated[
        int | None, typer.Option(help="pipeline: number of stages the GPUs are divided into.", rich_help_panel=WHAT)
    ] = None,
    both_ways: Annotated[
        bool, typer.Option("--both-ways", help="pipeline: stages also send backwards.", rich_help_panel=WHAT)
    ] = False,
    prefill_gpus: Annotated[
        int | None,
        typer.Option(help="kv-transfer: how many GPUs send, from the first on [default: half].", rich_help_panel=WHAT),
    ] = None,
    beside: Annotated[
        str | None,
        typer.Option(
            help="What runs at the same time: host-copy:1GiB, node-all-gather:1GiB, or another collective of the same "
            "GPUs, such as all-reduce:64MiB or combine:4096 (tokens).",
            rich_help_panel=WHAT,
        ),
    ] = None,
    endpoints: Annotated[
        int | None, typer.Option(help="Build each fabric for this many GPUs.", rich_help_panel=WHAT)
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens per GPU, instead of --size [default: 4096].", rich_help_panel=EXPERTS)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A preset, a config.json, or a checkpoint directory [default: deepseek-v3].", rich_help_panel=EXPERTS
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="The recipe whose formats tokens are sent in [default: deepseek-v3].", rich_help_panel=EXPERTS
        ),
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="normal or low-latency [default: normal].", rich_help_panel=EXPERTS)
    ] = None,
    skew: Annotated[
        float | None,
        typer.Option(help="Zipf exponent of the experts' popularity [default: 0, uniform].", rich_help_panel=EXPERTS),
    ] = None,
    recorded: Annotated[
        str | None,
        typer.Option(
            help="A .npy file of the experts chosen, [GPUs, tokens, choices]; -1 is no choice.", rich_help_panel=EXPERTS
        ),
    ] = None,
    routing: Annotated[
        str, typer.Option(help="adaptive (packets sprayed), ecmp or static.", rich_help_panel=ROUTES)
    ] = "adaptive",
    queue_pairs: Annotated[
        int, typer.Option(help="ecmp: queue pairs per connection, each hashed by itself.", rich_help_panel=ROUTES)
    ] = 1,
    seed: Annotated[
        int, typer.Option(help="Seed of ECMP's hash, of tokens, and of random failures.", rich_help_panel=ROUTES)
    ] = 0,
    fail: Annotated[
        list[str] | None,
        typer.Option(
            help="What fails: plane:3, switch:40, nic:17 or link:123; @SECONDS after it says when.",
            rich_help_panel=FAILURES,
        ),
    ] = None,
    fail_random: Annotated[
        list[str] | None, typer.Option(help="The share of cables that fail, such as 1%.", rich_help_panel=FAILURES)
    ] = None,
    trials: Annotated[
        int, typer.Option(help="Trials of --fail-random, with seeds from --seed on.", rich_help_panel=FAILURES)
    ] = 1,
    reroute_seconds: Annotated[
        float, typer.Option(help="Seconds from a failure until routes avoid it.", rich_help_panel=FAILURES)
    ] = 0.0,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="Values to go through: 1MiB..1GiB, 1MiB,64MiB, tokens=128..4096 or gpus=16,2048; "
            "given twice, every pair.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the sweep to this file, .png or .svg.", rich_help_panel=OUTPUT)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of text.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Simulate a collective: its time, bandwidth, busiest links and price, and the cost of failures.

    dovetail network simulate --fabric mpft --gpus 2048 --collective all-to-all --size 1GiB --routing adaptive

    dovetail network simulate --fabric h800-2048 --gpus 64 --collective dispatch --beside host-copy:1GiB
    """
    options = locals()
    from dovetail.network.ask import ask, pictures, report
    from dovetail.network.ask.question import Question
    from dovetail.printing import announce_compilation, print_json, print_table

    question = Question.of(options, sweep or ())
    if picture is not None:
        pictures.check_picture(question, picture)
    announce_compilation("some seconds")
    answer = ask.ask(question)
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
