"""The verb `health`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dovetail.printing import print_json, print_table

app = typer.Typer()
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def health(
    run: Annotated[Path, typer.Argument(help="The directory of a training run with train.health_every.")],
    step: Annotated[int | None, typer.Option(help="A step that has records [default: the last].")] = None,
    worst: Annotated[int, typer.Option(min=0, help="How many operands to print; 0 means all.")] = 20,
    as_json: Json = False,
) -> None:
    """Print what a precision recipe's rounding did to the operands of every layer, the worst first."""
    from dovetail.train.report import health_table

    records = health_table.read_health(run)
    found = health_table.of_step(records, step)
    if as_json:
        print_json(health_table.as_json(records, found))
        return
    shown = found[: worst or None]
    print_table(f"{run}: operands in step {found[0].step}", health_table.HEADER, health_table.rows(shown))
    steps = sorted({each.step for each in records})
    print(f"{len(shown)} of {len(found)} operands (--worst 0: all); recorded in {len(steps)} steps (--step)", end="")
    print(f", {steps[0]} to {steps[-1]}" if len(steps) > 1 else "")
