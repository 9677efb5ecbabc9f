"""What becomes of a run under torchrun when a rank hangs, lags, errs, or loses torchrun itself."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dovetail.config import dump
from dovetail.train.layout.table import LayoutConfig
from dovetail.train.report.metrics import StepMetrics, StragglerMetrics, read_metrics
from dovetail.train.run.run_file import RunConfig

Build = Callable[..., RunConfig]
SECONDS = 60.0  # for a start on a busy machine

# Rank 1 is three times as slow, and from step 10 on it has one bit of its own in a weight.
ILL = """
import sys
import time
from pathlib import Path

import torch

from dovetail.config import load_toml
from dovetail.parallel.weights.replicas import ReplicaError
from dovetail.train.run import loop
from dovetail.train.run.run_file import RunConfig
from dovetail.train.step.on_ranks import Ranks

backward = Ranks.backward


def ill(self, batches, aim):
    start = time.perf_counter()
    found = backward(self, batches, aim)
    if self.mesh.rank == 1:
        time.sleep(2 * (time.perf_counter() - start) + 0.2)
    if self.mesh.rank == 1 and self._step == 10:
        dict(self.models[0].named_parameters())["norm.weight"].data.view(torch.int32)[3] ^= 1 << 7
    return found


Ranks.backward = ill
try:
    loop.train(load_toml(Path(sys.argv[1]), RunConfig))
except ReplicaError as error:
    print("dovetail:", error, file=sys.stderr)
    sys.exit(1)
"""


@contextmanager
def launched(config: RunConfig, ranks: int, *program: str) -> Iterator[subprocess.Popen[str]]:
    """The run under torchrun, of which nothing is left at the end."""
    file = config.out.with_suffix(".toml")
    file.write_text(dump(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(config.out.with_suffix(".err"), "w") as errors:
        started = subprocess.Popen(
            [*command, *(program or ("-m", "dovetail", "train")), str(file)],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=environment,
            text=True,
        )
    try:
        yield started
    finally:
        for process in (started.pid, *ranks_of(config).values()):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        started.wait()


def ranks_of(config: RunConfig) -> dict[int, int]:
    """The process of each rank that runs, also when torchrun is gone."""
    found = {}
    for each in Path("/proc").iterdir():
        with suppress(OSError):  # it has just ended
            if each.name.isdigit() and os.fsencode(config.out.with_suffix(".toml")) in (each / "cmdline").read_bytes():
                environment = (each / "environ").read_bytes().split(b"\0")
                found |= {int(one[5:]): int(each.name) for one in environment if one.startswith(b"RANK=")}
    return found


def wait_for(is_so: Callable[[], object], seconds: float) -> float:
    """How long it took. AssertionError where it did not come about."""
    start = time.monotonic()
    while not is_so():
        assert time.monotonic() < start + seconds, "did not come about"
        time.sleep(0.05)
    return time.monotonic() - start


def said(config: RunConfig) -> list[str]:
    lines = config.out.with_suffix(".err").read_text().splitlines()
    assert not any("/dovetail/" in line and line.lstrip().startswith("File") for line in lines), lines
    return [line for line in lines if line.startswith("dovetail:")]


def steps(config: RunConfig) -> int:
    with suppress(FileNotFoundError):
        return sum(isinstance(each, StepMetrics) for each in read_metrics(config.out / "metrics.jsonl"))
    return 0


def long_run(tiny_run: Build, out: Path, text: Path, **layout: object) -> RunConfig:
    config = tiny_run(out, text, dtype="float32", microbatch_size=2, batch_size=12, steps=5000, checkpoint_every=1000)
    return config.model_copy(update={"layout": LayoutConfig(**layout)})


def test_a_rank_that_hangs_is_named_when_time_is_up(tmp_path: Path, text: Path, tiny_run: Build) -> None:
    config = long_run(tiny_run, tmp_path / "run", text, deadline=5.0)
    with launched(config, 3) as started:
        wait_for(lambda: steps(config) > 3, SECONDS)
        ranks = ranks_of(config)
        os.kill(ranks[1], signal.SIGSTOP)
        assert wait_for(lambda: said(config), 15.0) > 5.0
        wait_for(lambda: ranks_of(config).keys() <= {1}, 5.0)
        os.kill(ranks[1], signal.SIGKILL)  # or torchrun waits half a minute for it
        assert started.wait(20.0) != 0
    [line] = said(config)
    assert re.fullmatch(
        r"dovetail: step \d+, [a-z ]+: rank 1 did not answer within 5 s; look at its machine, or set a longer "
        "layout.deadline; the same command goes on from the newest checkpoint",
        line,
    )


def test_ranks_end_when_torchrun_is_gone(tmp_path: Path, text: Path, tiny_run: Build) -> None:
    config = long_run(tiny_run, tmp_path / "run", text)
    with launched(config, 2) as started:
        wait_for(lambda: steps(config) > 3, SECONDS)
        started.kill()
        wait_for(lambda: not ranks_of(config), 10.0)
    assert said(config) == [
        "dovetail: torchrun is gone, and its ranks end; the same command goes on from the newest checkpoint"
    ]


def test_a_rank_that_lags_and_one_with_a_flipped_bit_are_named(tmp_path: Path, text: Path, tiny_run: Build) -> None:
    config = long_run(tiny_run, tmp_path / "run", text, replica_check=5)
    script = tmp_path / "ill.py"
    script.write_text(ILL)
    with launched(config, 3, str(script)) as started:
        assert started.wait(SECONDS) != 0
    [line] = said(config)
    assert line.startswith("dovetail: step 10: replicas of weights differ: norm.weight on rank 1. Memory or a link")
    records = read_metrics(config.out / "metrics.jsonl")
    assert steps(config) == 9  # step 10 was not taken
    [straggler] = [each for each in records if isinstance(each, StragglerMetrics)]
    assert straggler.rank == 1 and straggler.ratio > 2 and straggler.step == 8
    errors = config.out.with_suffix(".err").read_text()
    assert errors.count(f"straggler: rank 1, {straggler.ratio:.1f} x the median") == 1
