"""A whole run: resuming is exact, interruption saves, divergence stops, mistakes are named."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dovetail.config import dump, load_toml
from dovetail.train.report.metrics import (
    HealthMetrics,
    HeldOutMetrics,
    StepMetrics,
    WholeHeldOutMetrics,
    read_metrics,
)
from dovetail.train.run import evaluate, loop
from dovetail.train.run.loop import train
from dovetail.train.run.run_file import ModelConfig, RunConfig, load_weights, resolve_schedule
from dovetail.train.run.stop import Diverged, Interrupted
from dovetail.train.step.schedule import Schedule, Segment
from dovetail.train.step.team import Alone

Build = Callable[..., RunConfig]


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    plain, average = (load_weights(directory, ema)[0] for ema in (False, True))
    return plain | {f"average.{name}": tensor for name, tensor in average.items()}


def assert_same_weights(first: Path, second: Path) -> None:
    mine, theirs = weights_of(first), weights_of(second)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def losses_of(directory: Path) -> list[float]:
    return [each.loss for each in read_metrics(directory / "metrics.jsonl") if isinstance(each, StepMetrics)]


def test_a_resumed_run_is_bitwise_the_run_that_was_never_stopped(
    tmp_path: Path, text: Path, tiny_run: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_run(tmp_path / "whole", text))
    step, lives = loop._one_step, iter([4, 7, 99])
    stopped = tiny_run(tmp_path / "stopped", text)
    for last in lives:

        def one_step(state: loop.Run, counters: loop.Counters, last: int = last) -> object:
            if counters.step == last:
                raise OSError("the machine went away")
            return step(state, counters)

        monkeypatch.setattr(loop, "_one_step", one_step)
        try:
            train(stopped)
        except OSError:
            continue
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "whole")
    assert_same_weights(tmp_path / "stopped", tmp_path / "whole")


def test_recompute_and_microbatches_change_no_routing_statistics(tmp_path: Path, text: Path, tiny_run: Build) -> None:
    train(tiny_run(tmp_path / "plain", text))
    train(tiny_run(tmp_path / "again", text, recompute=True))
    assert_same_weights(tmp_path / "plain", tmp_path / "again")


def test_a_recipe_trains_resumes_and_reports_its_health(
    tmp_path: Path, text: Path, tiny_run: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"precision": "deepseek-v3", "dtype": "bfloat16"}
    train(tiny_run(tmp_path / "whole", text, **settings))
    train(tiny_run(tmp_path / "plain", text, dtype="bfloat16"))
    assert losses_of(tmp_path / "whole") != losses_of(tmp_path / "plain")
    step = loop._one_step

    def one_step(state: loop.Run, counters: loop.Counters) -> object:
        if counters.step == 5:
            raise OSError("the machine went away")
        return step(state, counters)

    monkeypatch.setattr(loop, "_one_step", one_step)
    with pytest.raises(OSError, match="went away"):
        train(tiny_run(tmp_path / "stopped", text, **settings, health_every=3))
    monkeypatch.setattr(loop, "_one_step", step)
    train(tiny_run(tmp_path / "stopped", text, **settings, health_every=3))
    assert_same_weights(tmp_path / "stopped", tmp_path / "whole")  # watching changes nothing
    records = read_metrics(tmp_path / "stopped" / "metrics.jsonl")
    health = [each for each in records if isinstance(each, HealthMetrics)]
    assert {each.step for each in health} == {3, 6}
    assert {each.operand for each in health} == {"input", "weight", "grad", "up_weight", "down_weight"}
    assert any(each.layer.startswith("mtp.") for each in health)


def test_a_recipe_wants_bf16(tmp_path: Path, text: Path, tiny_run: Build) -> None:
    with pytest.raises(ValueError, match="use dtype bfloat16"):
        train(tiny_run(tmp_path / "run", text, precision="deepseek-v3", dtype="float32"))


def test_ctrl_c_saves_the_step_it_was_in(
    tmp_path: Path, text: Path, tiny_run: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = loop._one_step

    def one_step(state: loop.Run, counters: loop.Counters) -> object:
        if counters.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(state, counters)

    monkeypatch.setattr(loop, "_one_step", one_step)
    with pytest.raises(Interrupted, match="after step 5 of 8"):
        train(tiny_run(tmp_path / "run", text))
    monkeypatch.setattr(loop, "_one_step", step)
    train(tiny_run(tmp_path / "run", text))
    train(tiny_run(tmp_path / "whole", text))
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_non_finite_steps_are_skipped_counted_and_then_fatal(
    tmp_path: Path, text: Path, tiny_run: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = loop.team_step

    def poisoned(team: Alone, *rest: object, **named: object) -> object:
        number = rest[0].updates  # type: ignore[attr-defined]
        if number == 4:  # from the fifth step on, every gradient is a NaN
            team.models[0].norm.weight.data[0] = float("nan")
        return step(team, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "team_step", poisoned)
    with pytest.raises(Diverged, match=r"2 steps in a row, up to step 6, .*step-00000003"):
        train(tiny_run(tmp_path / "run", text, max_bad_steps=2))
    steps = [each for each in read_metrics(tmp_path / "run" / "metrics.jsonl") if isinstance(each, StepMetrics)]
    assert [each.skipped for each in steps] == [0, 0, 0, 0, 1, 2]


def test_other_settings_in_the_same_directory_are_refused(tmp_path: Path, text: Path, tiny_run: Build) -> None:
    train(tiny_run(tmp_path / "run", text, steps=1))
    with pytest.raises(ValueError, match=r"train.seed was 0 and is now 1.*set out to a new directory"):
        train(tiny_run(tmp_path / "run", text, steps=1, seed=1))


def test_the_held_out_curve_is_measured_on_the_same_windows_to_its_end(
    tmp_path: Path, text: Path, tiny_run: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of weights that do not change, the points are the same to the bit; all of the text gives another figure."""
    run = tiny_run(tmp_path / "run", text, evaluate_every=3, evaluate_windows=4, dtype="float32")
    still = Schedule(segments=(Segment(value=0.0),))
    schedule = resolve_schedule(run).model_copy(update={"learning_rate": still, "gamma": still})
    train(run.model_copy(update={"schedule": schedule}))
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    curve = [each for each in records if isinstance(each, HeldOutMetrics)]
    whole = [each for each in records if isinstance(each, WholeHeldOutMetrics)]
    assert [each.step for each in curve] == [3, 6] and [each.step for each in whole] == [8]
    assert len({each.loss for each in curve}) == 1 and whole[0].loss != curve[0].loss
    assert records[-1] == whole[0]


def test_without_a_curve_there_is_still_the_final_figure(tmp_path: Path, text: Path, tiny_run: Build) -> None:
    train(tiny_run(tmp_path / "run", text))
    kinds = [type(each) for each in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert kinds == [StepMetrics] * 8 + [WholeHeldOutMetrics]


def test_a_final_figure_that_a_log_lacks_is_measured(
    tmp_path: Path, text: Path, tiny_run: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run was stopped after its last checkpoint, or is of a version that had no such figure."""
    run, log = tiny_run(tmp_path / "run", text), tmp_path / "run" / "metrics.jsonl"
    train(run)
    whole = log.read_text()
    log.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    train(run)
    assert log.read_text() == whole
    monkeypatch.setattr("dovetail.train.run.evaluate.held_out", lambda *arguments: pytest.fail("measured twice"))
    train(run)


@pytest.mark.parametrize("call", [1, 5])  # in the point after step 3, and in the final figure
def test_ctrl_c_is_heard_while_held_out_text_is_measured(
    call: int, tmp_path: Path, text: Path, tiny_run: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"evaluate_every": 3, "evaluate_windows": 4, "checkpoint_every": 100}
    train(tiny_run(tmp_path / "whole", text, **settings))
    measure, calls = evaluate._nats, iter(range(1, 1000))

    def nats(*arguments: object) -> object:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluate, "_nats", nats)
    run = tiny_run(tmp_path / "run", text, **settings)
    with pytest.raises(Interrupted, match="after step 3 of 8" if call == 1 else "after step 8 of 8.*the same command"):
        train(run)
    held_out = (HeldOutMetrics, WholeHeldOutMetrics)
    there = [each for each in read_metrics(run.out / "metrics.jsonl") if isinstance(each, held_out)]
    assert len(there) == (0 if call == 1 else 2)  # no half of a figure
    train(run)
    found, expected = (
        [each for each in read_metrics(out / "metrics.jsonl") if isinstance(each, held_out)]
        for out in (run.out, tmp_path / "whole")
    )
    assert found == expected


def test_tensorboard_may_be_turned_on_later(tmp_path: Path, text: Path, tiny_run: Build) -> None:
    run = tiny_run(tmp_path / "run", text, steps=2)
    train(run)
    train(run.model_copy(update={"train": run.train.model_copy(update={"tensorboard": True})}))
    train(tiny_run(tmp_path / "other", text, steps=2, tensorboard=True))
    events = EventAccumulator(str(tmp_path / "other" / "tensorboard"))
    events.Reload()
    assert [each.value for each in events.Scalars("training/loss")] == pytest.approx(losses_of(tmp_path / "other"))


def test_the_model_that_a_file_described_is_kept_with_the_run(
    tmp_path: Path, text: Path, tiny_run: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So weights are read wherever the file went, and a file that changed is no reason to train another model."""
    monkeypatch.chdir(tmp_path)
    change = tiny_run(tmp_path, text).model.change
    Path("mine.toml").write_text("[dial]\nwidth = 128")
    model = ModelConfig(config=Path("mine.toml"), change=change)
    run = tiny_run(tmp_path / "run", text, steps=2).model_copy(update={"model": model})
    train(run)
    before = load_weights(tmp_path / "run")
    Path("mine.toml").write_text("[dial]\nwidth = 128\nmtp_depth = 0")
    with pytest.raises(ValueError, match=r"other keys of the model \(num_nextn_predict_layers was 1 and is now 0\)"):
        train(run)
    Path("mine.toml").unlink()
    after = load_weights(tmp_path / "run")
    assert before[1] == after[1] and all(torch.equal(before[0][name], after[0][name]) for name in before[0])


def test_minutes_become_steps_once(tmp_path: Path, text: Path, tiny_run: Build) -> None:
    state = train(tiny_run(tmp_path / "run", text, steps=None, minutes=0.01))
    budget = json.loads((tmp_path / "run" / "budget.json").read_text())
    last = budget["changes"][-1] if budget["changes"] else budget
    assert state.num_steps == last["num_steps"] >= 1
    assert train(tiny_run(tmp_path / "run", text, steps=None, minutes=0.01)).num_steps == state.num_steps


def test_a_run_file_survives_dump_and_load(tmp_path: Path, text: Path, tiny_run: Build) -> None:
    before = tiny_run(tmp_path / "run", text)
    (tmp_path / "run.toml").write_text(dump(before))
    assert load_toml(tmp_path / "run.toml", RunConfig) == before


@pytest.mark.slow
def test_killed_twenty_times_at_random_a_run_ends_with_the_same_weights(
    tmp_path: Path, text: Path, tiny_run: Build
) -> None:
    """kill -9 while starting, stepping and saving."""
    changes = {"steps": 240, "checkpoint_every": 4}
    train(tiny_run(tmp_path / "whole", text, **changes))
    out = tmp_path / "killed"
    (tmp_path / "run.toml").write_text(dump(tiny_run(out, text, **changes)))
    moments, kills = random.Random(1), 0
    while True:
        process = subprocess.Popen(
            [sys.executable, "-m", "dovetail", "train", str(tmp_path / "run.toml")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        if kills < 20:
            _wait_for(process, out / "metrics.jsonl", moments.randrange(16), moments.uniform(0, 0.1))
            kills += process.poll() is None
            process.kill()
        _, errors = process.communicate(timeout=300)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors.decode()
    assert kills == 20
    assert losses_of(out) == losses_of(tmp_path / "whole")
    assert_same_weights(out, tmp_path / "whole")


def _wait_for(process: subprocess.Popen[bytes], log: Path, steps: int, seconds: float) -> None:
    """Until the run has taken `steps` more steps, or is still starting when `steps` is 0; then some seconds."""
    if steps == 0:
        time.sleep(20 * seconds)
        return
    before = log.stat().st_size if log.exists() else 0
    deadline, last = time.monotonic() + 120, None
    while process.poll() is None and time.monotonic() < deadline:
        size = log.stat().st_size if log.exists() else 0
        last = size if last is None or size < before else last
        if size > before and size - min(before, last) > 300 * steps:
            break
        time.sleep(0.005)
    time.sleep(seconds)
