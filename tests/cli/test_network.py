"""`dovetail network` from the shell: streams, exit codes, start-up, no torch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import dovetail
from dovetail.catalog.fabrics import fabric_names
from dovetail.cli.network import CATALOG

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(dovetail.__file__).parents[1]), "COLUMNS": "100"}
COMPILING = "compiling CPU kernels, once per machine and version: some seconds\n"  # where none are kept yet
SIMULATE = ("simulate", "--fabric", "mpft", "--gpus", "64")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dovetail", "network", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=False)


def test_options_are_these() -> None:
    """A new one is a decision."""
    groups: dict[str, list[str]] = {}
    for line in run("simulate", "--help").stdout.splitlines():
        word = line.split()[:1]
        if line.endswith(":") and not line.startswith(" "):
            groups[line.removesuffix(":")] = options = []
        elif groups and word and word[0].startswith("--") and line.startswith("  -"):
            options.append(word[0])
    assert groups == {
        "The collective": [
            *("--fabric", "--collective", "--size", "--gpus", "--channels", "--stages", "--both-ways"),
            *("--prefill-gpus", "--beside", "--endpoints"),
        ],
        "Experts, for dispatch and combine": ["--tokens", "--model", "--precision", "--mode", "--skew", "--recorded"],
        "Routing": ["--routing", "--queue-pairs", "--seed"],
        "Failures": ["--fail", "--fail-random", "--trials", "--reroute-seconds"],
        "Output": ["--sweep", "--picture", "--json"],
        "Options": ["--help"],
    }


def test_help_names_the_catalog() -> None:
    assert CATALOG.split(", ") == fabric_names()


def test_simulating_never_loads_torch() -> None:
    lines = (
        "import sys",
        "from dovetail.cli import app as cli",
        f"sys.argv = {['dovetail', 'network', *SIMULATE]!r}",
        "try: cli.main()",
        "except SystemExit as done: assert not done.code",
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], env=ENVIRONMENT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_show_prints_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "mpft.svg"
    done = run("show", "mpft", "--endpoints", "2048", "--svg", str(picture))
    assert done.returncode == 0 and str(picture) in done.stderr
    assert "2,048 GPUs in 256 nodes of 8" in done.stdout and "GPU i on plane i mod 8" in done.stdout
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    assert json.loads(run("show", "mpft", "--json").stdout)["switches"] == 768


def test_simulate_prints_time_links_and_price() -> None:
    done = run(*SIMULATE, "--size", "1GiB")
    assert done.returncode == 0 and done.stderr in ("", COMPILING)
    for text in (
        "time",
        "23.49 ms",
        "bus bandwidth",
        "latency",
        "GPU to leaf",
        "link:",
        "price per GB/s",
        "unverified",
    ):
        assert text in done.stdout


def test_failures_and_fabrics_side_by_side_as_json() -> None:
    done = run(*SIMULATE, "--fabric", "mrft", "--fail", "nic:3", "--fail-random", "0%", "--json")
    cases = json.loads(done.stdout)["cases"]
    assert [case["fabric"] for case in cases] == ["mpft", "mrft"]
    assert all(0.1 < case["bandwidth_lost"]["mean"] < 0.2 and case["cables_lost"] == 1 for case in cases)


def test_a_sweep_has_a_row_for_each_size_and_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "sweep.png"
    done = run(*SIMULATE, "--sweep", "1MiB..4MiB", "--picture", str(picture))
    assert done.returncode == 0 and str(picture) in done.stderr
    for text in ("1 MiB", "2 MiB", "4 MiB"):
        assert text in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_experts_beside_copies_from_the_host() -> None:
    arguments = ("--gpus", "16", "--collective", "dispatch", "--tokens", "64", "--beside", "host-copy:1MiB")
    done = run("simulate", "--fabric", "h800-2048", *arguments)
    assert done.returncode == 0 and done.stderr in ("", COMPILING)
    for text in ("64 tokens per GPU on 16 of", "DeepEP", "dispatch first", "host-copy, 1 MiB", "(1.00x)"):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "mpff"), "dovetail: no fabric 'mpff'"),
        (("show", "mpft", "--endpoints", "1001"), "use 1000 or 1008"),
        (("show", "mpft", "--svg", "nowhere/at/all.svg"), "--svg nowhere/at/all.svg: cannot be written"),
        (("show", "mpft", "--endpoints", "100000"), "use layers = 3, radix = 160, or fewer endpoints"),
        ((*SIMULATE, "--collective", "pipeline", "--stages", "0"), "a pipeline has 2 or more"),
        ((*SIMULATE, "--sweep", ""), "--sweep '' is empty"),
        ((*SIMULATE, "--sweep", "1MiB,2MiB", "--picture", "/dev/full/x.png"), "there is no folder"),
        ((*SIMULATE, "--size", "1024"), "has no unit: write 1024B"),
        ((*SIMULATE, "--size=-1GiB"), "use 0B, or 1B"),
        ((*SIMULATE, "--collective", "alltoall"), "did you mean all-to-all"),
        ((*SIMULATE, "--routing", "adptive"), "did you mean adaptive"),
        ((*SIMULATE, "--fail", "plan:3"), "did you mean plane"),
        ((*SIMULATE, "--picture", "sweep.png"), "add --sweep"),
        (("simulate", "--fabric", "ft2", "--gpus", "4096"), "ft2 has 2048"),
        (("simulate", "--fabric", "ft3", "--routing", "ecmp"), "would need about"),
        ((*SIMULATE, "--collective", "dispatch", "--size", "1GiB"), "not for dispatch: give --tokens"),
        ((*SIMULATE, "--collective", "dispatch", "--model", "deepsek-v3"), "did you mean deepseek-v3"),
        ((*SIMULATE, "--collective", "dispatch", "--precision", "fp7"), "is no precision recipe"),
        ((*SIMULATE, "--collective", "combine", "--recorded", "none.npy"), "none.npy: cannot be read"),
        ((*SIMULATE, "--beside", "host-copy:1GiB"), "mpft has no PCIe"),
        ((*SIMULATE, "--sweep", "gpus=8,16"), "--gpus is given already"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_1(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1 and done.stdout == ""
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
