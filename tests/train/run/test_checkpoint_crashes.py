"""Kills and full disks. What forks runs as a program of its own (this file), free of pytest's threads and files."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dovetail.parallel.weights.pieces import Piece
from dovetail.train.run.checkpoint import Checkpointer, CheckpointError, latest, load_checkpoint, step_of

pytestmark = pytest.mark.filterwarnings("error")


def make_state(step: int) -> dict[str, Tensor]:
    return {"weight": torch.full((300,), float(step)), "moment": torch.full((2, 5), step).bfloat16()}


def write(root: Path, steps: list[int]) -> None:
    with closing(Checkpointer(root)) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), {"step": step}).wait()


def saved(root: Path) -> list[str]:
    return sorted(os.listdir(root))


def check_loads(path: Path) -> int:
    state = make_state(0)
    step = load_checkpoint(path, state)["step"]
    assert isinstance(step, int)
    assert step == step_of(path)
    assert all(torch.equal(state[name], expected) for name, expected in make_state(step).items())
    return step


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Every write past `size` bytes fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_is_reported_once_and_harms_nothing(tmp_path: Path) -> None:
    write(tmp_path, [10])
    with closing(Checkpointer(tmp_path)) as checkpointer:
        with largest_file(1000):
            failed = checkpointer.save(20, make_state(20), {"step": 20})
            with pytest.raises(CheckpointError, match=r"step-00000020: checkpoint not written: .*File too large"):
                checkpointer.save(30, make_state(30), {"step": 30})
            assert failed.done()
            assert saved(tmp_path) == ["step-00000010"]
            with pytest.raises(CheckpointError, match="untouched"):
                checkpointer.save(30, make_state(30)).wait()
        checkpointer.save(40, make_state(40), {"step": 40}).wait()
    assert saved(tmp_path) == ["step-00000010", "step-00000040"]
    assert [check_loads(tmp_path / name) for name in saved(tmp_path)] == [10, 40]


def test_failure_surfaces_when_closing(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    with largest_file(1000):
        checkpointer.save(20, make_state(20))
        with pytest.raises(CheckpointError, match="File too large"):
            checkpointer.close()


def run_program(name: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, __file__, name, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def save_and_die(root: Path, die_at: int) -> None:
    """Save step 30, and kill this process just before the `die_at`-th time that it opens or changes a file."""
    calls = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal calls
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            calls += 1
            if calls == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    checkpointer = Checkpointer(root, keep=2)
    sys.addaudithook(count)
    checkpointer.save(30, make_state(30), {"step": 30}).wait()
    os._exit(0)


def die_everywhere(folder: Path) -> None:
    for die_at in range(1, 100):
        root = folder / f"{die_at:02d}"
        shutil.copytree(folder / "before", root)
        child = os.fork()
        if child == 0:
            save_and_die(root, die_at)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            return
        assert code == -signal.SIGKILL


def test_killed_before_any_change_to_the_disk(tmp_path: Path) -> None:
    write(tmp_path / "before", [10, 20])
    run_program("die_everywhere", tmp_path)
    outcomes = []
    for root in sorted(path for path in tmp_path.iterdir() if path.name != "before"):
        path = latest(root)  # a warning would be an error here: what has its final name is whole
        assert path is not None
        outcomes.append(check_loads(path))
        Checkpointer(root).close()
        assert not [name for name in saved(root) if name.startswith(".")]
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {20, 30}
    assert len(outcomes) > 20


def save_for_ever(root: Path) -> None:
    newest = latest(root)
    step = step_of(newest) if newest else 0
    state = {"weight": torch.zeros(1 << 20)}
    if newest:
        load_checkpoint(newest, state)
    assert bool((state["weight"] == step).all())
    checkpointer = Checkpointer(root, keep=2)
    while True:
        step += 1
        state["weight"].add_(1)
        checkpointer.save(step, state, {"step": step})


def kill_at_random(root: Path) -> None:
    choose, step = random.Random(0), 0
    for _ in range(6):
        child = os.fork()
        if child == 0:
            save_for_ever(root)
        while not [name for name in saved(root) if name[0] != "." and name > f"step-{step:08d}"]:
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            time.sleep(0.005)  # until this child has got somewhere
        time.sleep(choose.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        path = latest(root)
        assert path is not None
        assert step_of(path) > step
        step = step_of(path)
        state = {"weight": torch.empty(1 << 20)}
        assert load_checkpoint(path, state) == {"step": step}
        assert bool((state["weight"] == step).all())


def test_killed_at_random_moments(tmp_path: Path) -> None:
    run_program("kill_at_random", tmp_path)


def save_as_rank(rank: int, root: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=2)

    def shard(tensor: Tensor) -> Piece:
        half = tensor.numel() // 2
        return Piece(flat=tensor.flatten()[rank * half :][:half], start=rank * half, shape=tuple(tensor.shape))

    state = {"sharded": shard(torch.arange(12.0).view(6, 2)), "same": torch.ones(3)}
    checkpointer = Checkpointer(root / "run")
    save = checkpointer.save(10, state, {"ranks": 2})
    dist.all_reduce(torch.ones(1))  # the step goes on, with collectives of its own
    path = save.wait()
    with largest_file(1000 if rank == 1 else 1 << 30):  # one rank's disk is full: all hear of it
        save = checkpointer.save(20, {**state, "large": shard(torch.ones(5000))})
        with pytest.raises(CheckpointError, match="rank 1: OSError"):
            save.wait()
    loaded: dict[str, Any] = {"sharded": shard(torch.zeros(6, 2)), "same": torch.zeros(3)}
    assert load_checkpoint(path, loaded) == {"ranks": 2}
    assert torch.equal(loaded["sharded"].flat, torch.arange(12.0).view(2, 6)[rank])
    checkpointer.close()
    dist.barrier()
    dist.destroy_process_group()


def two_ranks(root: Path) -> None:
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            save_as_rank(rank, root)
            sys.exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def test_two_ranks_write_one_checkpoint(tmp_path: Path) -> None:
    run_program("two_ranks", tmp_path)
    assert saved(tmp_path / "run") == ["step-00000010"]
    files = json.loads((tmp_path / "run" / "step-00000010" / "manifest.json").read_text())["files"]
    assert sorted(files) == [".metadata", "__0_0.distcp", "__1_0.distcp", "extra.json"]
    alone = {"sharded": torch.zeros(6, 2), "same": torch.zeros(3)}  # another world size reads it too
    load_checkpoint(tmp_path / "run" / "step-00000010", alone)
    assert torch.equal(alone["sharded"], torch.arange(12.0).view(6, 2))


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    {"die_everywhere": die_everywhere, "kill_at_random": kill_at_random, "two_ranks": two_ranks}[sys.argv[1]](
        Path(sys.argv[2])
    )
