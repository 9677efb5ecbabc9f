"""Sums a comparison up: both sides, and the gap in each measure, as tables and as JSON.

The measures are the loss, the loss of each MTP depth that both sides have, and bits per byte of held-out text where the
batches are not the same (`sides`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from statistics import median
from typing import Any

from dovetail.cost.count import parameters
from dovetail.train.compare import gap
from dovetail.train.compare.gap import Gap, SeedGap, percent, seed_gap
from dovetail.train.compare.pairs import HeldOutPair, Pair, Record, SideStep
from dovetail.train.compare.sides import Comparison, shown
from dovetail.train.run.run_file import resolve_model

Steps = tuple[list[SideStep], list[SideStep]]  # of A and of B
LARGEST = (">loss, largest smoothed",)
Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]  # title, header, rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side of the comparison."""

    name: str
    parameters: int  # MTP modules included
    active: int  # parameters that a token meets in the main model, the embedding left out
    steps: int  # in each seed
    tokens: int  # consumed in each seed
    seconds: float  # median time of a step
    skipped: int  # steps of all seeds that were not finite


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """All that a comparison found."""

    sides: tuple[Side, Side]
    changes: dict[str, tuple[Any, Any]]  # settings that differ, with A's value and B's
    unpaired: tuple[str, ...]  # what keeps the sides from seeing the same batches
    loss: Gap | None  # None where the sides do not learn from the same tokens
    mtp: tuple[Gap, ...]  # by depth
    held_out: tuple[Gap, ...]  # bits per byte, by text

    @property
    def gaps(self) -> tuple[Gap, ...]:
        return (*([] if self.loss is None else [self.loss]), *self.mtp, *self.held_out)

    @property
    def title(self) -> str:
        a, b = self.sides
        steps = f"{a.steps}" if a.steps == b.steps else f"{b.steps} against {a.steps}"
        seeds = len(self.gaps[0].seeds)
        return f"{b.name} against {a.name}: {seeds} seed{'s'[: seeds > 1]} of {steps} steps"


def summarize(what: Comparison, records: Sequence[Record]) -> Summary:
    """Sum up the records of whole seeds, which are in order."""
    seeds = {seed: list(each) for seed, each in groupby(records, key=lambda record: record.seed)}
    steps = {seed: _steps(each) for seed, each in seeds.items()}
    is_paired = not what.unpaired
    depths = min(resolve_model(side.model).num_nextn_predict_layers for side in what.sides)
    gaps = []  # of the loss, then of each MTP depth
    for depth in range(depths + 1) if what.is_same_text else ():
        name = f"MTP loss, depth {depth}" if depth else "loss"
        each_seed = (_gap(seed, *both, depth, is_paired) for seed, both in steps.items())
        gaps.append(Gap(measure=name, seeds=tuple(each_seed)))
    return Summary(
        sides=(_side(what, 0, steps.values()), _side(what, 1, steps.values())),
        changes=what.changes,
        unpaired=what.unpaired,
        loss=gaps[0] if gaps else None,
        mtp=tuple(gaps[1:]),
        held_out=tuple(_held_out(text, records) for text in what.held_out),
    )


def _steps(records: Iterable[Record]) -> Steps:
    pairs = [record for record in records if isinstance(record, Pair)]
    return [pair.a for pair in pairs if pair.a is not None], [pair.b for pair in pairs if pair.b is not None]


def _gap(seed: int, a: list[SideStep], b: list[SideStep], depth: int, is_paired: bool) -> SeedGap:
    losses = [[step.losses[depth] for step in side] for side in (a, b)]
    return seed_gap(seed, losses[0], losses[1], is_paired)


def _held_out(text: str, records: Iterable[Record]) -> Gap:
    found = [record for record in records if isinstance(record, HeldOutPair) and record.text == text]
    gaps = tuple(seed_gap(each.seed, [each.a], [each.b], is_paired=False) for each in found)
    return Gap(measure=f"bits per byte, {text}", seeds=gaps)


def _side(what: Comparison, index: int, seeds: Iterable[Steps]) -> Side:
    mine = [both[index] for both in seeds]
    counted = parameters(resolve_model(what.sides[index].model))
    return Side(
        name=what.names[index],
        parameters=counted.total_with_mtp,
        active=counted.active,
        steps=what.steps[index],
        tokens=mine[0][-1].tokens,
        seconds=median(step.seconds for steps in mine for step in steps),
        skipped=sum(step.skipped for steps in mine for step in steps),
    )


def as_json(summary: Summary) -> dict[str, Any]:
    """Return the summary as plain data. What is not known is null."""
    a, b = summary.sides
    return {
        "a": asdict(a),
        "b": asdict(b),
        "changes": {key: list(pair) for key, pair in summary.changes.items()},
        "unpaired": list(summary.unpaired),
        "time_ratio": b.seconds / a.seconds,
        "loss": None if summary.loss is None else gap.as_json(summary.loss),
        "mtp": [gap.as_json(each) for each in summary.mtp],
        "held_out": [gap.as_json(each) for each in summary.held_out],
    }


def tables(summary: Summary) -> Iterator[Table]:
    """Yield three tables: both sides, every measure, and every seed."""
    a, b = summary.sides
    yield summary.title, ("", f">{a.name}", f">{b.name}"), list(_side_rows(a, b))
    means = ("", f">{a.name}", f">{b.name}", ">difference", ">95 % interval")
    yield "\nmeans over seeds and the last quarter of the steps", means, [_gap_row(each) for each in summary.gaps]
    columns = ("seed", *(f">{each.measure}" for each in summary.gaps), *(() if summary.unpaired else LARGEST))
    yield "\ndifference by seed", columns, [row[: len(columns)] for row in _seed_rows(summary)]


def _side_rows(a: Side, b: Side) -> Iterator[tuple[str, ...]]:
    yield "parameters, MTP included", f"{a.parameters:,}", f"{b.parameters:,}"
    yield "active per token", f"{a.active:,}", f"{b.active:,}"
    yield "tokens of a seed", f"{a.tokens:,}", f"{b.tokens:,}"
    yield "step time, median", f"{1000 * a.seconds:.0f} ms", f"{1000 * b.seconds:.0f} ms"
    yield "relative step time", "1.00", f"{b.seconds / a.seconds:.2f}"
    yield "steps skipped", str(a.skipped), str(b.skipped)


def _gap_row(found: Gap) -> tuple[str, ...]:
    means = (sum(getattr(each, side) for each in found.seeds) / len(found.seeds) for side in "ab")
    return found.measure, *(f"{each:.4f}" for each in means), percent(found.mean), gap.interval(found)


def _seed_rows(summary: Summary) -> Iterator[tuple[str, ...]]:
    for index, first in enumerate(summary.gaps[0].seeds):
        yield str(first.seed), *(percent(each.seeds[index].gap) for each in summary.gaps), percent(first.largest)
    if len(summary.gaps[0].seeds) > 1:
        yield "standard deviation", *(f"{100 * each.deviation:.3f}%" for each in summary.gaps), ""


def notes(summary: Summary) -> Iterator[str]:
    """Yield sentences on what differs, and on what the numbers do and do not say."""
    a, b = summary.sides
    changes = [f"{key}: {shown(was)} -> {shown(now)}" for key, (was, now) in summary.changes.items()]
    more = f"; and {len(changes) - 6} more" if len(changes) > 6 else ""
    yield f"A is {a.name}, B is {b.name}; from A to B: {'; '.join(changes[:6])}{more}"
    for side in summary.sides:
        if side.skipped:
            yield f"{side.name}: {side.skipped} steps had a loss or gradient that was not finite and changed nothing"
    if summary.unpaired:
        yield _said_of_pairing(summary)
    for each in summary.gaps:
        yield gap.said(each, a.name, b.name)


def _said_of_pairing(summary: Summary) -> str:
    measure = "bits per byte of held-out text after the last step is what compares them"
    if summary.loss is None:
        reason = "; their losses per token do not, for they do not learn from the same tokens"
    else:
        reason = "; losses are means over other batches"
    return f"the sides do not see the same batches (other {', '.join(summary.unpaired)}): {measure}{reason}"
