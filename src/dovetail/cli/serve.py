"""The verb `serve`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from dovetail.cli.options import flat
from dovetail.printing import announce_compilation

app = typer.Typer()


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
    cache_bytes: Annotated[int | None, typer.Option(help="Memory for the cache; never exceeded.")] = None
    cache_format: Annotated[str | None, typer.Option(show_default="bf16", help="bf16 or fp8.")] = None
    max_batch_tokens: Annotated[int | None, typer.Option(help="Tokens of prompts computed in one step.")] = None
    max_sequences: Annotated[int | None, typer.Option(help="Answers generated together.")] = None
    max_waiting: Annotated[int | None, typer.Option(help="Further requests that may wait; then clients get 429.")] = (
        None
    )
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
