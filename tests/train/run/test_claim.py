"""A run's directory belongs to one process, one set of settings and one text; a move changes none of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dovetail.convert import load_llm
from dovetail.text import prepare
from dovetail.text.tokenizer import Tokenizer
from dovetail.train.report.metrics import StepMetrics, read_metrics
from dovetail.train.run import checkpoint, loop, run_file
from dovetail.train.run.loop import train
from dovetail.train.run.run_file import RunConfig, TokenizerConfig

Build = Callable[..., RunConfig]


@pytest.fixture
def stopped(tmp_path: Path, text: Path, tiny_run: Build, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run of eight steps that was stopped after a checkpoint at step 3."""
    config = tiny_run(tmp_path / "run", text)
    step = loop._one_step

    def one_step(state: loop.Run, counters: loop.Counters) -> object:
        if counters.step == 4:
            raise OSError("the machine went away")
        return step(state, counters)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_one_step", one_step)
        with pytest.raises(OSError, match="went away"):
            train(config)
    return config


def test_changed_text_is_refused_by_name_before_it_is_tokenised(
    stopped: RunConfig, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (text / "new.txt").write_text("words that were not there\n" * 9)
    (text / "3.txt").unlink()
    (text / "4.txt").write_text("other words\n" * 9)
    with monkeypatch.context() as patch:
        patch.setattr(run_file, "prepare_store", lambda *arguments: pytest.fail("tokenised"))
        what = r"up to step 3 \(new: new\.txt; gone: 3\.txt; changed: 4\.txt\); .* --accept-changed-text"
        with pytest.raises(ValueError, match=what):
            train(stopped)
    train(stopped, accept_changed_text=True)
    train(stopped)  # the last checkpoint has the text as it is now


def test_text_that_is_elsewhere_or_newer_is_the_same(stopped: RunConfig, text: Path, tmp_path: Path) -> None:
    before = sorted((stopped.out / "tokens").iterdir())
    text.rename(tmp_path / "moved")
    os.utime(tmp_path / "moved" / "3.txt", ns=(1, 1))
    data = stopped.data.model_copy(update={"path": tmp_path / "moved"})
    train(stopped.model_copy(update={"data": data}))
    assert sorted((stopped.out / "tokens").iterdir()) == before


def test_another_order_of_the_same_files_is_found_in_the_tokens(stopped: RunConfig, text: Path) -> None:
    """No file's content changed, but names decide the order and what is held out."""
    for number in range(20):
        (text / f"{number}.txt").rename(text / f"renamed {number}.txt")
    with pytest.raises(ValueError, match=r"up to step 3 \(other tokens to train on, other held-out tokens\)"):
        train(stopped)


def test_another_tokenizer_in_the_run_is_refused(stopped: RunConfig) -> None:
    Tokenizer.train(["other words"], 300).save(stopped.out / "tokenizer")
    with pytest.raises(ValueError, match=r"run/tokenizer is another one, other tokens to train on"):
        train(stopped)


def test_a_checkpoint_of_a_version_that_recorded_no_text_goes_on(
    stopped: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = checkpoint.load_checkpoint

    def without_text(*arguments: object) -> dict[str, object]:
        extra = load(*arguments)  # type: ignore[arg-type]
        assert extra.pop("text")
        return extra

    monkeypatch.setattr(checkpoint, "load_checkpoint", without_text)
    train(stopped)


def test_a_run_that_was_moved_goes_on_and_is_found(stopped: RunConfig, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "run"
    moved.parent.mkdir()
    stopped.out.rename(moved)
    train(stopped.model_copy(update={"out": moved}))
    assert not stopped.out.exists()
    steps = [each.step for each in read_metrics(moved / "metrics.jsonl") if isinstance(each, StepMetrics)]
    assert steps == list(range(1, 9))
    assert load_llm(moved)[1] == f"{moved}: weights after step 8"


def test_another_path_of_the_tokenizer_may_name_the_same_one_only(tmp_path: Path, text: Path, tiny_run: Build) -> None:
    words = text.joinpath("0.txt").read_text()
    for name, content in (("one", words), ("copy", words), ("other", "other words")):
        Tokenizer.train([content], 300).save(tmp_path / name)
    run = tiny_run(tmp_path / "run", text, steps=1)
    paths = {name: TokenizerConfig(path=tmp_path / name) for name in ("one", "copy", "other")}
    for name in ("one", "copy"):
        train(run.model_copy(update={"tokenizer": paths[name]}))
    with pytest.raises(ValueError, match=r"other is another tokenizer than .*run/tokenizer"):
        train(run.model_copy(update={"tokenizer": paths["other"]}))


def test_a_mended_mistake_goes_on_in_the_same_directory(tmp_path: Path, tiny_run: Build) -> None:
    """The tokenizer was trained and the tokens were made, but nothing was learnt yet."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"words {n}", "body": f"alpha beta {n}"}) + "\n" for n in range(200)))
    run = tiny_run(tmp_path / "run", rows, sequence_length=32, steps=1)
    data = run.data.model_copy(update={"kind": "jsonl", "held_out_share": 0.0})
    long = run.train.model_copy(update={"sequence_length": 100_000})
    with pytest.raises(ValueError, match="make no sample of 100000"):
        train(run.model_copy(update={"data": data, "train": long}))
    before = Tokenizer.load(run.out / "tokenizer").fingerprint
    mended = data.model_copy(update={"text_key": "body"})
    state = train(run.model_copy(update={"data": mended}))
    assert state.num_steps == 1 and state.tokenizer.fingerprint != before


HOLDER = """
import sys, time
from pathlib import Path
from dovetail.train.run.claim import only_run

with only_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_killed_one_is_none(
    tmp_path: Path, text: Path, tiny_run: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path / "run", text, steps=1)
    command = [sys.executable, "-c", HOLDER, str(run.out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with monkeypatch.context() as patch:
            patch.setattr(loop, "check_run", lambda *arguments: pytest.fail("not at once"))
            message = rf"run: this run is being trained by another process \(pid {process.pid} on host "
            with pytest.raises(ValueError, match=message):
                train(run)
        process.send_signal(signal.SIGKILL)
    train(run)
    assert not (run.out / ".lock").exists()


def test_nothing_stays_of_a_directory_in_which_nothing_was_made(tmp_path: Path, text: Path, tiny_run: Build) -> None:
    (tmp_path / "runs").mkdir()
    run = tiny_run(tmp_path / "runs" / "deep" / "run", text)
    missing = run.data.model_copy(update={"path": text / "nowhere"})
    with pytest.raises(ValueError, match="no such file"):
        train(run.model_copy(update={"data": missing}))
    assert list((tmp_path / "runs").iterdir()) == []


def test_files_are_not_read_again_to_see_that_they_are_the_same(
    stopped: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "sha256_of", lambda path: pytest.fail(f"read {path}"))
    train(stopped)
