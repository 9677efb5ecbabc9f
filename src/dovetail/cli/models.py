"""The verb `inspect`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dovetail.printing import print_json, print_table

if TYPE_CHECKING:
    from dovetail.spec.model import ModelSpec

app = typer.Typer()
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A preset, a .toml or config.json, or a directory that holds one.")],
    context: Annotated[int, typer.Option(help="Tokens of context for the FLOP per token.")] = 4096,
    write_config: Annotated[Path | None, typer.Option(help="Write the model's Hugging Face config.json here.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
    as_json: Json = False,
) -> None:
    """Count a model's parameters, its FLOP and cache bytes per token, and list the kernels that take its shape."""
    from dovetail.cost import inspect as inspection

    result = inspection.inspect(model, context)
    if write_config is not None:
        _write_config(result.spec, write_config, overwrite)
    if as_json:
        print_json(inspection.as_json(result))
        return
    print_table(f"{model}: {result.source}", ("", ">", ""), inspection.rows(result))
    if result.unread:
        print(f"keys of config.json that were not read: {', '.join(result.unread)}", file=sys.stderr)


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
