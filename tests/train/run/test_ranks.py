"""Two ranks, under torchrun or in a group that there is, make the same run as one, up to the order of sums."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rank_processes import Ranks
from training_on_ranks import train_until, wait_and_measure

from dovetail.config import dump
from dovetail.model.transformer import initialize
from dovetail.numerics.formats.errors import network_terms, tolerance
from dovetail.spec.model import ModelSpec
from dovetail.train.report.metrics import StepMetrics, read_metrics
from dovetail.train.run import state
from dovetail.train.run.evaluate import held_out
from dovetail.train.run.loop import train
from dovetail.train.run.run_file import RunConfig, resolve_model

Build = Callable[..., RunConfig]


def launch(config: RunConfig, directory: Path) -> subprocess.CompletedProcess[str]:
    file = directory / f"{config.out.name}.toml"
    file.write_text(dump(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dovetail"]
    return subprocess.run([*command, "train", str(file)], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two that start once, so that not every test imports torch and dovetail on each."""
    started = Ranks(2, Path(tmp_path_factory.mktemp("ranks")))
    yield started
    started.stop()


def steps_of(directory: Path) -> list[StepMetrics]:
    return [each for each in read_metrics(directory / "metrics.jsonl") if isinstance(each, StepMetrics)]


def assert_same_run(alone: RunConfig, shared: RunConfig, spec: ModelSpec) -> None:
    one, two = steps_of(alone.out), steps_of(shared.out)
    assert [each.tokens for each in one] == [each.tokens for each in two]
    # Before the first update both have the same weights and, together, the same samples.
    bound = tolerance(torch.float32, terms=network_terms(spec, alone.train.sequence_length))
    assert abs(one[0].loss / two[0].loss - 1) < bound
    assert abs(one[0].grad_norm / two[0].grad_norm - 1) < bound
    assert one[0].max_vio == two[0].max_vio  # loads are counted over both ranks
    assert two[-1].loss < two[0].loss


def test_two_ranks_train_as_one(tmp_path: Path, text: Path, tiny_run: Build) -> None:
    one = tiny_run(tmp_path / "one", text, microbatch_size=4, dtype="float32")
    two = tiny_run(tmp_path / "two", text, microbatch_size=2, dtype="float32")
    state = train(one)
    result = launch(two, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("all held-out text after step") == 1  # one rank speaks
    assert result.stdout.count("complete text with") == 1
    for each in steps_of(two.out):
        assert (each.nic_bytes, each.node_bytes) == (0, each.expected_node_bytes) and each.node_bytes > 0
    assert_same_run(one, two, state.spec)


def test_two_ranks_train_as_one_on_separate_documents(
    tmp_path: Path, text: Path, tiny_run: Build, ranks: Ranks
) -> None:
    for index, path in enumerate(sorted(text.iterdir())):
        path.write_text(path.read_text()[: 40 * index])  # documents of many lengths, most shorter than a sample
    settings = {"dtype": "float32", "separate_documents": True}
    one = tiny_run(tmp_path / "one", text, microbatch_size=4, **settings)
    two = tiny_run(tmp_path / "two", text, microbatch_size=2, **settings)
    state = train(one)
    ranks.run(train_until, two)
    assert_same_run(one, two, state.spec)


def test_ranks_wait_for_the_first_and_measure_held_out_text_together(
    tmp_path: Path, text: Path, tiny_run: Build, ranks: Ranks
) -> None:
    """Longer than their collectives would; and the sum of their shares is the sum of one, to the bit."""
    run = tiny_run(tmp_path / "run", text, steps=1, dtype="float32")
    state = train(run)
    assert state.held_out_store is not None
    found = ranks.run(wait_and_measure, run, state.held_out_store.directory, tmp_path)
    initialize(state.model, 0)
    told: list[tuple[int, int]] = []
    alone = [
        held_out(state.team, state.held_out_store, 32, 4, windows, lambda *done: bool(told.append(done)))
        for windows in (None, 7)
    ]
    totals = list(dict.fromkeys(total for _, total in told))
    assert told == [(done, total) for total in totals for done in range(1, total + 1)]  # told of each batch up to all
    assert found == 2 * [[value.hex() for figures in alone for value in figures]]


def test_a_failure_of_the_first_rank_ends_them_all(tmp_path: Path, tiny_run: Build) -> None:
    result = launch(tiny_run(tmp_path / "run", tmp_path / "nowhere"), tmp_path)
    assert result.returncode != 0
    assert "no such file or directory" in result.stderr


@pytest.mark.parametrize("begun_on", [1, 2])
def test_a_run_goes_on_with_another_number_of_ranks(
    begun_on: int, tmp_path: Path, text: Path, tiny_run: Build, ranks: Ranks
) -> None:
    """And at its end every rank has the same weights, to the bit."""
    settings = {"dtype": "float32", "microbatch_size": 2, "batch_size": 4}
    one, two = (tiny_run(tmp_path / f"on-{count}", text, **settings) for count in (1, 2))
    if begun_on == 1:
        train_until(one, 4)
    else:
        ranks.run(train_until, one, 4)
    shutil.copytree(one.out, two.out)
    train_until(one)
    first, second = ranks.run(train_until, two)
    alone, shared = steps_of(one.out), steps_of(two.out)
    assert [each.step for each in alone] == [each.step for each in shared] == list(range(1, 9))
    assert [each.tokens for each in alone] == [each.tokens for each in shared]
    assert [each.loss for each in alone[:4]] == [each.loss for each in shared[:4]]
    # Step 5 starts from the same weights and reads the same samples.
    bound = tolerance(torch.float32, terms=network_terms(resolve_model(one.model), one.train.sequence_length))
    assert abs(alone[4].loss / shared[4].loss - 1) < bound
    assert abs(alone[4].grad_norm / shared[4].grad_norm - 1) < bound
    assert first.keys() == second.keys() and first
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_ranks_that_would_change_the_batch_are_refused(
    tmp_path: Path, text: Path, tiny_run: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path / "run", text, microbatch_size=2, batch_size=6)
    train_until(run, 4)
    monkeypatch.setattr(state, "rank_and_world", lambda: (0, 4))
    wanted = "step 5 would have a batch of 8, a multiple of 8, and on the former ranks .* 6, a multiple of 2"
    with pytest.raises(ValueError, match=wanted):
        train(run)
    monkeypatch.setattr(state, "rank_and_world", lambda: (0, 3))  # 6 again
    train(run)
    assert [each.batch_size for each in steps_of(run.out)] == 8 * [6]
