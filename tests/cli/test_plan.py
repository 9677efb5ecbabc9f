"""`dovetail plan` and `dovetail calibrate` from the shell: streams, exit codes, start-up, no torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dovetail

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(dovetail.__file__).parents[1]), "COLUMNS": "100"}
TRAIN = ("plan", "deepseek-v3", "--cluster", "h800-2048", "--goal", "train", "--batch", "15360")
LAYOUT = ("--pp", "16", "--ep", "64", "--tp", "1", "--schedule", "dualpipe")
SERVE = ("plan", "deepseek-v3", "--cluster", "h800-2048", "--goal", "serve", "--ep", "144", "--prefill-ep", "32")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dovetail", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=False)


@pytest.mark.parametrize("arguments", [(*TRAIN, *LAYOUT), (*SERVE, "--context", "4989")])
def test_planning_never_loads_torch(arguments: tuple[str, ...], tmp_path: Path) -> None:
    arguments = (*arguments, "--html", str(tmp_path / "plan.html"))
    lines = (
        "import sys",
        "from dovetail.cli import app as cli",
        f"sys.argv = {['dovetail', *arguments]!r}",
        "try: cli.main()",
        "except SystemExit as done: assert not done.code",
        "assert not {'torch', 'numba'} & sys.modules.keys()",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], env=ENVIRONMENT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plan.html").stat().st_size > 10_000


def test_training_prints_table_4s_parts_and_what_follows() -> None:
    done = run(*TRAIN, *LAYOUT, "--tokens", "14.8T")
    assert done.returncode == 0 and done.stderr == ""
    for text in ("(1F)", "(1B)", "(1W)", "(1F1B)", "idle", "optimizer", "tokens per day", "causal", "GPU hours", "$"):
        assert text in done.stdout
    assert "memory per rank" in done.stdout and '  ep = 64\n  schedule = "dualpipe"\n' in done.stdout


def test_serving_prints_both_pools_and_the_lines_of_engines() -> None:
    done = run(*SERVE, "--context", "4989", "--output-length", "1211", "--output-speed", "20")
    assert done.returncode == 0 and done.stderr == ""
    for text in ("time to first token", "time per output token", "per node", "requests that fit", "per million"):
        assert text in done.stdout
    assert "prefill GPUs per decode GPU" in done.stdout
    assert "vllm serve" in done.stdout and "sglang.launch_server" in done.stdout


def test_json_goes_to_stdout_and_the_rest_to_stderr(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    done = run(*TRAIN, *LAYOUT, "--json", "--html", str(page))
    (plan,) = json.loads(done.stdout)["plans"]
    assert plan["layout"]["schedule"] == "dualpipe" and str(page) in done.stderr
    assert page.read_text("utf-8").startswith("<!DOCTYPE html>")


def test_a_figure_is_explained() -> None:
    done = run(*TRAIN, *LAYOUT, "--explain", "step_time")
    assert done.returncode == 0
    assert "step_time" in done.stdout and "  = " in done.stdout and "1F1B" in done.stdout


def test_a_trace_has_a_thread_for_each_rank(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    assert run(*TRAIN, *LAYOUT, "--trace", str(path)).returncode == 0
    events = json.loads(path.read_text())["traceEvents"]
    assert {event["tid"] for event in events if event["ph"] == "X"} == set(range(16))
    done = run(*SERVE, "--context", "4989", "--trace", str(path))
    assert done.returncode == 1 and "--trace is the timeline of a training step" in done.stderr


def test_the_timeline_stands_below_the_tables_as_wide_as_the_terminal() -> None:
    done = run(*TRAIN, *LAYOUT, "--timeline")
    assert done.returncode == 0 and done.stderr == ""
    before, title, after = done.stdout.partition("dualpipe: 16 ranks, 120 micro-batches\n")
    assert title and "memory per rank" in before and "to carry it out" in after
    rows = after.splitlines()[:16]
    assert [row.split()[:2] for row in rows] == [["rank", f"{rank}"] for rank in range(16)]
    assert {len(row) for row in rows} == {int(ENVIRONMENT["COLUMNS"])}
    assert all("X" in row and row.endswith("%") for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*SERVE, "--context", "4989"), "--timeline is the timeline of a training step on one cluster"),
        ((*TRAIN, *LAYOUT, "--json"), "--timeline belongs to the tables: leave out"),
        ((*TRAIN, *LAYOUT, "--explain", "step_time"), "--timeline belongs to the tables: leave out"),
    ],
)
def test_a_timeline_that_would_be_ignored_is_refused(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments, "--timeline")
    assert done.returncode == 1 and done.stdout == ""
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_markdown() -> None:
    assert "\n| --- | --:" in run(*TRAIN, *LAYOUT, "--markdown").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*TRAIN, *LAYOUT, "--explain", "step_tim"), "did you mean step_time"),
        ((*TRAIN[:6], "--batch", "-3"), "dovetail: --batch -3: expected more than 0"),
        (("plan", "deepseek-v3", "--cluster", "h80", "--goal", "train"), "dovetail: no cluster 'h80'"),
        ((*TRAIN, "--tokens", "-3"), "dovetail: --tokens -3: expected more than 0"),
        ((*TRAIN, "--html", "nowhere/at/all.html", *LAYOUT), "nowhere/at/all.html"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_1(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1 and done.stdout == ""
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
