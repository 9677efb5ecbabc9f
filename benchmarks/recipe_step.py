"""One training step in a precision recipe beside the same step in BF16: what its rounding costs on this machine.

Whole steps (MTP, balancing, clip, AdamW) on the same weights and the same random tokens, a fresh batch each step. On a
CPU nothing is gained by FP8: products run in BF16 units on values of the 8-bit grid, and every operand is rounded on
top. It is for seeing what a recipe does to training, at a bearable price.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict
from functools import partial
from typing import Annotated

import torch
import typer
from _machine import measure_ceilings, use_threads
from _sides import Build, Case, Lap, Turn, append_rows, print_table, ratio, take_turns, timed
from training_step import tokens_of

from dovetail.catalog.precision import load_recipe
from dovetail.catalog.presets import load_model
from dovetail.model.precision import apply_recipe
from dovetail.model.transformer import Transformer, initialize
from dovetail.numerics.cpu.allocator import keep_freed_memory
from dovetail.text.corpus import Batch
from dovetail.train.step.optim import AdamW, AdamWConfig
from dovetail.train.step.schedule import Values
from dovetail.train.step.step import Objective, train_step

BASE = "bf16"
STEPS = 3  # per turn


def build_side(model_name: str, recipe: str, threads: int | None) -> Turn:
    use_threads(threads)
    keep_freed_memory()
    spec = load_model(model_name)
    model = Transformer(spec)
    initialize(model, 0)
    apply_recipe(model, load_recipe(recipe))
    optimizer, steps = AdamW(model.named_parameters(), AdamWConfig(), load_recipe(recipe).moments), itertools.count()

    def step(tokens: torch.Tensor) -> float:
        values = Values(learning_rate=1e-4, batch_size=len(tokens), gamma=1e-3, mtp_weight=0.3)
        batch = Batch(tokens=tokens, document_ids=torch.zeros_like(tokens, dtype=torch.int32))
        return train_step(model, optimizer, [batch], values, Objective()).loss

    def turn(case: Case) -> Lap:
        laps = [timed(partial(step, tokens_of(next(steps), case, spec.vocab_size))) for _ in range(STEPS)]
        return Lap(seconds=[second for lap in laps for second in lap.seconds], check=laps[0].check)

    return turn


def main(
    model: Annotated[str, typer.Option(help="A preset: quickstart, 20m, ...")] = "quickstart",
    recipe: Annotated[list[str], typer.Option(help="Precision recipes beside bf16.")] = ["deepseek-v3"],  # noqa: B006
    batch: int = 4,
    length: int = 256,
    warmup: int = 3,
    repeats: int = 9,
    threads: int | None = None,
    record: bool = True,
) -> None:
    use_threads(threads)
    ceilings = measure_ceilings()
    builds: dict[str, Build] = {name: partial(build_side, model, name, threads) for name in [BASE, *recipe]}
    case = (batch, length, 0)
    results = {name: series for (name, _), series in take_turns(builds, [case], warmup, repeats).items()}
    lines, rows = [], []
    for name, series in results.items():
        times_base = ratio(series, results[BASE])
        cells = [f"{series.median * 1e3:.1f}", f"{min(series.seconds) * 1e3:.1f}", str(times_base)]
        lines.append([name, *cells, f"{series.laps[0].check:.4f}"])
        row = {"model": model, "batch": batch, "length": length, "side": name, **series.summary()}
        rows.append({**row, "times_bf16": asdict(times_base), "ceilings": asdict(ceilings)})
    print(f"training step, {model}, batch {batch} x {length}; {ceilings}")
    print_table(["recipe", "ms", "min", "time / bf16", "first loss"], lines)
    if record:
        append_rows("recipe_step", rows)


if __name__ == "__main__":
    typer.run(main)
