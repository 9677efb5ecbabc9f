"""Data parallelism: the training step of two ranks of one thread beside one process with two threads, same batch.

It is the step of `dovetail train`: forward, backward, clip, AdamW, and rebalancing of experts; on ranks the exchange of
gradients too, and with ZeRO-1 that of weights. One process has the batch as one micro-batch, which suits it best, or
as the ranks have it. While one side runs, the processes of the others sleep.

The parts are those of `train.step.team`, in milliseconds of rank 0: backward (forward too), the wait for the rank whose
backward is slower, the sum of gradients over ranks, the norm and the update, and the gathering of weights.

Bar: two ranks make at least 0.85 of the tokens per second of one process.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from _ranks import Ranks, timed_together
from _sides import Case, Lap, Series, Turn, append_rows, in_rounds, print_table, ratio
from training_step import tokens_of

from dovetail.catalog.precision import load_recipe
from dovetail.catalog.presets import load_model
from dovetail.model.transformer import Transformer, initialize
from dovetail.spec.layout import Layout
from dovetail.spec.model import ModelSpec
from dovetail.text.corpus import Batch
from dovetail.train.layout.form import Blueprint, form_ranks
from dovetail.train.layout.table import LayoutConfig
from dovetail.train.step.optim import AdamW, AdamWConfig
from dovetail.train.step.schedule import Values
from dovetail.train.step.step import Objective, microbatches, team_step
from dovetail.train.step.team import Alone, Team

ALONE, ALONE_IN_PARTS = "one process", "one process, micro-batches as on ranks"
PARTS = ("backward", "wait", "add_up", "update", "gather")


@dataclass(frozen=True, slots=True, kw_only=True)
class PartedLap(Lap):
    parts: dict[str, float]  # seconds


class _Watch:
    """Seconds of a step's parts."""

    def __init__(self, team: Team, optimizer: AdamW) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        targets: list[tuple[Any, str, str]] = [(team, name, name) for name in ("backward", "add_up", "gather")]
        for target, name, part in [*targets, (optimizer, "squares", "update"), (optimizer, "step", "update")]:
            setattr(target, name, partial(self._timed, part, getattr(target, name)))

    def _timed(self, part: str, work: Any, *arguments: Any) -> Any:
        with self._noting(part):
            return work(*arguments)

    @contextmanager
    def _noting(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start


def build(spec: ModelSpec, dp: int, zero: int, size: int, length: int) -> Turn:
    """On a rank of `dp`; `size` sequences make a micro-batch."""
    values = Values(learning_rate=1e-4, batch_size=size, gamma=1e-3, mtp_weight=0.3)
    team = _team(spec, dp, zero, size, length)
    optimizer, steps = AdamW(team.parameters().items(), AdamWConfig()), itertools.count()

    def turn(case: Case) -> Lap:
        tokens = tokens_of(next(steps), case, spec.vocab_size)
        own = tokens.chunk(dp)[team.index]
        batch = Batch(tokens=own, document_ids=torch.zeros_like(own, dtype=torch.int32))
        watch.seconds.update(dict.fromkeys(PARTS, 0.0))
        lap = timed_together(lambda: team_step(team, optimizer, microbatches(batch, size), values, Objective()).loss)
        parts = dict(watch.seconds)
        slowest = torch.tensor(parts["backward"], dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        wait = float(slowest) - parts["backward"]
        parts |= {"wait": wait, "add_up": max(parts["add_up"] - wait, 0.0)}
        return PartedLap(seconds=lap.seconds, check=lap.check, parts=parts)

    watch = _Watch(team, optimizer)
    return turn


def _team(spec: ModelSpec, dp: int, zero: int, size: int, length: int) -> Team:
    if dp == 1:
        model = Transformer(spec)
        initialize(model, 0)
        return Alone(model)
    blueprint = Blueprint(
        spec=spec,
        dtype=torch.bfloat16,
        recompute=False,
        recipe=load_recipe("bf16"),
        sequence_length=length,
        seed=0,
    )
    layout = Layout.model_validate({"dp": dp, "zero": zero, "microbatch_size": size})
    return form_ranks(blueprint, layout, LayoutConfig(), torch.device("cpu"))


def main(
    model: Annotated[str, typer.Option(help="A preset: 20m, 104m, ...")] = "20m",
    batch: int = 8,
    length: int = 256,
    microbatch_size: Annotated[int, typer.Option(help="Sequences, on ranks.")] = 4,
    warmup: int = 2,
    repeats: int = 9,
    record: bool = True,
) -> None:
    spec = load_model(model)
    settings = {ALONE: (1, 0, batch), ALONE_IN_PARTS: (1, 0, microbatch_size)}
    settings |= {f"two ranks, zero {zero}": (2, zero, microbatch_size) for zero in (0, 1)}
    sides = {}
    for name, (dp, zero, size) in settings.items():
        sides[name] = Ranks(partial(build, spec, dp, zero, size, length), dp, cores=2 // dp)
    turns = {name: partial(side.turn, (batch, length, 0)) for name, side in sides.items()}
    results = in_rounds(turns, warmup, repeats, "step")
    for side in sides.values():
        side.stop()
    report(results, {"model": model, "batch": batch, "length": length, "microbatch_size": microbatch_size}, record)


def report(results: dict[str, Series], shape: dict[str, Any], record: bool) -> None:
    lines, rows = [], []
    for name, series in results.items():
        share = ratio(results[ALONE], series)  # tokens per second are as many for each
        parts = {part: statistics.median(lap.parts[part] for lap in _parted(series)) for part in PARTS}
        tokens = shape["batch"] * shape["length"] / series.median
        cells = [f"{series.median * 1e3:.0f}", f"{tokens:,.0f}", str(share)]
        cells += [f"{seconds * 1e3:.0f}" for seconds in parts.values()]
        lines.append([name, *cells, f"{series.laps[0].check:.4f}"])
        row = {**shape, "side": name, **series.summary(), "tokens_per_s": round(tokens, 1)}
        rows.append({**row, "of_one_process": asdict(share), "parts_s": parts})
    columns = ["side", "ms", "tokens/s", "of one process", *PARTS, "first loss"]
    print(f"training step, {shape['model']}, batch {shape['batch']} x {shape['length']}, two cores")
    print_table(columns, lines)
    if record:
        append_rows("data_parallel", rows)


def _parted(series: Series) -> list[PartedLap]:
    return [lap for lap in series.laps if isinstance(lap, PartedLap)]


if __name__ == "__main__":
    typer.run(main)
