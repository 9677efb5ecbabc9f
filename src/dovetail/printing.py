"""What the command line writes to stdout: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any


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
