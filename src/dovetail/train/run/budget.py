"""Finds how many steps fit in a given time, once at the start of a run."""

from __future__ import annotations

import json
import math
import time

from dovetail.catalog.precision import load_recipe
from dovetail.model.transformer import Transformer, initialize
from dovetail.text.atomic import write_bytes
from dovetail.text.corpus import read_batch
from dovetail.text.shards import TokenStore
from dovetail.train.report.display import Display
from dovetail.train.run.ranks import rank_and_world
from dovetail.train.run.run_file import RunConfig
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
    assert config.train.minutes is not None
    if rank_and_world()[1] > 1:
        raise ValueError("train.minutes is measured by one process; under torchrun set train.steps")
    train = config.train
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
