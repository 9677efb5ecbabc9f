"""How many threads there are, how they wait, and that importing dovetail leaves them as they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dovetail
from dovetail import threads

V1 = {"quota": "250000", "period": "100000"}
SOURCE = str(Path(dovetail.__file__).parents[1])
COUNTS = """
import sys, torch
before = torch.get_num_threads()
import numba
from dovetail.numerics.products import grouped
from dovetail.engine.llm import LLM
from dovetail.train.run.loop import train
rows = torch.randn(64, 16).bfloat16()
grouped.fprop(rows, torch.randn(2, 16, 16).bfloat16(), [0, 30, 64])
print(before, torch.get_num_threads(), numba.get_num_threads())
"""


def python(code: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in threads.SETTINGS}
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**inherited, "PYTHONPATH": SOURCE, **environment},
        timeout=120,
        check=True,
    )
    return run.stdout.strip()


@pytest.mark.parametrize("count", ["1", "2"])
def test_importing_and_multiplying_keep_the_number_of_threads(count: str) -> None:
    """numba starts OpenMP with all cores, and torch used to follow it."""
    assert python(COUNTS, OMP_NUM_THREADS=count) == f"{count} {count} {min(int(count), os.cpu_count() or 1)}"


def test_the_command_line_says_how_many_and_how_they_wait() -> None:
    show = "import os; from dovetail import threads; threads.prepare(); print(*map(os.environ.get, threads.SETTINGS))"
    cores = threads.num_threads()
    assert python(show) == f"{cores} None 5000"
    assert python(show, OMP_NUM_THREADS="1") == "1 None 5000"
    assert python(show, OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="7", OMP_NUM_THREADS="3") == "3 passive 7"
    assert python(show, OMP_WAIT_POLICY="active") == f"{cores} active None"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity masks are Linux's")
def test_the_affinity_mask_counts_and_not_the_machine() -> None:
    first = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{first}]); from dovetail import threads; print(threads.num_threads())"
    assert python(code) == "1"


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty tree of cgroups, 64 cores, and nothing said in the environment."""
    monkeypatch.setattr(threads, "_CGROUPS", tmp_path)
    monkeypatch.setattr(threads, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/a/b", {"a/b/cpu.max": "max 100000"}, 64),
        ("0::/a/b", {"a/b/cpu.max": "200000 100000"}, 2),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 2),
        ("0::/a/b", {"a/b/cpu.max": "20000 100000"}, 1),
        ("0::/../../outside", {"cpu.max": "300000 100000"}, 3),
        ("0::/", {}, 64),
        ("3:cpu,cpuacct:/x", {f"cpu,cpuacct/cpu.cfs_{k}_us": v for k, v in V1.items()}, 3),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ("4:memory:/x", {"memory/x/cpu.max": "100000 100000"}, 64),
    ],
)  # fmt: skip
def test_a_container_has_the_cores_of_its_quota(own: str, files: dict[str, str], expected: int, cgroups: Path) -> None:
    (cgroups / "own").write_text(own + "\n")
    for name, text in files.items():
        (cgroups / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroups / name).write_text(text + "\n")
    assert threads.num_threads() == expected


def test_what_is_asked_for_wins_over_the_quota(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cgroups / "own").write_text("0::/\n")
    (cgroups / "cpu.max").write_text("100000 100000\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "8,2")
    assert threads.num_threads() == 8
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    with pytest.raises(ValueError, match="OMP_NUM_THREADS = 'many': give a number"):
        threads.num_threads()
