"""Compiled kernels are kept where they are expected, and compiling is announced once, by whoever has to wait for it."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest

import dovetail
from dovetail import kernel_cache
from dovetail.kernel_cache import kernel_directory

SOURCE = str(Path(dovetail.__file__).parents[1])
SIMULATE = ("network", "simulate", "--fabric", "mpft", "--gpus", "16", "--size", "1MiB", "--json")


ONE_KERNEL = """
import numpy as np
from dovetail.printing import announce_compilation

announce_compilation()
from dovetail.network.flows.flows_numba import transpose

print(transpose(np.array([0, 1]), np.zeros(1, np.int32), 1))
"""


def run(cache: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    source = {"PYTHONPATH": SOURCE, "XDG_CACHE_HOME": str(cache)}
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env={**os.environ, **source, **environment},
        timeout=120,
        check=True,
    )


def test_compiling_is_said_once_and_never_where_the_kernels_are_kept(tmp_path: Path) -> None:
    first = run(tmp_path, "-m", "dovetail", *SIMULATE)
    assert first.stderr == "compiling CPU kernels, once per machine and version: some seconds\n"
    kept = {path.parent.parent for path in tmp_path.rglob("*.nbc")}
    assert len(kept) == 1 and kept.pop().parent == tmp_path / "dovetail"
    second = run(tmp_path, "-m", "dovetail", *SIMULATE)
    assert second.stderr == "" and second.stdout == first.stdout


def test_of_several_processes_one_speaks(tmp_path: Path) -> None:
    silent = run(tmp_path, "-c", ONE_KERNEL, RANK="1")
    assert silent.stderr == "" and list(tmp_path.rglob("*.nbc"))


def test_of_several_processes_one_compiles_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are opened apart lock each other out in one process too."""
    seen = []

    def compile(signature: str) -> None:
        seen.append("begins")
        Event().wait(0.05)
        seen.append("ends")

    monkeypatch.setitem(sys.modules, "slow", SimpleNamespace(kernel=SimpleNamespace(compile=compile)))
    monkeypatch.setattr(kernel_cache, "kernel_directory", lambda: tmp_path)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(kernel_cache._compile, ["slow"] * 2, ["kernel"] * 2, ["one", "two"]))
    assert seen == ["begins", "ends"] * 2


LOSS = """
import torch
from dovetail.numerics.cpu import kernels
from dovetail.train.step.loss import losses_and_gradient

generator = torch.Generator().manual_seed(0)
logits = torch.randn(64, 512, generator=generator).bfloat16()
losses = losses_and_gradient(logits, torch.arange(64), 1 / 64)
print(losses.double().sum().item().hex(), logits.double().abs().sum().item().hex())
"""


def test_the_run_that_compiles_has_the_bits_of_the_others(tmp_path: Path) -> None:
    """numba's own order, compile and then keep, had others on AVX-512."""
    first = run(tmp_path, "-c", LOSS).stdout
    assert run(tmp_path, "-c", LOSS).stdout == first


@pytest.mark.parametrize("home", ["nowhere", "forbidden"])
def test_without_a_directory_to_keep_them_kernels_are_compiled_each_time(home: str, tmp_path: Path) -> None:
    """A scratch directory serves, and is taken away."""
    kept, scratch = tmp_path / "kept", tmp_path / "scratch"
    scratch.mkdir()
    if home == "forbidden":
        (kept / "dovetail").mkdir(parents=True)
        (kept / "dovetail" / kernel_directory().name).write_text("")  # root may write everywhere: a file in its place
    else:
        kept = Path("/proc/nowhere")
    result = run(kept, "-c", ONE_KERNEL, TMPDIR=str(scratch))
    assert "compiling" in result.stderr and "Traceback" not in result.stderr
    assert not list(scratch.iterdir())
