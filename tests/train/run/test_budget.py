"""How long a run is, in steps and in epochs of its text."""

from __future__ import annotations

import io
import json
import math
import shutil
import signal
from collections.abc import Callable
from itertools import cycle, pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dovetail.text.corpus import num_samples
from dovetail.train.report.display import Display
from dovetail.train.report.metrics import StepMetrics, read_metrics
from dovetail.train.run import budget
from dovetail.train.run.budget import Change, Limit, Pace, budget_line, samples_of
from dovetail.train.run.loop import train
from dovetail.train.run.run_file import RunConfig, TrainConfig, load_weights, resolve_schedule
from dovetail.train.run.stop import Interrupted
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
    first_plan = json.loads((tmp_path / "run" / "budget.json").read_text())["num_steps"]
    said = out.getvalue()
    assert said.index("measuring the time of a step") < said.index(f"{first_plan:,} steps of 4 x 32 tokens: ")
    assert state.num_steps >= 1


# ---- A budget of minutes ----

MINUTES = 240.0  # seconds of the runs below


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def simulated(path: Path, first_guess: int, step_seconds: Callable[[float], float], ends_at: float = 1e9) -> Pace:
    """A run to its end; `step_seconds` is the time of a step at a share of the budget's time."""
    clock = Clock()
    pace = Pace(first_guess, limit=Limit(seconds=MINUTES, path=path, ends_at=1000.0 + ends_at), clock=clock)
    step = 0
    while step < pace.num_steps:
        step += 1
        before = pace.fraction(step)
        clock.now += step_seconds((clock.now - 1000) / MINUTES)
        pace.look(step)
        assert pace.fraction(step) == before  # what a step was, it stays
    return pace


def jittery(seconds: float) -> Callable[[float], float]:
    factors = cycle([0.8, 1.2, 0.7, 1.3, 1.0])
    return lambda share: seconds * next(factors)


SPEEDS: dict[str, tuple[int, Callable[[float], float]]] = {
    "as measured": (2400, lambda share: 0.1),
    "jitter": (2400, jittery(0.1)),
    "slow start": (2400, lambda share: 0.5 if share < 0.3 else 0.1),
    "slow middle": (2400, lambda share: 0.4 if 0.3 < share < 0.6 else 0.1),
    "slow end": (2400, lambda share: 0.1 if share < 0.8 else 0.4),
    "slow throughout": (2400, lambda share: 0.3),
    "measured while busy": (480, lambda share: 0.1),
    "measured while very busy": (10, lambda share: 0.1),
    "long steps": (20, lambda share: 12.0),
    "long steps that got longer": (20, lambda share: 12.0 if share < 0.4 else 20.0),
}


@pytest.mark.parametrize("name", SPEEDS)
def test_a_run_keeps_its_time_and_uses_it(name: str, tmp_path: Path) -> None:
    first_guess, step_seconds = SPEEDS[name]
    pace = simulated(tmp_path / "budget.json", first_guess, step_seconds)
    room = 0.02 * MINUTES + 2 * step_seconds(1.0)
    assert MINUTES - room < pace.seconds < MINUTES + room
    if (tmp_path / "budget.json").exists():
        assert len(json.loads((tmp_path / "budget.json").read_text())["changes"]) <= 30
    fractions = [pace.fraction(step) for step in range(1, pace.num_steps + 1)]
    assert fractions[-1] == 1.0 and fractions == sorted(fractions)
    assert max(after - before for before, after in pairwise(fractions)) <= max(0.01, 3 / first_guess)
    rate = values(load_schedule("quickstart"), Position(step=pace.num_steps, fraction=fractions[-1])).learning_rate
    assert rate == 3e-5  # where the schedule ends


def test_a_steady_machine_changes_nothing(tmp_path: Path) -> None:
    pace = simulated(tmp_path / "budget.json", 2400, jittery(0.1))
    assert abs(pace.num_steps / 2400 - 1) < 0.03
    simulated(tmp_path / "steady.json", 2400, lambda share: 0.1)
    assert not (tmp_path / "steady.json").exists()


def test_a_caller_that_must_be_done_earlier_is_heeded(tmp_path: Path) -> None:
    pace = simulated(tmp_path / "budget.json", 2400, lambda share: 0.1, ends_at=150.0)
    assert 145 < pace.seconds < 155


def test_the_fraction_is_the_share_of_steps_until_a_change_and_then_goes_on_evenly() -> None:
    plain = Pace(7)
    assert [plain.fraction(step) for step in range(1, 8)] == [step / 7 for step in range(1, 8)]
    pace = Pace(10, (Change(after=4, num_steps=7), Change(after=6, num_steps=10)))
    expected = [0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 0.85, 0.9, 0.95, 1.0]
    assert [pace.fraction(step) for step in range(1, 11)] == pytest.approx(expected, rel=1e-12)


def test_time_goes_on_counting_in_the_next_sitting(tmp_path: Path) -> None:
    clock = Clock()
    pace = Pace(100, limit=Limit(seconds=100.0, path=tmp_path / "budget.json"), clock=clock)
    pace.start(30, 60.0)  # thirty steps that took a minute
    clock.now += 10.0
    assert pace.seconds == 70.0
    assert pace.look(35) == "50 steps in place of 100, in 30 s"  # fifteen at two seconds each
    assert json.loads((tmp_path / "budget.json").read_text()) == {
        "num_steps": 100,
        "changes": [{"after": 35, "num_steps": 50}],
    }


def test_nothing_is_decided_again_before_what_was_decided(tmp_path: Path) -> None:
    clock = Clock()
    limit = Limit(seconds=100.0, path=tmp_path / "budget.json")
    pace = Pace(100, (Change(after=50, num_steps=60),), limit, clock)
    pace.start(30, 60.0)
    for step in range(31, 51):
        clock.now += 1000.0
        assert pace.look(step) is None
    assert pace.look(51) is not None


def same_weights(first: Path, second: Path) -> bool:
    one, other = (load_weights(each)[0] for each in (first, second))
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_run_with_its_changes_is_the_run_that_was_not_stopped(
    tmp_path: Path, text: Path, tiny_run: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decided by a clock, stopped in between, and once more from what was written alone."""
    clock = Clock()
    monkeypatch.setattr(budget.time, "monotonic", clock)
    monkeypatch.setattr("dovetail.train.run.loop.step_seconds", lambda *arguments: 2.5)

    class Steps(Display):
        def __init__(self, stop_after: int) -> None:
            super().__init__("run", 1, Console(file=io.StringIO()))
            self.stop_after = stop_after

        def update(self, metrics: object, seconds_left: float | None = None) -> None:
            clock.now += 2.5 if metrics.step < 5 else 10.0  # type: ignore[attr-defined]
            if metrics.step == self.stop_after:  # type: ignore[attr-defined]
                signal.raise_signal(signal.SIGINT)

    settings = {"steps": None, "minutes": 2.0}
    run = tiny_run(tmp_path / "run", text, **settings)
    with pytest.raises(Interrupted):
        train(run, Steps(9))
    state = train(run, Steps(-1))
    assert state.num_steps < 48
    record = json.loads((tmp_path / "run" / "budget.json").read_text())
    assert record["num_steps"] == 48 and record["changes"]
    again = tiny_run(tmp_path / "again", text, **settings)
    with pytest.raises(Interrupted):
        train(again, Steps(1))
    for checkpoint in (tmp_path / "again" / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    (tmp_path / "again" / "budget.json").write_text(json.dumps(record))
    monkeypatch.setattr(budget, "TOLERANCE", math.inf)  # whatever the clock says now
    assert train(again, Steps(-1)).num_steps == state.num_steps
    assert same_weights(tmp_path / "run", tmp_path / "again")
