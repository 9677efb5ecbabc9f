"""The verbs `plan` and `calibrate`."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dovetail.printing import announce_compilation, print_json, print_table

if TYPE_CHECKING:
    from dovetail.planner.request import Answer

app = typer.Typer()
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A preset, a .toml or config.json, or a directory that holds one.")],
    clusters: Annotated[
        list[str],
        typer.Option("--cluster", help="A cluster's name, or a .toml file; give it several times to compare."),
    ],
    goal: Annotated[str, typer.Option(help="train or serve.")],
    tokens: Annotated[str | None, typer.Option(help="train: tokens of the whole run, such as 14.8T.")] = None,
    batch: Annotated[str | None, typer.Option(help="train: sequences per step.")] = None,
    sequence_length: Annotated[str | None, typer.Option(help="train: tokens per sequence [default: 4096].")] = None,
    precision: Annotated[str, typer.Option(help="A precision recipe of the catalog, or a .toml file.")] = "deepseek-v3",
    gpus: Annotated[int | None, typer.Option(help="How many of the cluster's GPUs to use [default: all].")] = None,
    pp: Annotated[int | None, typer.Option(help="train: ranks of a pipeline [default: the best].")] = None,
    ep: Annotated[
        int | None, typer.Option(help="Ranks that share the experts; serve: for decoding [default: the best].")
    ] = None,
    tp: Annotated[int | None, typer.Option(help="Ranks that share the attention heads [default: the best].")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="train: the pipeline's schedule, such as dualpipe [default: the best].")
    ] = None,
    microbatch_size: Annotated[
        int | None, typer.Option(help="train: sequences per micro-batch [default: the best].")
    ] = None,
    vary: Annotated[list[str] | None, typer.Option(help="train: search these too, such as topk_group=2,4.")] = None,
    context: Annotated[str | None, typer.Option(help="serve: mean number of tokens before an output token.")] = None,
    prompt_length: Annotated[str | None, typer.Option(help="serve: mean tokens of a prompt.")] = None,
    output_length: Annotated[str | None, typer.Option(help="serve: mean tokens of an output.")] = None,
    output_speed: Annotated[str | None, typer.Option(help="serve: tokens/s that each user gets at least.")] = None,
    prefill_ep: Annotated[int | None, typer.Option(help="serve: like --ep, for the pool that reads prompts.")] = None,
    decode_cluster: Annotated[
        str | None, typer.Option(help="serve: another cluster, for the pool that writes outputs.")
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="serve: set another key, such as cache_hit=0.5.")
    ] = None,
    network: Annotated[
        str,
        typer.Option(help="closed-forms: each exchange has its links to itself; simulate: all exchanges at once."),
    ] = "closed-forms",
    fabric: Annotated[str | None, typer.Option(help="simulate: the fabric [default: the cluster's].")] = None,
    routing: Annotated[str | None, typer.Option(help="simulate: adaptive, ecmp or static.")] = None,
    fail: Annotated[
        list[str] | None, typer.Option(help="simulate: what has failed: plane:3, switch:40, nic:17, ...")
    ] = None,
    explain: Annotated[str | None, typer.Option(help="Print the formula, inputs and sources of one figure.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page with pictures.")] = None,
    trace: Annotated[Path | None, typer.Option(help="train: write the step for chrome://tracing or Perfetto.")] = None,
    timeline: Annotated[
        bool, typer.Option("--timeline", help="train: print the step as a timeline too, a row for each rank.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """Find the best layout for a model on a cluster: its time, memory and price, and the commands that run it.

    dovetail plan deepseek-v3 --cluster h800-2048 --goal train --tokens 14.8T --batch 15360

    dovetail plan deepseek-v3 --cluster h800-2048 --goal serve --context 4989 --output-speed 20
    """
    options = locals()
    from dovetail.planner.report import drawing
    from dovetail.planner.report import html as pages
    from dovetail.planner.request import Request
    from dovetail.planner.request import answer as plans

    if timeline and (explain is not None or as_json or markdown):
        raise ValueError("--timeline belongs to the tables: leave out --explain, --json and --markdown, or --timeline")
    request = Request.of(options)
    pages.check(request, html, trace)
    if timeline:
        drawing.check_timeline(request, "--timeline")
    if network == "simulate":
        announce_compilation("some seconds")
    answer = plans(request)
    for write, path in ((pages.write, html), (pages.write_trace, trace)):
        if path is not None:
            write(answer, path)
            print(f"wrote {path}", file=sys.stderr)
    _print_answer(answer, markdown, as_json, timeline)


def _print_answer(answer: Answer, markdown: bool, as_json: bool, timeline: bool) -> None:
    from dovetail.planner.report import drawing, plain, tables

    explain = answer.request.explain
    if explain is not None and as_json:
        print_json(plain.explained_json(answer, explain))
    elif explain is not None:
        print(*tables.explained(answer, explain), sep="\n")
    elif as_json:
        print_json(plain.as_json(answer))
    elif markdown:
        print(tables.markdown(answer))
    else:
        for table in tables.tables(answer):
            print_table(table.title, table.header, table.rows)
            print()
        if timeline:
            pipeline = drawing.planned_timeline(answer)
            print(drawing.draw_text(pipeline, max(40, shutil.get_terminal_size((120, 0)).columns)))
        for launch in tables.answer_launches(answer):
            print(*tables.printed_launch(launch), sep="\n")


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="The cluster file to write, NAME.toml.")],
    seconds: Annotated[float, typer.Option(help="How long to measure.")] = 45.0,
    as_json: Json = False,
) -> None:
    """Measure this machine and describe it for `dovetail plan`: matrix products, memory, launches, exchanges.

    Under torchrun all ranks measure, and the exchange between them is measured too.
    """
    from dovetail.calibrate import machine as measuring
    from dovetail.planner.report import measured

    announce_compilation()
    cluster = measuring.calibrate(out, seconds)
    if int(os.environ.get("RANK", "0")) > 0:  # torchrun sets it; one rank prints for all
        return
    if as_json:
        print_json(cluster.model_dump(mode="json"))
        return
    for table in measured.tables(cluster):
        print_table(table.title, table.header, table.rows)
        print()
    print(*measured.next_commands(out), sep="\n")
