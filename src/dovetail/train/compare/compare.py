"""Trains two precision recipes side by side, and records how their losses differ.

Both have the same seed, data and initial weights.

Both models take each step on the same batch, one after the other, so that a difference in loss is the recipe's doing
and not the data's. A seed is that of initial weights and of the order of samples; `gap` sums several of them up.

    out/compare.toml    the settings; a comparison goes on only under the same ones
    out/compare.jsonl   one line for each pair of steps, as it happens: the fields of `pairs.Pair`
    out/tokenizer/      as in a run (`run`)
    out/tokens/

What was stopped goes on after its last whole seed: the weights of a seed under way are not kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dovetail.catalog.precision import load_recipe
from dovetail.config import Record, dump
from dovetail.model.precision import apply_recipe
from dovetail.model.transformer import Transformer, initialize
from dovetail.numerics.cpu.allocator import keep_freed_memory
from dovetail.spec.model import ModelSpec
from dovetail.text.atomic import write_bytes
from dovetail.text.corpus import Batch, read_batch
from dovetail.text.shards import TokenStore
from dovetail.train.compare.gap import Gap, summarize
from dovetail.train.compare.gap_picture import draw_gap
from dovetail.train.compare.live import CompareDisplay
from dovetail.train.compare.pairs import Pair, line, read_pairs, whole_seeds
from dovetail.train.run import run_file
from dovetail.train.run.loop import Interrupted
from dovetail.train.run.ranks import local_device
from dovetail.train.run.run_file import RunConfig
from dovetail.train.step.optim import AdamW
from dovetail.train.step.schedule import Position, TrainingSchedule, Values, values
from dovetail.train.step.step import Objective, microbatches, train_step

LOG = "compare.jsonl"


class Comparison(Record):
    """What is compared, as compare.toml has it."""

    recipe: str
    run: RunConfig  # of the base, whose recipe is run.train.precision

    @property
    def base(self) -> str:
        return self.run.train.precision

    @property
    def steps(self) -> int:
        """Of each seed."""
        assert self.run.train.steps is not None
        return self.run.train.steps


def comparison(
    config: RunConfig, recipe: str, base: str = "bf16", steps: int | None = None, out: Path | None = None
) -> Comparison:
    """The settings of `recipe` against `base` under a run file, whose directory and precision are not used.

    `steps` of each seed replace the run file's budget; `out` is by default beside the run's directory. Raises
    ValueError for a recipe that is none and for a budget in minutes.
    """
    names = {name: load_recipe(name).name for name in (base, recipe)}
    if steps is None and config.train.steps is None:
        raise ValueError(
            f"the run file asks for train.minutes = {config.train.minutes:g}; a comparison is counted in steps, so"
            " that both recipes take the same: give --steps"
        )
    train = config.train.model_copy(
        update={"precision": names[base], "steps": steps or config.train.steps, "minutes": None}
    )
    out = out or config.out.with_name(f"{config.out.name}-{base}-{recipe}")
    return Comparison(recipe=names[recipe], run=config.model_copy(update={"train": train, "out": out}))


def measure(settings: Comparison, num_seeds: int, picture: Path, display: CompareDisplay | None = None) -> Gap:
    """`compare`, summed up, and drawn into the PNG `picture`."""
    pairs = compare(settings, num_seeds, display)
    gap = summarize(settings.recipe, settings.base, pairs)
    draw_gap(pairs, gap, picture)
    return gap


def compare(settings: Comparison, num_seeds: int, display: CompareDisplay | None = None) -> list[Pair]:
    """The pairs of seeds run.train.seed, + 1, ... in order; those that compare.jsonl has are not run again.

    Raises ValueError for settings that cannot work and a directory with others, Interrupted on Ctrl-C.
    """
    keep_freed_memory()
    _check(settings)
    _claim(settings)
    seeds = [settings.run.train.seed + index for index in range(num_seeds)]
    path = settings.run.out / LOG
    found = whole_seeds(read_pairs(path), settings.steps) if path.exists() else {}
    missing = [seed for seed in seeds if seed not in found]
    if missing:
        write_bytes(path, "".join(line(pair) for pairs in found.values() for pair in pairs).encode())
        display = display or CompareDisplay(num_seeds, settings.steps)
        try:
            _run_seeds(settings, missing, found, display)
        finally:
            display.close()
    return [pair for seed in seeds for pair in found[seed]]


def _check(settings: Comparison) -> None:
    """Raises what stands against model or recipes, before anything is written; on models without memory."""
    config = settings.run
    spec, dtype = run_file.resolve_model(config.model), run_file.resolve_dtype(config.train.dtype, local_device())
    for name in (settings.base, settings.recipe):
        with torch.device("meta"):
            apply_recipe(Transformer(spec, dtype=dtype), load_recipe(name))


def _claim(settings: Comparison) -> None:
    path = settings.run.out / "compare.toml"
    text = dump(settings)
    if not path.exists():
        write_bytes(path, text.encode())
        return
    there, here = path.read_text("utf-8").splitlines(), text.splitlines()
    if there != here:
        was, now = ([line for line in lines if line not in others] for lines, others in ((there, here), (here, there)))
        raise ValueError(
            f"{path.parent} holds a comparison with other settings (there {', '.join(was[:3]) or 'none'}; now"
            f" {', '.join(now[:3]) or 'none'}); give another --out, or delete this one"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """What all seeds share."""

    settings: Comparison
    spec: ModelSpec
    schedule: TrainingSchedule
    store: TokenStore


def _run_seeds(
    settings: Comparison, seeds: Sequence[int], found: dict[int, list[Pair]], display: CompareDisplay
) -> None:
    """Run `seeds`, log their pairs and add them to `found`."""
    config = settings.run
    spec = run_file.resolve_model(config.model)
    schedule = run_file.resolve_schedule(config)
    tokenizer = run_file.prepare_tokenizer(config, spec, display.message)
    store, _ = run_file.prepare_stores(config, tokenizer, display.message)
    bench = _Bench(settings=settings, spec=spec, schedule=schedule, store=store)
    if found:
        display.message(f"seeds that are there: {', '.join(map(str, found))}")
    try:
        with open(config.out / LOG, "a", encoding="utf-8") as log:
            for seed in seeds:
                pairs = []
                for pair in _paired_steps(bench, seed):
                    log.write(line(pair))
                    log.flush()
                    pairs.append(pair)
                    display.update(pair, len(found))
                found[seed] = pairs
    except KeyboardInterrupt:
        message = f"stopped; {len(found)} whole seeds are kept in {config.out}, and the same command goes on after them"
        raise Interrupted(message) from None


def _paired_steps(bench: _Bench, seed: int) -> Iterator[Pair]:
    """All steps of one seed."""
    settings, train = bench.settings, bench.settings.run.train
    trainees = [_trainee(bench, name, seed) for name in (settings.base, settings.recipe)]
    objective = Objective(balance_alpha=train.balance_alpha, separate_documents=train.separate_documents)
    samples = tokens = 0
    for step in range(1, settings.steps + 1):
        at = Position(step=step, tokens=tokens, fraction=step / settings.steps)
        now = values(bench.schedule, at, batch_multiple=train.microbatch_size)
        batch = read_batch(bench.store, train.sequence_length, seed, samples, now.batch_size)
        samples += now.batch_size
        tokens += now.batch_size * train.sequence_length
        parts = microbatches(batch, train.microbatch_size)
        base, ours = (_timed_step(*trainee, parts, now, objective) for trainee in trainees)
        yield Pair(
            seed=seed,
            step=step,
            tokens=tokens,
            base_loss=base.loss,
            loss=ours.loss,
            base_skipped=base.is_skipped,
            skipped=ours.is_skipped,
            base_seconds=base.seconds,
            seconds=ours.seconds,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    loss: float
    is_skipped: bool
    seconds: float


def _timed_step(
    model: Transformer, optimizer: AdamW, parts: Sequence[Batch], now: Values, objective: Objective
) -> _Step:
    start = time.perf_counter()
    result = train_step(model, optimizer, parts, now, objective)
    loss = result.loss if math.isfinite(result.loss) else math.nan
    return _Step(loss=loss, is_skipped=not result.is_finite, seconds=time.perf_counter() - start)


def _trainee(bench: _Bench, name: str, seed: int) -> tuple[Transformer, AdamW]:
    """A new model under the recipe of that name, and its optimizer. Initial weights depend on the seed alone."""
    config, device, recipe = bench.settings.run, local_device(), load_recipe(name)
    with torch.device(device):
        dtype = run_file.resolve_dtype(config.train.dtype, device)
        model = Transformer(bench.spec, dtype=dtype, recompute=config.train.recompute)
    apply_recipe(model, recipe)
    initialize(model, seed)
    return model, AdamW(model.named_parameters(), config.optimizer, recipe.moments)
