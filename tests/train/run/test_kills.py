"""Random ranks of small runs are killed at random moments; torchrun starts them again, and the end is bitwise the same.

The slow test takes the kills that fit into its time. As a script it takes any number, and says how each run went:

    python tests/train/run/test_kills.py 200
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from dovetail.config import dump
from dovetail.train.layout.table import LayoutConfig
from dovetail.train.report.metrics import StepMetrics, read_metrics
from dovetail.train.run.run_file import RunConfig, load_weights

Build = Callable[..., RunConfig]
End = tuple[list[float], dict[str, torch.Tensor]]  # the loss of each step, and the weights
LAYOUTS = [
    (2, LayoutConfig()),
    (3, LayoutConfig(zero=0)),
    (2, LayoutConfig(ep=2, replica_check=1)),
    (2, LayoutConfig(pp=2)),
    (4, LayoutConfig(pp=2, ep=2, schedule="dualpipev")),
]
KILLS_OF_A_RUN = 4
STEPS = 120
PAUSES = (0.5, 9.0)  # seconds from kill to kill: ranks take some six to start, so that some never come to a step
SECONDS_OF_TEST = 200.0
SEED = 14
WANTED = "KILLS"  # in the environment: at least so many, however long it takes


@pytest.mark.slow
def test_runs_whose_ranks_are_killed_end_as_if_nothing_had_been(tmp_path: Path, text: Path, tiny_run: Build) -> None:
    settings = {"dtype": "float32", "microbatch_size": 2, "batch_size": 16, "steps": STEPS, "checkpoint_every": 5}
    base = tiny_run(tmp_path / "run", text, **settings)
    model = base.model.model_copy(update={"change": {**base.model.change, "num_hidden_layers": 4}})
    wanted, end = int(os.environ.get(WANTED, 0)), time.monotonic() + SECONDS_OF_TEST
    done = drill(base.model_copy(update={"model": model}), lambda kills: kills < wanted or time.monotonic() < end)
    assert done >= max(wanted, KILLS_OF_A_RUN)


def drill(base: RunConfig, goes_on: Callable[[int], bool]) -> int:
    """Kill ranks, layout after layout; returns how many it came to. AssertionError where an end differs."""
    rng, done, number = random.Random(SEED), 0, 0
    wanted: dict[int, End] = {}  # by layout: how a run ends that is left alone
    while goes_on(done):
        place = number % len(LAYOUTS)
        ranks, layout = LAYOUTS[place]
        if place not in wanted:
            alone = on(layout, base, f"alone-{place}")
            trained(alone, ranks, 0, rng)
            wanted[place] = end_of(alone)
        config = on(layout, base, f"killed-{number}")
        killed = trained(config, ranks, KILLS_OF_A_RUN, rng)
        losses, weights = end_of(config)
        assert losses == wanted[place][0], config.out
        assert all(torch.equal(weights[name], each) for name, each in wanted[place][1].items()), config.out
        number, done = number + 1, done + killed
        sys.stderr.write(f"{done} kills; {ranks} ranks, {layout.model_dump(exclude_defaults=True)}: the same end\n")
    return done


def on(layout: LayoutConfig, base: RunConfig, name: str) -> RunConfig:
    return base.model_copy(update={"layout": layout, "out": base.out.parent / name})


def trained(config: RunConfig, ranks: int, kills: int, rng: random.Random) -> int:
    """Train to the end, and kill so many ranks on the way; returns how many it came to."""
    file, done = config.out.with_suffix(".toml"), 0
    file.write_text(dump(config))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={kills}"]
    command = [sys.executable, *launcher, "-m", "dovetail", "train", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(config.out.with_suffix(".err"), "w") as errors:
        started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
    try:
        while done < kills:
            with suppress(subprocess.TimeoutExpired):
                started.wait(rng.uniform(*PAUSES))
                break
            if (found := ranks_of(started.pid)) and len(found) == ranks:  # else it is between two attempts
                with suppress(ProcessLookupError):
                    os.kill(rng.choice(found), signal.SIGKILL)
                    done += 1
                wait_until_new(started, found)
        assert started.wait(120.0) == 0, config.out.with_suffix(".err").read_text()
    finally:
        for process in (started.pid, *ranks_of(started.pid)):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        started.wait()
    return done


def ranks_of(launcher: int) -> list[int]:
    """The processes of ranks, the first one first."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children")
    return [int(each) for each in children.read_text().split()] if children.exists() else []


def wait_until_new(started: subprocess.Popen[bytes], former: list[int]) -> None:
    """Until torchrun has noticed: a second kill in the same attempt would cost no restart."""
    end = time.monotonic() + 60.0
    while started.poll() is None and set(ranks_of(started.pid)) & set(former):
        assert time.monotonic() < end, "ranks hang after one was killed"
        time.sleep(0.1)


def end_of(config: RunConfig) -> End:
    records = read_metrics(config.out / "metrics.jsonl")
    found = [each for each in records if isinstance(each, StepMetrics)]
    assert [each.step for each in found] == list(range(1, STEPS + 1))
    weights, _, step = load_weights(config.out)
    assert step == STEPS
    return [each.loss for each in found], weights


if __name__ == "__main__":
    os.environ[WANTED] = sys.argv[1]
    sys.exit(pytest.main(["-s", "-m", "slow", __file__]))
