"""Trains two runs side by side over several seeds, and logs the losses of both.

The two sides take their steps in turn, each exactly as `dovetail train` would (`train.run.loop.advance`). A seed
decides the initial weights and the order of samples. The first seed of a side is its own train.seed, and the next ones
follow; records name a seed by A's.

    out/compare.toml    the settings; a comparison goes on only under the same ones
    out/compare.jsonl   one line per pair of steps and per measurement, written as it happens (`pairs`)
    out/compare.png     the picture
    out/tokenizer/      as in a run's directory; in out/a/ and out/b/ where the sides have different tokenizers
    out/tokens/

A comparison that was stopped goes on after its last whole seed, because the weights of the seed under way are not kept.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dovetail.atomic import write_bytes
from dovetail.config import as_table, dump, read_toml
from dovetail.model.transformer import initialize
from dovetail.numerics.cpu.process import settle_process
from dovetail.spec.model import ModelSpec
from dovetail.text.prepare import prepare_store
from dovetail.text.shards import TokenStore
from dovetail.text.tokenizer import Tokenizer
from dovetail.train.compare.live import CompareDisplay
from dovetail.train.compare.pairs import HeldOutPair, Pair, Record, SideStep, line, read_records, whole_seeds
from dovetail.train.compare.picture import draw
from dovetail.train.compare.sides import Comparison
from dovetail.train.compare.summary import Summary, summarize
from dovetail.train.layout.ranks import local_device
from dovetail.train.report.peak import Peak
from dovetail.train.run import run_file
from dovetail.train.run.budget import Pace
from dovetail.train.run.claim import check_same, only_run
from dovetail.train.run.evaluate import held_out
from dovetail.train.run.loop import advance
from dovetail.train.run.run_file import RunConfig
from dovetail.train.run.state import Counters, Run
from dovetail.train.run.stop import Interrupted
from dovetail.train.step.schedule import TrainingSchedule
from dovetail.train.step.team import Alone

LOG = "compare.jsonl"


def measure(
    what: Comparison, num_seeds: int, picture: Path | None = None, display: CompareDisplay | None = None
) -> Summary:
    """Run a comparison, sum it up, and draw it into the PNG `picture`, which is by default out/compare.png."""
    records = compare(what, num_seeds, display)
    summary = summarize(what, records)
    draw(summary, records, picture or what.out / "compare.png")
    return summary


def compare(what: Comparison, num_seeds: int, display: CompareDisplay | None = None) -> list[Record]:
    """Run a comparison and return its records, seed by seed. Seeds that compare.jsonl has are not run again.

    Raises ValueError for settings that cannot work and for a directory with other settings, and Interrupted on Ctrl-C.
    """
    settle_process()
    for side in what.sides:  # so that what cannot run is refused before anything is written
        run_file.build_optimizer(side, Alone(run_file.build_model(side, torch.device("meta"))))
    with only_run(what.out, "this comparison is being made by another process"):
        return _compare(what, num_seeds, display)


def _compare(what: Comparison, num_seeds: int, display: CompareDisplay | None) -> list[Record]:
    keep_settings(what)
    first, steps = what.settings.a.train.seed, max(what.steps)
    seeds = [first + index for index in range(num_seeds)]
    path = what.out / LOG
    found = whole_seeds(read_records(path), steps, list(what.held_out)) if path.exists() else {}
    missing = [seed for seed in seeds if seed not in found]
    if missing:
        write_bytes(path, "".join(line(record) for records in found.values() for record in records).encode())
        display = display or CompareDisplay(num_seeds, steps, what.names, is_paired=not what.unpaired)
        try:
            _run_seeds(what, missing, found, display)
        finally:
            display.close()
    return [record for seed in seeds for record in found[seed]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """What all seeds of one side have in common."""

    config: RunConfig
    spec: ModelSpec
    schedule: TrainingSchedule
    tokenizer: Tokenizer
    store: TokenStore
    texts: dict[str, TokenStore]  # held-out texts on which the side is measured


def keep_settings(what: Comparison) -> None:
    """Write the settings, or check that the comparison that is there was made with the same ones.

    Before the first record they may change: the tokenizer is made again then.
    """
    path, log = what.out / "compare.toml", what.out / LOG
    there, here = read_toml(path) if path.exists() else {}, as_table(what.settings)
    if there and log.exists() and log.stat().st_size:
        title, outs = f"{what.out} holds a comparison with other settings", ("a.out", "b.out")
        check_same(there, here, title, "give another --out", outs)
    elif there and there != here:
        for tokenizer in {side.out / "tokenizer" for side in what.sides}:
            shutil.rmtree(tokenizer, ignore_errors=True)
    if there != here:
        write_bytes(path, dump(what.settings).encode())


def _prepare(what: Comparison, config: RunConfig, report: Callable[[str], None]) -> _Side:
    spec = run_file.resolve_model(config.model)
    tokenizer = run_file.prepare_tokenizer(config, spec, report)
    tokens = config.out / "tokens"
    return _Side(
        config=config,
        spec=spec,
        schedule=run_file.resolve_schedule(config),
        tokenizer=tokenizer,
        store=prepare_store(config.data, tokenizer, tokens, "train"),
        texts={name: prepare_store(data, tokenizer, tokens, "held_out") for name, data in what.held_out.items()},
    )


def _run_seeds(what: Comparison, seeds: Sequence[int], found: dict[int, list[Record]], display: CompareDisplay) -> None:
    """Run `seeds`, log their records, and add these to `found`."""
    sides = [_prepare(what, config, display.message) for config in what.sides]
    for store in {side.store.directory: side.store for side in sides}.values():
        display.message(f"training text: {store.num_bytes / 1e6:.1f} MB, {store.num_tokens:,} tokens")
    if found:
        display.message(f"seeds that are there: {', '.join(map(str, found))}")
    try:
        with open(what.out / LOG, "a", encoding="utf-8") as log:
            for seed in seeds:
                records = []
                for record in _records(sides, seed - what.settings.a.train.seed):
                    log.write(line(record))
                    log.flush()
                    records.append(record)
                    if isinstance(record, Pair):
                        display.update(record, len(found))
                found[seed] = records
    except KeyboardInterrupt:
        message = f"stopped; {len(found)} whole seeds are kept in {what.out}, and the same command goes on after them"
        raise Interrupted(message) from None


def _records(sides: Sequence[_Side], index: int) -> Iterator[Record]:
    """Run one seed and yield its records."""
    runs, counters = [_start(side, index) for side in sides], [Counters(), Counters()]
    seed = runs[0].config.train.seed
    for step in range(1, max(run.num_steps for run in runs) + 1):
        taken = map(_timed_step, runs, counters)
        yield Pair(seed=seed, step=step, a=next(taken), b=next(taken))
    for text in sides[0].texts:
        a, b = (_bits_per_byte(run, side.texts[text]) for run, side in zip(runs, sides, strict=True))
        yield HeldOutPair(seed=seed, text=text, a=a, b=b)


def _timed_step(run: Run, counters: Counters) -> SideStep | None:
    """Take the next step of a side. Returns None after its last one."""
    if counters.step == run.num_steps:
        return None
    start = time.perf_counter()
    result, _ = advance(run, counters)
    loss, *mtp = (each if math.isfinite(each) else math.nan for each in (result.loss, *result.mtp_losses))
    return SideStep(
        tokens=counters.tokens,
        loss=loss,
        mtp=mtp,
        skipped=not result.is_finite,
        seconds=time.perf_counter() - start,
    )


def _bits_per_byte(run: Run, text: TokenStore) -> float:
    train = run.config.train
    return held_out(run.team, text, train.sequence_length, train.microbatch_size)[1]


def _start(side: _Side, index: int) -> Run:
    """Return a side before its first step. Its initial weights depend on the model and the seed alone."""
    train = side.config.train.model_copy(update={"seed": side.config.train.seed + index})
    assert train.steps is not None
    config = side.config.model_copy(update={"train": train})
    team = Alone(run_file.build_model(config, local_device()))
    initialize(team.models[0], train.seed)
    return Run(
        config=config,
        spec=side.spec,
        schedule=side.schedule,
        tokenizer=side.tokenizer,
        train_store=side.store,
        held_out_store=None,
        team=team,
        optimizer=run_file.build_optimizer(config, team),
        ema=None,
        pace=Pace(train.steps),
        peak=Peak(lambda seconds: math.nan),  # it is for MFU, which a comparison does not report
    )
