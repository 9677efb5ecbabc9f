"""The verb `reproduce`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from dovetail.printing import announce_compilation, print_json, print_table

app = typer.Typer()
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def reproduce(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Any of table1 to table5, speed_limit, cost, deployment, production, search, dualpipe, fig5 to fig8,"
            " low_latency, node_limited [default: all of these]; or one experiment: fp8_accumulation, fp8_loss_gap.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write an experiment's picture [default: NAME.png].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compute published numbers and print both side by side; the exit code is 1 if any of them is missed."""
    from dovetail.reproduce import tables

    chosen = names or []
    announce_compilation("up to a minute")
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
        raise ValueError(f"{what}: not every published number was reproduced; the table above shows which were missed")
