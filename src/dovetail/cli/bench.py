"""The verb `bench serve`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from dovetail.cli.options import flat
from dovetail.printing import print_json, print_table

app = typer.Typer(no_args_is_help=True, help="Measure a server that speaks OpenAI's API.")
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.callback()
def bench() -> None:
    """Keep `serve` a word of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Which server is asked, and in what form."""

    url: Annotated[str, typer.Option(help="Where it is, with /v1 or without.")] = "http://127.0.0.1:8000"
    model: Annotated[str | None, typer.Option(show_default="the only one served", help="The model to ask.")] = None
    api: Annotated[str, typer.Option(help="completions, or chat.")] = "completions"
    api_key: Annotated[str | None, typer.Option(help="The key that it wants.")] = None
    timeout: Annotated[float, typer.Option(help="Seconds that it may be silent.")] = 600.0
    warmup: Annotated[int, typer.Option(min=0, help="Requests sent before, and not measured.")] = 4
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos/--no-ignore-eos", help="Hold answers to their length, where it can.")
    ] = True
    vocab_size: Annotated[
        int, typer.Option(min=73, help="Prompts are token ids below this, if it takes ids, else words.")
    ] = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How many requests, and how long."""

    requests: Annotated[int, typer.Option(min=1, help="How many are measured.")] = 64
    input_tokens: Annotated[str, typer.Option(help="Length of a prompt: 512, or drawn from a range: 256:768.")] = "512"
    output_tokens: Annotated[str, typer.Option(help="Length of an answer, likewise.")] = "128"
    shared_prefix: Annotated[int, typer.Option(min=0, help="Tokens that prompts begin with in common.")] = 0
    shared_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the prompts that do.")] = 1.0
    seed: Annotated[int, typer.Option(min=0, help="Seed of lengths, arrivals and prompts.")] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """When requests are sent."""

    concurrency: Annotated[
        int | None, typer.Option(min=1, show_default="8", help="So many at once, one after the other.")
    ] = None
    rate: Annotated[float | None, typer.Option(help="So many per second, however many are under way.")] = None
    arrivals: Annotated[str, typer.Option(help="With --rate: poisson, uniform or burst.")] = "poisson"
    burst_size: Annotated[int, typer.Option(min=1, help="Requests that a burst brings at once.")] = 8
    trace: Annotated[
        Path | None,
        typer.Option(help="A JSONL file with arrival (seconds), input_tokens, output_tokens and shared_tokens a line."),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is made of it."""

    goodput: Annotated[
        str | None, typer.Option(help="Limits of a good request: ttft=1s,itl=100ms,e2e=30s, or some of them.")
    ] = None
    out: Annotated[Path | None, typer.Option(help="Write every request as a line of JSON into this file.")] = None
    picture: Annotated[Path | None, typer.Option(help="Draw the measurement into this PNG.")] = None


@app.command()
@flat
def serve(server: Server, shape: Shape, pace: Pace, wanted: Wanted, as_json: Json = False) -> None:
    """Send seeded requests to a server and time every token of its answers."""
    from dovetail.bench import report
    from dovetail.bench.measures import measure, parse_limits
    from dovetail.bench.picture import draw_serving
    from dovetail.bench.progress import Watch
    from dovetail.bench.serve import Question, bench_serve
    from dovetail.bench.workload import Workload
    from dovetail.config import validate

    when = asdict(pace)
    rest = {name: when.pop(name) for name in ("concurrency", "trace")}
    workload = validate(Workload, {**asdict(shape), **when}, where="bench serve")
    question = validate(Question, {**asdict(server), **rest, "workload": workload}, where="bench serve")
    limits = None if wanted.goodput is None else parse_limits(wanted.goodput)
    with Watch(len(question.requests())) as watch:
        target, outcomes = bench_serve(question, watch.hear, watch.say, wanted.out)
    measures, title = measure(outcomes, limits), report.title(question, target, outcomes)
    if as_json:
        print_json(report.as_json(question, target, measures, limits))
    else:
        print_table(title, report.HEADER, report.printed_rows(measures))
        print(*report.notes(measures, limits, outcomes), sep="\n")
    if wanted.picture is not None:
        draw_serving(outcomes, wanted.picture, title)
    if not measures.completed:
        raise ValueError(f"{question.url}: every request failed; the errors above say how")
