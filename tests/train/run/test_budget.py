"""How long a run is, in steps and in epochs of its text."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from dovetail.text.corpus import num_samples
from dovetail.train.report.display import Display
from dovetail.train.report.metrics import StepMetrics, read_metrics
from dovetail.train.run.budget import budget_line, samples_of
from dovetail.train.run.loop import train
from dovetail.train.run.run_file import RunConfig, TrainConfig, resolve_schedule
from dovetail.train.step.schedule import Position, Schedule, Segment, TrainingSchedule, load_schedule, values

Build = Callable[..., RunConfig]
RAMP = Schedule(start=4, segments=(Segment(shape="linear", value=16, tokens=2000), Segment(value=16)))


def ramped(batch_size: Schedule) -> TrainingSchedule:
    return load_schedule("quickstart").model_copy(update={"batch_size": batch_size})


@pytest.mark.parametrize("batch_size", [RAMP, Schedule(segments=(Segment(value=12),))])
def test_samples_are_those_that_the_steps_take(batch_size: Schedule) -> None:
    train_config, schedule = TrainConfig(steps=30, sequence_length=32, microbatch_size=4), ramped(batch_size)
    tokens, sizes = 0, []
    for step in range(1, 31):  # as the loop goes
        at = Position(step=step, tokens=tokens, fraction=step / 30)
        sizes.append(values(schedule, at, batch_multiple=4).batch_size)
        tokens += sizes[-1] * 32
    assert samples_of(train_config, schedule, 30) == (sum(sizes), min(sizes), max(sizes))


def test_a_run_says_how_often_it_reads_its_text(tmp_path: Path, text: Path, tiny_run: Build) -> None:
    run, out = tiny_run(tmp_path / "run", text), io.StringIO()
    state = train(run, Display("run", 1, Console(file=out, width=200)))
    steps = [each for each in read_metrics(tmp_path / "run" / "metrics.jsonl") if isinstance(each, StepMetrics)]
    samples = sum(each.batch_size for each in steps)
    epochs = samples / num_samples(state.train_store, 32)
    assert f"\n8 steps of 4 x 32 tokens: {epochs:.2g} epochs of the training text\n" in out.getvalue()
    schedule = resolve_schedule(run)
    line = budget_line(run.train, schedule, state.train_store, 3224)
    assert line == f"3,224 steps of 4 x 32 tokens: {403 * epochs:,.1f} epochs of the training text"
    line = budget_line(run.train, ramped(RAMP), state.train_store, 30)
    assert line.startswith("30 steps of 4 to 16 x 32 tokens: ")


def test_text_that_is_shorter_than_a_sample_is_refused_before_the_first_step(
    tmp_path: Path, text: Path, tiny_run: Build
) -> None:
    with pytest.raises(ValueError, match=r"tokens make no sample of 100000 \+ 1"):
        train(tiny_run(tmp_path / "run", text, sequence_length=100_000))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_minutes_too_become_epochs(tmp_path: Path, text: Path, tiny_run: Build) -> None:
    out = io.StringIO()
    state = train(
        tiny_run(tmp_path / "run", text, steps=None, minutes=0.01), Display("run", 1, Console(file=out, width=200))
    )
    assert f"{state.num_steps:,} steps of 4 x 32 tokens: " in out.getvalue()
