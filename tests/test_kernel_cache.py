"""Compiled kernels are kept where they are expected, and compiling is announced once, by whoever has to wait for it."""

import os
import subprocess
import sys
from pathlib import Path

import dovetail

SIMULATE = ("network", "simulate", "--fabric", "mpft", "--gpus", "16", "--size", "1MiB", "--json")


def run(cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    source = {"PYTHONPATH": str(Path(dovetail.__file__).parents[1]), "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-m", "dovetail", *SIMULATE]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **source, **environment}, timeout=120, check=True
    )


def test_compiling_is_said_once_and_never_where_the_kernels_are_kept(tmp_path: Path) -> None:
    first = run(tmp_path)
    assert first.stderr == "compiling CPU kernels, once per machine and version: some seconds\n"
    kept = {path.parent.parent for path in tmp_path.rglob("*.nbc")}
    assert len(kept) == 1 and kept.pop().parent == tmp_path / "dovetail"
    second = run(tmp_path)
    assert second.stderr == "" and second.stdout == first.stdout


def test_of_several_processes_one_speaks(tmp_path: Path) -> None:
    assert run(tmp_path, RANK="1").stderr == ""
