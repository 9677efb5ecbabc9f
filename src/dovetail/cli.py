"""The command line: one verb, one library function, its result printed.

Data goes to stdout, everything else to stderr. Each verb imports what it needs, so that `--help` stays quick.
Exit codes: 0 done, 1 the input or the machine is at fault (one line says how), 2 the command line is wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="The DeepSeek-V3 system in one package: train, generate, convert and count.",
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A preset, a config.json, or a checkpoint directory.")],
    context: Annotated[int, typer.Option(help="Tokens of context for the FLOP per token.")] = 4096,
    as_json: Json = False,
) -> None:
    """Count a model: parameters by part, active, FLOP and KV bytes per token, kernels that take its shape."""
    from dovetail.cost import inspect as inspection

    result = inspection.inspect(model, context)
    if as_json:
        print_json(inspection.as_json(result))
        return
    print_table(f"{model}: {result.source}", ("", ">", ""), inspection.rows(result))
    if result.unread:
        print(f"keys of config.json that were not read: {', '.join(result.unread)}", file=sys.stderr)


@app.command()
def reproduce(
    table: Annotated[str, typer.Argument(help="table1 or table2 of the ISCA paper.")],
    as_json: Json = False,
) -> None:
    """Compute a table of the paper anew and print both; exit code 1 if a row fails to come out."""
    from dovetail.reproduce import tables

    result = tables.reproduce(table)
    if as_json:
        print_json(tables.as_json(result))
    else:
        header = ("model", "quantity", ">paper", ">ours", ">differs by", "reproduced")
        print_table(f"{result.title} {result.source}", header, tables.printed_rows(result))
        print(*tables.printed_notes(result), sep="\n")
    if not result.is_reproduced:
        raise ValueError(f"{table}: a row that the paper prints did not come out; see the table")


def print_json(record: Any) -> None:
    print(json.dumps(record, indent=2))


def print_table(title: str, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """A table on stdout; a column whose header opens with ">" is aligned right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=any(name.strip(">") for name in header))
    for name in header:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left")
    for row in rows:
        table.add_row(*row)
    print(title)
    Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False).print(table)


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 1, never a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        print("dovetail:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
