"""All tables of `dovetail reproduce`: published numbers that are counted or predicted, beside ours.

`expected.toml` has the printed values, digit for digit, and the targets of predictions. Ours are always computed, by
the code that counts and plans. A row that the paper's own numbers contradict says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dovetail.config import near_matches, read_toml
from dovetail.planner.figure import number
from dovetail.reproduce import (
    arithmetic,
    best_layout,
    counts,
    expert_exchange,
    network,
    pipelines,
    ring_routing,
    serving,
    speed_limit,
    table3,
    training_step,
)
from dovetail.reproduce.rows import Found, Row, Table

HEADER = ("", "", ">paper", ">ours", ">differs by", ">target", "reproduced", "source")
FINDERS: Mapping[str, Callable[[], Found]] = {
    "table1": counts.cache,
    "table2": counts.compute,
    "speed_limit": speed_limit.find,
    "cost": arithmetic.cost,
    "deployment": arithmetic.deployment,
    "table4": training_step.find,
    "production": serving.find,
    "search": best_layout.find,
    "dualpipe": pipelines.find,
    "table3": table3.find,
    "table5": network.latencies,
    "fig5": network.large_exchanges,
    "fig6": network.small_exchanges,
    "fig7": expert_exchange.bandwidths,
    "low_latency": expert_exchange.times,
    "fig8": ring_routing.find,
    "node_limited": network.node_limited,
}
EXPERIMENTS = {  # modules beside this one, which load torch, so the command line imports them when they are run
    "fp8_accumulation": "half a minute",
    "fp8_loss_gap": "trains for 15 minutes",
}
_EXPECTED = Path(__file__).with_name("expected.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The tables that were asked for."""

    title: str
    source: str
    tables: tuple[Table, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(row for table in self.tables for row in table.rows)

    @property
    def is_reproduced(self) -> bool:
        """Whether every row, exact and predicted, is reproduced, except those where the paper contradicts itself."""
        return all(table.is_reproduced for table in self.tables)


def reproduce(names: Sequence[str] = (), picture: Path | None = None) -> Report:
    """Make the tables called `names`, or all of them, which takes some 20 s, most of it for `search`.

    Raises ValueError for an unknown name, for the name of an experiment, and for a picture, which no table has.
    """
    for name in names:
        if name in EXPERIMENTS:
            raise ValueError(f"{name} is an experiment, which is run by itself: dovetail reproduce {name}")
        if name not in FINDERS:
            raise ValueError(f"no table {name!r} to reproduce; {near_matches(name, [*FINDERS, *EXPERIMENTS])}")
    if picture is not None:
        what = ", ".join(names) or "all tables together"
        raise ValueError(f"{what}: no picture to write to {picture}; --out is for {', '.join(EXPERIMENTS)}")
    tables = tuple(make_table(name) for name in names or FINDERS)
    if len(tables) == 1:
        return Report(title=tables[0].title, source=tables[0].source, tables=tables)
    return Report(
        title="What DeepSeek published, beside our figures", source="[V3, ISCA, day 6, DualPipe]", tables=tables
    )


def make_table(name: str) -> Table:
    """Return the expected rows of `name` with our numbers."""
    entry, found = read_toml(_EXPECTED)[name], FINDERS[name]()
    source, rows = entry["source"], entry["rows"]
    return Table(
        name=name,
        title=entry["title"],
        source=source,
        rows=tuple(
            Row(**{"source": source, **row, "ours": found.values[row["subject"], row["quantity"]]}) for row in rows
        ),
        remarks=found.remarks,
    )


def as_json(report: Report) -> dict[str, Any]:
    """Return plain data, with the verdicts."""
    return {"is_reproduced": report.is_reproduced, "tables": [_table_json(table) for table in report.tables]}


def printed_rows(report: Report) -> Iterator[tuple[str, ...]]:
    """Yield the rows to print: of several tables each begins with a line of its own."""
    for table in report.tables:
        if len(report.tables) > 1:
            yield table.name, *[""] * (len(HEADER) - 1)
        before = ""
        for row in table.rows:
            yield (
                "" if row.subject == before else row.subject,
                row.quantity,
                row.paper,
                _ours(row),
                _difference(row),
                row.within or ("exact" if row.paper else ""),
                row.verdict,
                row.source if row.paper else "",
            )
            before = row.subject


def printed_notes(report: Report) -> Iterator[str]:
    """Yield the lines below the tables: where the paper is inconsistent, remarks, misses, and at last the counts."""
    rows = report.rows
    yield from (f"{_name(row)}: the paper is inconsistent: {row.note}" for row in rows if row.is_inconsistent)
    yield from (f"{_name(row)}: {row.note}" for row in rows if row.note and not row.is_inconsistent)
    yield from (f"{table.name}: {remark}" for table in report.tables for remark in table.remarks)
    for row in rows:
        if row.verdict in ("MISSED", "NO"):
            cause = f"; likely cause: {row.cause}" if row.cause else ""
            yield f"{row.verdict}: {_name(row)}: {_difference(row)}{cause}"
    if len(report.tables) == len(FINDERS):
        yield "run by name: " + ", ".join(f"{name} ({time})" for name, time in EXPERIMENTS.items())
    yield from _summary(report)


def _summary(report: Report) -> Iterator[str]:
    found = Counter(row.verdict for row in report.rows)
    exact = found["exact"] + found["NO"]
    if exact:
        contradicted = found["paper inconsistent"]
        more = f"; contradicted by the paper's own numbers: {contradicted}" if contradicted else ""
        yield f"exact: {found['exact']} of {exact} reproduced{more}"
    predicted = [row for row in report.rows if row.within is not None]
    if predicted:
        hindsight = found["yes, in hindsight"]
        more = f", {hindsight} of these in hindsight" if hindsight else ""
        banded = [row for row in predicted if row.ours.low < row.ours.high]
        in_band = f"; {sum(row.is_in_band for row in banded)} have the published value in their band" if banded else ""
        yield (
            f"predicted: {found['yes'] + hindsight} of {len(predicted)} within their target{more}; {found['MISSED']}"
            f" missed{in_band}"
        )


def _name(row: Row) -> str:
    return f"{row.subject}, {row.quantity}"


def _ours(row: Row) -> str:
    band = row.ours
    if band.low == band.high:
        return f"{band.value:.6g}" if abs(band.value) < 1e6 else number(band.value)
    digits = 4 if f"{band.low:.4g}" != f"{band.high:.4g}" else 6
    ends = (f"{each:.{digits}g}" if abs(each) < 1e4 else f"{each:.0f}" for each in (band.value, band.low, band.high))
    return "{} ({} to {})".format(*ends)


def _difference(row: Row) -> str:
    if row.difference is None:
        return ""
    return f"{row.difference:+.2f} points" if row.is_in_points else f"{row.difference:+.2%}"


def _table_json(table: Table) -> dict[str, Any]:
    rows: Iterable[dict[str, Any]] = (
        asdict(row) | {"difference": row.difference, "is_reproduced": row.is_reproduced, "verdict": row.verdict}
        for row in table.rows
    )
    return asdict(table) | {"is_reproduced": table.is_reproduced, "rows": list(rows)}
