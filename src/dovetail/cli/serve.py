"""The verbs `serve` and `bench serve`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from dovetail.cli.options import flat
from dovetail.printing import announce_compilation, print_json, print_table

app = typer.Typer()
bench = typer.Typer(no_args_is_help=True, help="Measure a server that speaks OpenAI's API.")
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where to listen, and to whom."""

    host: Annotated[
        str | None, typer.Option(show_default="127.0.0.1", help="Address to listen at; 0.0.0.0 is every one.")
    ] = None
    port: Annotated[int | None, typer.Option(show_default="8000", help="Port; 0 takes any free one.")] = None
    api_key: Annotated[
        str | None, typer.Option(envvar="DOVETAIL_API_KEY", help="Clients have to send it as their API key.")
    ] = None
    served_model_name: Annotated[
        str | None, typer.Option(show_default="the directory's name", help="The model's name for clients.")
    ] = None
    chat_template: Annotated[
        str | None,
        typer.Option(show_default="the checkpoint's", help="A file with a Jinja template of chats, or a built-in one."),
    ] = None
    max_body_bytes: Annotated[
        int | None, typer.Option(show_default="by --max-model-len", help="Size of a request's body.")
    ] = None
    drain_seconds: Annotated[
        float | None, typer.Option(show_default="30", help="After SIGTERM, time for running requests to end.")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How much the engine takes on."""

    max_model_len: Annotated[
        int | None, typer.Option(show_default="the model's", help="Tokens of prompt and answer together.")
    ] = None
    cache_bytes: Annotated[
        int | None, typer.Option(show_default="2 GiB", help="Memory for the cache; never exceeded.")
    ] = None
    cache_format: Annotated[str | None, typer.Option(show_default="bf16", help="bf16 or fp8.")] = None
    max_batch_tokens: Annotated[
        int | None, typer.Option(show_default="512", help="Tokens of prompts computed in one step.")
    ] = None
    max_sequences: Annotated[int | None, typer.Option(show_default="32", help="Answers generated together.")] = None
    max_waiting: Annotated[
        int | None, typer.Option(show_default="1024", help="Further requests that may wait; then clients get 429.")
    ] = None
    speculate: Annotated[
        str | None, typer.Option(show_default="auto", help="MTP drafts per step: a number, or auto: where they pay.")
    ] = None


@app.command()
@flat
def serve(
    checkpoint: Annotated[Path, typer.Argument(help="The directory of a training run, or a Hugging Face checkpoint.")],
    address: Address,
    room: Room,
    config: Annotated[Path | None, typer.Option(help="A TOML file with these settings; options go over it.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A setting as key=value; may be given several times.")
    ] = None,
) -> None:
    """Serve a model over HTTP, for OpenAI's clients and a browser."""
    from dovetail.config import apply_override, read_toml, validate
    from dovetail.server.settings import ServeConfig
    from dovetail.server.start import serve

    announce_compilation()
    table: dict[str, Any] = {} if config is None else read_toml(config)
    table |= {name: value for name, value in {**asdict(address), **asdict(room)}.items() if value is not None}
    for override in set_ or ():
        apply_override(table, override)
    if str(table.get("speculate", "")).isdecimal():
        table["speculate"] = int(table["speculate"])
    serve(
        checkpoint, validate(ServeConfig, table, where=str(config or "options")), lambda line: print(line, flush=True)
    )


@bench.callback()
def _group() -> None:
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


@bench.command(name="serve")
@flat
def bench_serve(server: Server, shape: Shape, pace: Pace, wanted: Wanted, as_json: Json = False) -> None:
    """Send seeded requests to a server and time every token of its answers."""
    from dovetail.bench import report
    from dovetail.bench.measures import measure, parse_limits
    from dovetail.bench.picture import draw_serving
    from dovetail.bench.progress import Watch
    from dovetail.bench.serve import Question
    from dovetail.bench.serve import bench_serve as run
    from dovetail.bench.workload import Workload
    from dovetail.config import validate

    when = asdict(pace)
    rest = {name: when.pop(name) for name in ("concurrency", "trace")}
    workload = validate(Workload, {**asdict(shape), **when}, where="bench serve")
    question = validate(Question, {**asdict(server), **rest, "workload": workload}, where="bench serve")
    limits = None if wanted.goodput is None else parse_limits(wanted.goodput)
    with Watch(len(question.requests())) as watch:
        target, outcomes = run(question, watch.hear, watch.say, wanted.out)
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
