"""A training step as a plan has it on this machine's own calibration, beside the same step as it is trained.

Every round calibrates (`dovetail calibrate`'s measurements, nothing else), plans each recipe's step on the cluster that
results, and then trains for some steps: so a slow minute is in both. Memory is what `dovetail quickstart` prints:
predicted from the description, measured as tensors that exist and that autograd keeps.

A plan's seconds are those of operations that run undisturbed (the tenth percentile of their runs). A step is hundreds
of them, and on a machine with other work none runs undisturbed from end to end; so with one thread the processor's
seconds are what to compare, and the clock's stand beside them.
"""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Annotated, Any

import torch
import typer
from _machine import use_threads
from _sides import append_rows, print_table, progress
from training_step import tokens_of

from dovetail.calibrate.machine import measure
from dovetail.catalog.precision import load_recipe
from dovetail.catalog.presets import load_model
from dovetail.cost.memory.process import training_memory
from dovetail.model.precision import apply_recipe
from dovetail.model.transformer import Transformer, initialize
from dovetail.numerics.cpu.allocator import keep_freed_memory
from dovetail.planner.training.chunks import Workload
from dovetail.planner.training.plan import TrainingGoal, TrainingPlan, evaluate
from dovetail.spec.hardware import Cluster
from dovetail.spec.layout import Layout
from dovetail.spec.model import ModelSpec
from dovetail.text.corpus import Batch
from dovetail.train.run.footprint import measure_step
from dovetail.train.step.optim import AdamW, AdamWConfig
from dovetail.train.step.schedule import Values
from dovetail.train.step.step import Objective, train_step

Times = tuple[float, float]  # seconds of the clock, of the processor


class Training:
    """A model in a recipe, and what trains it."""

    def __init__(self, spec: ModelSpec, recipe: str, batch: int, length: int) -> None:
        self.spec, self.batch, self.length = spec, batch, length
        self.recipe = load_recipe(recipe)
        self.model = Transformer(spec)
        initialize(self.model, 0)
        apply_recipe(self.model, self.recipe)
        self.optimizer = AdamW(self.model.named_parameters(), AdamWConfig(), self.recipe.moments)
        self.laps: list[list[Times]] = []  # of each round
        self.plans: list[TrainingPlan] = []
        self._count = itertools.count()

    def step(self) -> Times:
        """One, on a batch of its own."""
        tokens = tokens_of(next(self._count), (self.batch, self.length, 0), self.spec.vocab_size)
        batch = Batch(tokens=tokens, document_ids=torch.zeros_like(tokens, dtype=torch.int32))
        values = Values(learning_rate=1e-4, batch_size=self.batch, gamma=1e-3, mtp_weight=0.3)
        start, processor = time.perf_counter(), time.process_time()
        train_step(self.model, self.optimizer, [batch], values, Objective())
        return time.perf_counter() - start, time.process_time() - processor

    def plan(self, cluster: Cluster) -> TrainingPlan:
        """On one rank, one micro-batch to a step, nothing made again for the backward pass: as quickstart trains."""
        work = Workload(
            spec=self.spec,
            cluster=cluster,
            layout=Layout(microbatch_size=self.batch),
            recipe=self.recipe,
            sequence_length=self.length,
            recompute=False,
        )
        return evaluate(work, TrainingGoal(batch=self.batch))

    def memory(self) -> tuple[int, int]:
        """Bytes, predicted and measured; the moving average of the weights, which quickstart has, in neither."""
        tokens = self.batch * self.length
        predicted = training_memory(self.spec, tokens, recipe=self.recipe, moving_average=False, gradient_bytes=2)
        measured = measure_step(self.model, self.length, self.batch)
        parts = [self.model.state_dict(), *self._optimizer_parts()]
        held = {
            each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
            for part in parts
            for each in part.values()
        }
        return predicted.total, sum(held.values()) + measured.gradient_bytes + measured.saved_bytes

    def _optimizer_parts(self) -> list[dict[str, torch.Tensor]]:
        return list(self.optimizer.state().values())


def tenth(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 10]


def main(
    model: Annotated[str, typer.Option(help="A preset: quickstart, 20m, ...")] = "quickstart",
    recipe: Annotated[list[str], typer.Option(help="Precision recipes.")] = ["bf16", "deepseek-v3"],  # noqa: B006
    batch: int = 4,
    length: int = 256,
    rounds: int = 3,
    steps: Annotated[int, typer.Option(help="In each round.")] = 20,
    seconds: Annotated[float, typer.Option(help="Of calibration in each round.")] = 45.0,
    threads: int | None = None,
    record: bool = True,
) -> None:
    use_threads(threads)
    keep_freed_memory()
    trainings = {name: Training(load_model(model), name, batch, length) for name in recipe}
    for training in trainings.values():
        for _ in range(3):  # compiles, sets up
            training.step()
    for index in range(rounds):
        cluster = measure(seconds)
        for name, training in trainings.items():
            training.plans.append(training.plan(cluster))
            training.laps.append([training.step() for _ in range(steps)])
            planned = f"{training.plans[-1].step_seconds.value * 1e3:.1f} ms planned"
            clock, processor = (tenth(list(each)) * 1e3 for each in zip(*training.laps[-1], strict=True))
            progress(f"round {index + 1}, {name}: {planned}, {clock:.1f} trained, {processor:.1f} of the processor")
    lines, rows = [], []
    for name, training in trainings.items():
        row = summary(training)
        rows.append({"model": model, "recipe": name, "batch": batch, "length": length, **row})
        lines += table(name, row)
    print(f"training step, {model}, batch {batch} x {length}, {rounds} rounds of {steps} steps")
    print_table(["", "predicted", "measured", "predicted / measured"], lines)
    if record:
        append_rows("calibrated_step", rows)


def summary(training: Training) -> dict[str, Any]:
    """Medians over the rounds, and every round's own."""
    bands = [plan.step_seconds for plan in training.plans]
    of = {
        f"{what}_{name}": [each([lap[index] for lap in laps]) for laps in training.laps]
        for index, what in enumerate(("clock", "processor"))
        for name, each in (("p10", tenth), ("median", statistics.median))
    }
    predicted_bytes, measured_bytes = training.memory()
    return {
        "predicted_s": statistics.median(band.value for band in bands),
        "predicted_low_s": statistics.median(band.low for band in bands),
        "predicted_high_s": statistics.median(band.high for band in bands),
        **{f"{name}_s": statistics.median(each) for name, each in of.items()},
        "rounds_predicted_s": [band.value for band in bands],
        "rounds": of,
        "rounds_launch_us": [plan.work.cluster.gpu.efficiency.launch_us.value for plan in training.plans],
        "predicted_bytes": predicted_bytes,
        "measured_bytes": measured_bytes,
        "steps": sum(map(len, training.laps)),
    }


def table(name: str, row: dict[str, Any]) -> list[list[str]]:
    planned, lines = row["predicted_s"], []
    alone = ("processor_p10", "processor_median") if torch.get_num_threads() == 1 else ()  # of several threads: a sum
    for what in ("clock_p10", "clock_median", *alone):
        took = row[f"{what}_s"]
        cells = [f"{planned * 1e3:.1f}", f"{took * 1e3:.1f}", f"{planned / took:.3f}"]
        lines.append([f"{name}: ms, {what.replace('_', ' ')}", *cells])
    predicted, measured = row["predicted_bytes"], row["measured_bytes"]
    ratio = f"{predicted / measured:.3f}"
    return [*lines, [f"{name}: MB", f"{predicted / 1e6:.1f}", f"{measured / 1e6:.1f}", ratio]]


if __name__ == "__main__":
    typer.run(main)
