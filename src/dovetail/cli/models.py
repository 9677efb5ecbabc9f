"""The verb `inspect`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dovetail.cli.options import flat
from dovetail.printing import print_json, print_table

if TYPE_CHECKING:
    from dovetail.spec.model import ModelSpec

app = typer.Typer()
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


FLOP_CONTEXT = 4096  # tokens [ISCA Table 2]
CACHE_HEADER = ("cache", "each layer keeps per token", ">B", ">B, all layers", ">GB in all", ">times own")


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """What is counted, at which lengths."""

    context: Annotated[
        int | None,
        typer.Option(help="Tokens of context: for the FLOP 4096 if not given, for --cache the model's longest."),
    ] = None
    cache: Annotated[
        bool, typer.Option("--cache", help="Count the cache instead, beside those of other kinds of attention.")
    ] = False
    sequences: Annotated[int | None, typer.Option(help="With --cache: sequences that are cached at once. [1]")] = None
    window: Annotated[int | None, typer.Option(help="With --cache: tokens of the sliding window. [4096]")] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The file that is written."""

    write_config: Annotated[Path | None, typer.Option(help="Write the model's Hugging Face config.json here.")] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False


@app.command()
@flat
def inspect(
    model: Annotated[str, typer.Argument(help="A preset, a .toml or config.json, or a directory that holds one.")],
    counted: Counted,
    written: Written,
    as_json: Json = False,
) -> None:
    """Count a model's parameters, its FLOP and cache bytes per token, and list the kernels that take its shape."""
    from dovetail.cost import inspect as inspection

    if counted.cache:
        _inspect_cache(model, counted, written, as_json)
        return
    for name, given in (("sequences", counted.sequences), ("window", counted.window)):
        if given is not None:
            raise ValueError(f"--{name} {given}: counts caches; add --cache")
    result = inspection.inspect(model, FLOP_CONTEXT if counted.context is None else counted.context)
    if written.write_config is not None:
        _write_config(result.spec, written.write_config, written.overwrite)
    if as_json:
        print_json(inspection.as_json(result))
        return
    print_table(f"{model}: {result.source}", ("", ">", ""), inspection.rows(result))
    _say_unread(result.unread)


def _inspect_cache(model: str, counted: Counted, written: Written, as_json: bool) -> None:
    from dovetail.cost import inspect as inspection

    if written.write_config is not None:
        raise ValueError("--write-config: writes nothing about caches; leave --cache out")
    sequences, window = counted.sequences, counted.window
    result = inspection.inspect_cache(
        model, counted.context, 1 if sequences is None else sequences, 4096 if window is None else window
    )
    if as_json:
        print_json(asdict(result))
        return
    many = f"{result.sequences:,} sequence{'s' if result.sequences > 1 else ''} of {result.context:,} tokens"
    print_table(f"{model}: {result.source}; {many}", CACHE_HEADER, inspection.cache_rows(result))
    _say_unread(result.unread)


def _say_unread(keys: tuple[str, ...]) -> None:
    if keys:
        print(f"keys of config.json that were not read: {', '.join(keys)}", file=sys.stderr)


def _write_config(spec: ModelSpec, path: Path, overwrite: bool) -> None:
    """Write the config.json of `spec` to `path`, whole or not at all."""
    from dovetail.atomic import write_bytes
    from dovetail.spec.hf_config import read_hf, write_hf

    if path.is_dir():
        raise ValueError(f"--write-config {path}: is a directory; name the file, such as {path / 'config.json'}")
    if path.exists() and not overwrite:
        raise ValueError(f"--write-config {path}: exists; give another name, or --overwrite")
    text = json.dumps(write_hf(spec), indent=2) + "\n"
    assert read_hf(json.loads(text)) == spec
    write_bytes(path, text.encode())
    print(f"wrote {path}", file=sys.stderr)
