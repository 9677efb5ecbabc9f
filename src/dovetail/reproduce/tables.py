"""Tables 1 and 2 of the ISCA paper, counted anew from the model descriptions [ISCA §2.1.2, §2.2.2].

`expected.toml` has the printed values; a row that the paper's own numbers contradict says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dovetail.catalog.presets import load_model
from dovetail.config import near_matches, read_toml
from dovetail.cost import count

CONTEXT = 4096  # tokens [ISCA Table 2]
HEADER = ("model", "quantity", ">paper", ">ours", ">differs by", "reproduced")
EXPERIMENTS = (
    "fp8_accumulation",
    "fp8_loss_gap",
)  # modules beside this one; they load torch, so the command line imports them late
_EXPECTED = Path(__file__).with_name("expected.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One number of a paper's table beside ours."""

    model: str
    quantity: str
    paper: str  # the digits as printed
    ours: float
    is_inconsistent: bool  # the paper contradicts itself here; `note` says how
    note: str

    @property
    def difference(self) -> float:
        """Relative to the printed value."""
        return self.ours / float(self.paper) - 1

    @property
    def is_reproduced(self) -> bool:
        """Whether ours, rounded to as many decimals, gives the printed digits."""
        decimals = len(self.paper.partition(".")[2])
        return f"{self.ours:.{decimals}f}" == self.paper


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    name: str
    title: str
    source: str
    rows: tuple[Row, ...]

    @property
    def is_reproduced(self) -> bool:
        """Every row agrees, but for those where the paper contradicts itself."""
        return all(row.is_reproduced or row.is_inconsistent for row in self.rows)


def table_names() -> list[str]:
    """The tables that `reproduce` takes."""
    return list(read_toml(_EXPECTED))


def reproduce(name: str, picture: Path | None = None) -> Table:
    """One table of the paper. Raises ValueError for a name that is not known, and for a picture, which it has none."""
    expected = read_toml(_EXPECTED)
    if name not in expected:
        raise ValueError(f"no table {name!r} to reproduce; {near_matches(name, [*expected, *EXPERIMENTS])}")
    if picture is not None:
        raise ValueError(f"{name} has no picture to write to {picture}; --out is for {', '.join(EXPERIMENTS)}")
    entry = expected[name]
    return Table(
        name=name,
        title=entry["title"],
        source=entry["source"],
        rows=tuple(_row(row) for row in entry["rows"]),
    )


def as_json(table: Table) -> dict[str, Any]:
    """Plain data, with the verdicts."""
    verdicts = [{"difference": row.difference, "is_reproduced": row.is_reproduced} for row in table.rows]
    rows = [asdict(row) | verdict for row, verdict in zip(table.rows, verdicts, strict=True)]
    return asdict(table) | {"is_reproduced": table.is_reproduced, "rows": rows}


def printed_rows(table: Table) -> Iterable[tuple[str, ...]]:
    """What a person reads: model, quantity, paper, ours, difference, whether it is reproduced."""
    for row in table.rows:
        verdict = "yes" if row.is_reproduced else "no, see below" if row.is_inconsistent else "NO"
        yield (
            row.model,
            row.quantity,
            row.paper,
            f"{row.ours:.6g}",
            f"{row.difference:+.2%}",
            verdict,
        )


def printed_notes(table: Table) -> Iterable[str]:
    """What has to be said beside the numbers, the paper's own inconsistencies first."""
    for row in sorted(table.rows, key=lambda row: not row.is_inconsistent):
        if row.note:
            opening = "the paper is inconsistent: " if row.is_inconsistent else ""
            yield f"{row.model}, {row.quantity}: {opening}{row.note}"


def _row(entry: dict[str, Any]) -> Row:
    return Row(
        model=entry["model"],
        quantity=entry["quantity"],
        paper=entry["paper"],
        ours=_ours(entry["model"], entry["quantity"]),
        is_inconsistent=entry.get("inconsistent", False),
        note=entry.get("note", ""),
    )


def _ours(model: str, quantity: str) -> float:
    spec = load_model(model)
    match quantity:
        case "KB per token":
            return count.cache_bytes_per_token(spec) / 1000
        case "times DeepSeek-V3":
            return count.cache_bytes_per_token(spec) / count.cache_bytes_per_token(load_model("deepseek-v3"))
        case "parameters, B":
            return count.parameters(spec).total / 1e9
        case "active parameters, B":
            return count.parameters(spec).active / 1e9
        case "GFLOP per token":
            return count.training_flop_per_token(spec, CONTEXT) / 1e9
    raise AssertionError(f"expected.toml asks for {quantity!r}, which nothing here counts")
