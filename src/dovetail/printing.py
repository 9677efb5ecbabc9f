"""The command line's output: tables and JSON on stdout, remarks on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from io import TextIOWrapper
from typing import Any

from typer.core import TyperCommand


class GroupedCommand(TyperCommand):
    """A command whose help lists each option under the heading in its `rich_help_panel`, without Rich's boxes."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(option, "rich_help_panel", None) or "Options", []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)


def open_streams() -> None:
    """Make stdout take every text: what its encoding has no bytes for is escaped, and a closed stream takes all."""
    if sys.stdout is None:  # closed by the caller (>&-)
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def announce_compilation(duration: str = "about a minute") -> None:
    """Say on stderr, at the moment it begins, that CPU kernels are compiled; say nothing where they are cached."""
    from dovetail.kernel_cache import before_compiling

    if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun starts, one speaks
        text = f"compiling CPU kernels, once per machine and version: {duration}"
        before_compiling(lambda: print(text, file=sys.stderr))


def print_json(record: Any) -> None:
    print(json.dumps(record, indent=2))


def print_table(title: str, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Print a table on stdout.

    A column whose header starts with ">" is aligned right and its cells are never wrapped: where the terminal is too
    narrow for these columns, the rows run past its edge instead.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=any(name.strip(">") for name in header))
    body = list(rows)
    for place, name in enumerate(header):
        is_number = name.startswith(">")
        table.add_column(
            name.removeprefix(">"),
            justify="right" if is_number else "left",
            min_width=max(map(len, [name[1:], *(row[place] for row in body)])) if is_number else None,
        )
    for row in body:
        table.add_row(*row)
    print(title)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    least, most = Console(width=10_000).measure(table)
    if console.width < least:
        console.width = most
    console.print(table)
