"""Two ranks under torchrun make the same run as one, up to the order of sums."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from dovetail.config import dump
from dovetail.model.transformer import initialize
from dovetail.numerics.formats.errors import network_terms, tolerance
from dovetail.train.report.metrics import StepMetrics, read_metrics
from dovetail.train.run import loop, state
from dovetail.train.run.evaluate import held_out
from dovetail.train.run.loop import train
from dovetail.train.run.run_file import RunConfig, resolve_model
from dovetail.train.run.stop import Interrupted

Build = Callable[..., RunConfig]


def launch(config: RunConfig, directory: Path) -> subprocess.CompletedProcess[str]:
    file = directory / f"{config.out.name}.toml"
    file.write_text(dump(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dovetail"]
    return subprocess.run([*command, "train", str(file)], capture_output=True, text=True, timeout=300)


def steps_of(directory: Path) -> list[StepMetrics]:
    return [each for each in read_metrics(directory / "metrics.jsonl") if isinstance(each, StepMetrics)]


@pytest.mark.parametrize("separate_documents", [False, True])
def test_two_ranks_train_as_one(separate_documents: bool, tmp_path: Path, text: Path, tiny_run: Build) -> None:
    for index, path in enumerate(sorted(text.iterdir())) if separate_documents else ():
        path.write_text(path.read_text()[: 40 * index])  # documents of many lengths, most shorter than a sample
    settings = {"dtype": "float32", "separate_documents": separate_documents}
    one = tiny_run(tmp_path / "one", text, microbatch_size=4, **settings)
    two = tiny_run(tmp_path / "two", text, microbatch_size=2, **settings)
    state = train(one)
    result = launch(two, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("all held-out text after step") == 1  # one rank speaks
    alone, shared = steps_of(one.out), steps_of(two.out)
    assert [each.tokens for each in alone] == [each.tokens for each in shared]
    # Before the first update both have the same weights and, together, the same samples.
    bound = tolerance(torch.float32, terms=network_terms(state.spec, one.train.sequence_length))
    assert abs(alone[0].loss / shared[0].loss - 1) < bound
    assert abs(alone[0].grad_norm / shared[0].grad_norm - 1) < bound
    assert alone[0].max_vio == shared[0].max_vio  # loads are counted over both ranks
    assert shared[-1].loss < shared[0].loss


ON_TWO_RANKS = """
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dovetail.config import load_toml
from dovetail.text.shards import open_store
from dovetail.train.layout import ranks
from dovetail.train.run.evaluate import held_out
from dovetail.train.run.run_file import RunConfig, build_model
from dovetail.model.transformer import initialize
from dovetail.train.step.team import Alone

run, store = load_toml(Path(sys.argv[1]), RunConfig), open_store(Path(sys.argv[2]))
dist.init_process_group("gloo", timeout=timedelta(seconds=4))
with ranks.first_rank_first():
    if dist.get_rank() == 0:
        time.sleep(6)
model = build_model(run, torch.device("cpu"))
initialize(model, 0)


class Two(Alone):
    num_shares, index = 2, dist.get_rank()


for windows in (None, 7):
    found = held_out(Two(model), store, run.train.sequence_length, 4, windows)
    if dist.get_rank() == 1:
        print(*(value.hex() for value in found))
dist.destroy_process_group()
"""


def test_ranks_wait_for_the_first_and_measure_held_out_text_together(
    tmp_path: Path, text: Path, tiny_run: Build
) -> None:
    """Longer than their collectives would; and the sum of their shares is the sum of one, to the bit."""
    run = tiny_run(tmp_path / "run", text, steps=1, dtype="float32")
    state = train(run)
    assert state.held_out_store is not None
    (tmp_path / "run.toml").write_text(dump(run))
    (tmp_path / "script.py").write_text(ON_TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "script.py"]
    arguments = ["run.toml", str(state.held_out_store.directory)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    initialize(state.model, 0)
    told: list[tuple[int, int]] = []
    alone = [
        held_out(state.team, state.held_out_store, 32, 4, windows, lambda *done: bool(told.append(done)))
        for windows in (None, 7)
    ]
    totals = list(dict.fromkeys(total for _, total in told))
    assert told == [(done, total) for total in totals for done in range(1, total + 1)]  # told of each batch up to all
    assert done.stdout.split() == [value.hex() for figures in alone for value in figures]


def test_a_failure_of_the_first_rank_ends_them_all(tmp_path: Path, tiny_run: Build) -> None:
    result = launch(tiny_run(tmp_path / "run", tmp_path / "nowhere"), tmp_path)
    assert result.returncode != 0
    assert "no such file or directory" in result.stderr


STOPPED_OR_NOT = """
import os
import signal
import sys
from pathlib import Path

import torch

from dovetail.config import load_toml
from dovetail.train.run import loop
from dovetail.train.run.run_file import RunConfig
from dovetail.train.run.stop import Interrupted

run, last = load_toml(Path(sys.argv[1]), RunConfig), int(sys.argv[2])
step = loop._one_step


def one_step(state, counters):
    if counters.step == last - 1:
        os.kill(os.getpid(), signal.SIGINT)
    return step(state, counters)


loop._one_step = one_step
try:
    state = loop.train(run)
except Interrupted:
    sys.exit()
torch.save(state.model.state_dict(), f"{run.out}-of-rank-{os.environ['RANK']}.pt")
"""


def train_on_two(config: RunConfig, last: int) -> None:
    """Train to the end, or up to step `last`."""
    (config.out.parent / "train.py").write_text(STOPPED_OR_NOT)
    file = config.out.with_suffix(".toml")
    file.write_text(dump(config))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, "train.py", str(file), str(last)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=config.out.parent)
    assert done.returncode == 0, done.stderr


def train_on_one(config: RunConfig, last: int) -> None:
    step = loop._one_step

    def one_step(state: loop.Run, counters: loop.Counters) -> object:
        if counters.step == last - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(state, counters)

    with pytest.MonkeyPatch.context() as patch, suppress(Interrupted):
        patch.setattr(loop, "_one_step", one_step)
        train(config)


@pytest.mark.parametrize("begun_on", [1, 2])
def test_a_run_goes_on_with_another_number_of_ranks(begun_on: int, tmp_path: Path, text: Path, tiny_run: Build) -> None:
    """And at its end every rank has the same weights, to the bit."""
    settings = {"dtype": "float32", "microbatch_size": 2, "batch_size": 4}
    one, two = (tiny_run(tmp_path / f"on-{ranks}", text, **settings) for ranks in (1, 2))
    (train_on_one if begun_on == 1 else train_on_two)(one, last=4)
    shutil.copytree(one.out, two.out)
    train_on_one(one, last=0)
    train_on_two(two, last=0)
    alone, shared = steps_of(one.out), steps_of(two.out)
    assert [each.step for each in alone] == [each.step for each in shared] == list(range(1, 9))
    assert [each.tokens for each in alone] == [each.tokens for each in shared]
    assert [each.loss for each in alone[:4]] == [each.loss for each in shared[:4]]
    # Step 5 starts from the same weights and reads the same samples.
    bound = tolerance(torch.float32, terms=network_terms(resolve_model(one.model), one.train.sequence_length))
    assert abs(alone[4].loss / shared[4].loss - 1) < bound
    assert abs(alone[4].grad_norm / shared[4].grad_norm - 1) < bound
    first, second = (torch.load(f"{two.out}-of-rank-{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys() and first
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_ranks_that_would_change_the_batch_are_refused(
    tmp_path: Path, text: Path, tiny_run: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path / "run", text, microbatch_size=2, batch_size=6)
    train_on_one(run, last=4)
    monkeypatch.setattr(state, "rank_and_world", lambda: (0, 4))
    wanted = "step 5 would have a batch of 8, a multiple of 8, and on the former ranks .* 6, a multiple of 2"
    with pytest.raises(ValueError, match=wanted):
        train(run)
    monkeypatch.setattr(state, "rank_and_world", lambda: (0, 3))  # 6 again
    train(run)
    assert [each.batch_size for each in steps_of(run.out)] == 8 * [6]
