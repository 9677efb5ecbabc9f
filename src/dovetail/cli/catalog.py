"""The verb `list`."""

from __future__ import annotations

from typing import Annotated

import typer

from dovetail.printing import print_json, print_table

app = typer.Typer()
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command("list")
def list_(
    kind: Annotated[
        str | None,
        typer.Argument(help="models, clusters, gpus, fabrics, recipes, schedules or pipelines [default: all]."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List what can be named: models, clusters, GPUs, networks, precision recipes, schedules."""
    from dovetail import listing

    found = listing.listings(kind)
    if as_json:
        print_json(listing.as_json(found))
        return
    for index, each in enumerate(found):
        print_table(f"\n{each.title}" if index else each.title, each.header, each.rows)
