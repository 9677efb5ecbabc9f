"""Two ranks under torchrun make the same run as one, up to the order of sums."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from dovetail.config import dump
from dovetail.numerics.formats.errors import network_terms, tolerance
from dovetail.train.report.metrics import StepMetrics, read_metrics
from dovetail.train.run.loop import train
from dovetail.train.run.run_file import RunConfig

Build = Callable[..., RunConfig]


def launch(config: RunConfig, directory: Path) -> subprocess.CompletedProcess[str]:
    file = directory / f"{config.out.name}.toml"
    file.write_text(dump(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dovetail"]
    return subprocess.run([*command, "train", str(file)], capture_output=True, text=True, timeout=300)


def steps_of(directory: Path) -> list[StepMetrics]:
    return [each for each in read_metrics(directory / "metrics.jsonl") if isinstance(each, StepMetrics)]


def test_two_ranks_train_as_one(tmp_path: Path, text: Path, tiny_run: Build) -> None:
    one = tiny_run(tmp_path / "one", text, dtype="float32", microbatch_size=4)
    two = tiny_run(tmp_path / "two", text, dtype="float32", microbatch_size=2)
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


def test_a_failure_of_the_first_rank_ends_them_all(tmp_path: Path, tiny_run: Build) -> None:
    result = launch(tiny_run(tmp_path / "run", tmp_path / "nowhere"), tmp_path)
    assert result.returncode != 0
    assert "no such file or directory" in result.stderr
