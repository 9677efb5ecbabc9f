"""How long a run is: the steps that fit in a given time, found once, and the epochs of the text."""

from __future__ import annotations

import json
import math
import time
from collections import Counter

from dovetail.atomic import write_bytes
from dovetail.catalog.precision import load_recipe
from dovetail.model.transformer import Transformer, initialize
from dovetail.text.corpus import num_samples, read_batch
from dovetail.text.shards import TokenStore
from dovetail.train.report.display import Display
from dovetail.train.run.ranks import rank_and_world
from dovetail.train.run.run_file import RunConfig, TrainConfig
from dovetail.train.step.optim import AdamW
from dovetail.train.step.schedule import Position, TrainingSchedule, values
from dovetail.train.step.step import Objective, microbatches, train_step

STEPS_TO_MEASURE = 24
STEPS_TO_WARM_UP = 8  # compile kernels and set up matrix products; not counted


def steps_in_time(
    config: RunConfig, schedule: TrainingSchedule, model: Transformer, store: TokenStore, display: Display
) -> int:
    """How many steps fit in train.minutes; measured once, then kept with the run so that resuming is exact."""
    path = config.out / "budget.json"
    if path.exists():
        return int(json.loads(path.read_text())["num_steps"])
    train = config.train
    assert train.minutes is not None and rank_and_world()[1] == 1  # `checks.check_run` has seen to it
    initialize(model, train.seed)
    optimizer = AdamW(model.named_parameters(), config.optimizer, load_recipe(train.precision).moments)
    times = []
    for step in range(STEPS_TO_WARM_UP + STEPS_TO_MEASURE):
        start = time.perf_counter()
        now = values(schedule, Position(step=1, fraction=0.5), batch_multiple=train.microbatch_size)
        batch = read_batch(store, train.sequence_length, train.seed, step * now.batch_size, now.batch_size)
        train_step(model, optimizer, microbatches(batch, train.microbatch_size), now, Objective())
        times.append(time.perf_counter() - start)
    seconds = sorted(times[STEPS_TO_WARM_UP:])[STEPS_TO_MEASURE // 2]
    num_steps = max(1, math.floor(60 * train.minutes / seconds))
    display.message(f"{train.minutes:g} minutes at {1000 * seconds:.0f} ms a step: {num_steps} steps")
    write_bytes(path, json.dumps({"num_steps": num_steps, "step_seconds": seconds}).encode())
    return num_steps


def budget_line(train: TrainConfig, schedule: TrainingSchedule, store: TokenStore, num_steps: int) -> str:
    """Say how many epochs of the text the run is. Raises ValueError for text that is shorter than a sample."""
    samples, least, most = samples_of(train, schedule, num_steps)
    batch = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    epochs = samples / num_samples(store, train.sequence_length)
    shown = f"{epochs:,.1f}" if epochs >= 1 else f"{epochs:.2g}"
    return f"{num_steps:,} steps of {batch} x {train.sequence_length} tokens: {shown} epochs of the training text"


def samples_of(train: TrainConfig, schedule: TrainingSchedule, num_steps: int) -> tuple[int, int, int]:
    """Return the samples that the run takes, and the smallest and the largest of its batches."""
    multiple, tokens, sizes = train.microbatch_size * rank_and_world()[1], 0, Counter[int]()
    is_constant = len(schedule.batch_size.segments) == 1
    for step in range(1, (1 if is_constant else num_steps) + 1):
        at = Position(step=step, tokens=tokens, fraction=step / num_steps)
        size = values(schedule, at, batch_multiple=multiple).batch_size
        sizes[size] += num_steps if is_constant else 1
        tokens += size * train.sequence_length
    return sum(size * count for size, count in sizes.items()), min(sizes), max(sizes)
