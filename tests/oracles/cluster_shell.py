"""`dovetail cluster` as a user types it, under a stop watch, and what is there of it before and after."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import dovetail

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(dovetail.__file__).parents[1]), "COLUMNS": "120"}
CLUSTER = (sys.executable, "-m", "dovetail", "cluster")


def start(*words: str) -> subprocess.Popen[str]:
    command = [*CLUSTER, *words]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*words: str, seconds: float = 20.0) -> subprocess.CompletedProcess[str]:
    """Run to the end. TimeoutExpired where that takes longer than `seconds`."""
    with start(*words) as process:
        try:
            out, error = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(words, process.returncode, out, error)


def namespaces() -> set[str]:
    """Their names."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line}
