"""Ranks under torchrun train as one process does, on any layout, and go on on any other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rank_processes import Ranks
from training_on_ranks import train_until

from dovetail.config import dump
from dovetail.numerics.formats.errors import network_terms, tolerance
from dovetail.train.layout.table import LayoutConfig
from dovetail.train.report.metrics import HeldOutMetrics, StepMetrics, WholeHeldOutMetrics, read_metrics
from dovetail.train.run import team
from dovetail.train.run.loop import train
from dovetail.train.run.run_file import RunConfig, load_weights, resolve_model, resolve_schedule

Build = Callable[..., RunConfig]
RANKS = 4
BUILT = {"dtype": "float32", "microbatch_size": 2, "batch_size": 16, "steps": 4, "checkpoint_every": 2}


def launch(config: RunConfig) -> subprocess.CompletedProcess[str]:
    file = config.out.with_suffix(".toml")
    file.write_text(dump(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command += ["-m", "dovetail", "train", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def on(layout: LayoutConfig, config: RunConfig, out: Path) -> RunConfig:
    return config.model_copy(update={"layout": layout, "out": out})


def deepened(config: RunConfig) -> RunConfig:
    """Four layers, for as many stages, and an MTP module."""
    change = {**config.model.change, "num_hidden_layers": 4, "num_nextn_predict_layers": 1}
    return config.model_copy(update={"model": config.model.model_copy(update={"change": change})})


def losses(out: Path, kind: type = StepMetrics) -> list[float]:
    return [each.loss for each in read_metrics(out / "metrics.jsonl") if isinstance(each, kind)]


def test_a_pipeline_trains_as_one_process_and_goes_on_without_it(
    tmp_path: Path, text: Path, tiny_run: Build, ranks: Ranks
) -> None:
    """Steps 1 and 2 on two stages by two ranks of experts, 3 and 4 on four ranks that share the experts out; what the
    end is measured by, and the weights of both, are those of one process."""
    alone = deepened(tiny_run(tmp_path / "alone", text, evaluate_every=2, **BUILT))
    state = train(alone)
    pipeline = LayoutConfig(pp=2, ep=2, schedule="dualpipev", microbatches=4, ranks_per_node=2)
    first = on(pipeline, alone, tmp_path / "first")
    ranks.run(train_until, first, seconds=120.0)
    second = on(LayoutConfig(ep=4, hops=1, zero=0), alone, tmp_path / "second")
    shutil.copytree(first.out, second.out)
    shutil.rmtree(second.out / "checkpoints" / "step-00000004")
    assert (done := launch(second)).returncode == 0, done.stderr
    assert "going on after step 2 of 4" in done.stderr
    bound = tolerance(torch.float32, terms=network_terms(state.spec, alone.train.sequence_length))
    steps = alone.train.steps or 0
    for out in (first.out, second.out):
        assert losses(out)[0] == pytest.approx(losses(alone.out)[0], rel=bound)
        for kind in (StepMetrics, HeldOutMetrics, WholeHeldOutMetrics):
            # AdamW's first steps are signs of gradients, of which some are rounding alone.
            assert losses(out, kind) == pytest.approx(losses(alone.out, kind), rel=1e-3)
        found, _, step = load_weights(out)
        assert step == steps
        change = {name: each.float() - found[name].float() for name, each in state.model.state_dict().items()}
        rate = 2 * steps * max(each.learning_rate for each in read_steps(alone.out))
        assert all(float(each.abs().max()) <= rate for each in change.values())
    assert losses(first.out)[:2] == losses(second.out)[:2]
    assert [(each.nic_bytes, each.node_bytes) for each in read_steps(alone.out)] == [(0, 0)] * steps
    for each in read_steps(second.out)[2:]:  # all ranks are on one node, and hold one stage
        assert each.nic_bytes == each.stage_wait == 0 < each.node_bytes
        assert min(each.expert_wait, each.gradient_wait, each.rank_memory, *each.rank_max_vio) > 0
        assert each.expert_wait + each.gradient_wait < each.seconds
    for each in read_steps(first.out):
        assert each.stage_wait > 0
        assert each.nic_bytes == each.expected_nic_bytes > 0  # between stages, and of the norm: experts are on one node
        assert each.node_bytes == pytest.approx(each.expected_node_bytes, rel=0.1)  # the gate is not even
    assert_traffic_is_that_of_the_steps(second.out, since=2)


def assert_traffic_is_that_of_the_steps(out: Path, since: int) -> None:
    tables = json.loads((out / "traffic.json").read_text())
    steps = [each for each in read_steps(out) if each.step > since]
    assert sum(rank["node"] for rank in tables["in_steps"].values()) == sum(each.node_bytes for each in steps)
    expected = sum(rank["node"] for rank in tables["predicted"].values())
    assert expected == pytest.approx(sum(each.expected_node_bytes for each in steps), abs=RANKS * len(steps))
    assert min(rank["node"] for rank in tables["beside"].values()) > 0  # held-out text was measured


def read_steps(out: Path) -> list[StepMetrics]:
    return [each for each in read_metrics(out / "metrics.jsonl") if isinstance(each, StepMetrics)]


def test_a_layout_that_cannot_run_is_refused_before_any_work_by_one_rank(
    tmp_path: Path, text: Path, tiny_run: Build
) -> None:
    config = on(LayoutConfig(dp=3), tiny_run(tmp_path / "run", text, **BUILT), tmp_path / "run")
    start = time.monotonic()
    done = launch(config)
    assert done.returncode != 0 and time.monotonic() - start < 60
    [said] = [line for line in done.stderr.splitlines() if line.startswith("dovetail:")]
    assert "dp = 3 needs 3 ranks, and 4 were started: set dp = 4, or start 3" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("layout", "reason"), [
    ({"pp": 2, "microbatches": 3}, "layout.microbatches = 3: a batch of 16 sequences over dp = 2 .* makes 4; set"),
    ({"ep": 3}, "ep = 3 does not divide .* nearest: ep = 2"),
    ({"pp": 4}, "4 stages .* for 2 layers: .* the largest pp is 2"),
    ({"pp": 2, "stage_layers": (2, 1)}, "stage_layers has 2 stages with 3 layers"),
    ({"ranks_per_node": 3}, "ranks_per_node = 3 does not divide the 4 ranks"),
    ({"pp": 2, "dp": 4}, "dp = 4 x pp = 2 needs 8 ranks, and 4 were started"),
])  # fmt: skip
def test_what_stands_against_a_layout_is_said_with_a_remedy(
    layout: dict[str, object], reason: str, text: Path, tiny_run: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = on(LayoutConfig(**layout), tiny_run(tmp_path / "run", text, **BUILT), tmp_path / "run")
    monkeypatch.setattr(team, "rank_and_world", lambda: (0, RANKS))
    with pytest.raises(ValueError, match=reason):
        team.check_team(config, resolve_model(config.model), resolve_schedule(config), RANKS)
