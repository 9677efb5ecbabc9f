"""The verb `inspect`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dovetail.printing import print_json, print_table

app = typer.Typer()
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A preset, a config.json, or a checkpoint directory.")],
    context: Annotated[int, typer.Option(help="Tokens of context for the FLOP per token.")] = 4096,
    as_json: Json = False,
) -> None:
    """Count a model's parameters, its FLOP and cache bytes per token, and list the kernels that take its shape."""
    from dovetail.cost import inspect as inspection

    result = inspection.inspect(model, context)
    if as_json:
        print_json(inspection.as_json(result))
        return
    print_table(f"{model}: {result.source}", ("", ">", ""), inspection.rows(result))
    if result.unread:
        print(f"keys of config.json that were not read: {', '.join(result.unread)}", file=sys.stderr)
