"""`dovetail reproduce`. A part of `dovetail.cli.app`, in its manner."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from dovetail.printing import print_json, print_table

app = typer.Typer()
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def reproduce(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Of table1 to table5, speed_limit, cost, deployment, production, search, dualpipe, fig5 to fig8,"
            " low_latency, node_limited [default: all]; or one experiment: fp8_accumulation, fp8_loss_gap.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Picture of an experiment [default: NAME.png].")] = None,
    as_json: Json = False,
) -> None:
    """Count or predict what is published anew and print both; exit code 1 if any of it, exact or predicted, fails."""
    from dovetail.reproduce import tables

    chosen = names or []
    if len(chosen) == 1 and chosen[0] in tables.EXPERIMENTS:
        module = import_module(f"dovetail.reproduce.{chosen[0]}")
        result = module.reproduce(out or Path(f"{chosen[0]}.png"))
    else:
        module, result = tables, tables.reproduce(chosen, out)
    if as_json:
        print_json(module.as_json(result))
    else:
        print_table(f"{result.title} {result.source}", module.HEADER, module.printed_rows(result))
        print(*module.printed_notes(result), sep="\n")
    if not result.is_reproduced:
        what = ", ".join(chosen) or "all tables"
        raise ValueError(f"{what}: what is published did not come out in full; see the table")
