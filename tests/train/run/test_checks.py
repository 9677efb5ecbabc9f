"""What is wrong with a run is found before anything is written, in one line that says what to change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dovetail.text.documents import DataConfig
from dovetail.text.tokenizer import Tokenizer
from dovetail.train.run import run_file
from dovetail.train.run.loop import train
from dovetail.train.run.run_file import ModelConfig, RunConfig, TokenizerConfig, TrainConfig

Build = Callable[..., RunConfig]


def changed(config: RunConfig, changes: dict[str, object]) -> RunConfig:
    """`config` with whole tables replaced, or keys of one."""
    tables = {"data": config.data, "train": config.train, "model": config.model, "tokenizer": config.tokenizer}
    tables["optimizer"] = config.optimizer
    for name, value in changes.items():
        table, _, key = name.partition(".")
        tables[table] = tables[table].model_copy(update={key: value})
    return RunConfig.model_validate({"out": config.out, "schedule": config.schedule, **tables})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.path": Path("nowhere")}, r"^nowhere: no such file or directory; set data.path"),
        ({"data.patterns": ("*.md",)}, r"no file matches \*.md; set data.patterns"),
        ({"data.kind": "parquet"}, r"no file matches \*.parquet"),
        ({"data.held_out_share": 0.999999}, r"no document is to train on; give more documents, or change data"),
        ({"tokenizer.path": Path("tok")}, r"^tok/tokenizer.json: no such file"),
        ({"model.change": {"vocab_size": 200}}, r"vocab_size 200 is too small"),
        ({"train.precision": "deepseek-v3", "train.dtype": "float32"}, r"use dtype bfloat16"),
        ({"train.precision": "bf16", "optimizer.beta2": 0.999}, r"beta2 = 0.999: .*bf16-fp32-moments"),
        ({"model.preset": "llama-3.1-405b", "model.change": {}}, r"described for counting only"),
        ({"model.preset": "quickstrat"}, r"no model preset 'quickstrat'; did you mean quickstart"),
        ({"model.preset": "mine.toml"}, r"model.preset = 'mine.toml' is a file, .*: set model.config"),
    ],
)
def test_a_mistake_is_found_before_the_directory_is_claimed(
    changes: dict[str, object], message: str, tmp_path: Path, text: Path, tiny_run: Build
) -> None:
    with pytest.raises(ValueError, match=message):
        train(changed(tiny_run(tmp_path / "run", text), changes))
    assert not (tmp_path / "run").exists()


def test_text_is_trained_on_where_none_is_held_out_and_that_is_said(
    tmp_path: Path, text: Path, tiny_run: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    state = train(changed(tiny_run(tmp_path / "run", text, evaluate_every=4), {"data.held_out_share": 1e-6}))
    assert state.held_out_store is None
    said = "no document is held out at data.held_out_share = 1e-06; training without held-out text"
    assert said in " ".join(capsys.readouterr().err.split())


def test_one_file_is_cut_and_that_is_said_before_a_tokenizer_is_trained(
    tmp_path: Path, text: Path, tiny_run: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    book = tmp_path / "book.txt"
    book.write_text("".join((text / f"{number}.txt").read_text() + "\n" for number in range(20)))
    state = train(tiny_run(tmp_path / "run", book))
    assert state.held_out_store is not None
    assert state.train_store.num_bytes + state.held_out_store.num_bytes == book.stat().st_size
    said = f"book.txt is the only document: its last {state.held_out_store.num_bytes:,} bytes are held out"
    lines = " ".join(capsys.readouterr().err.split())
    assert -1 < lines.find(said) < lines.find("training a byte-level BPE")


def test_a_broken_line_of_either_split_is_named_before_a_tokenizer_is_trained(
    tmp_path: Path, tiny_run: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lines.jsonl").write_text('{"txt": "no text under that key"}\n')
    monkeypatch.setattr(run_file, "prepare_tokenizer", lambda *arguments: pytest.fail("trained a tokenizer"))
    run = tiny_run(tmp_path / "run", tmp_path / "lines.jsonl")
    data = DataConfig(kind="jsonl", path=tmp_path / "lines.jsonl", held_out_share=0.5)
    with pytest.raises(ValueError, match="lines.jsonl, line 1: no text under 'text'"):
        train(run.model_copy(update={"data": data}))
    assert not (tmp_path / "run").exists()


def test_text_that_cannot_be_read_says_why(tmp_path: Path, tiny_run: Build) -> None:
    (tmp_path / "binary").mkdir()
    for number in range(8):
        (tmp_path / "binary" / f"{number}.txt").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"no document is to train on, left out: \d binary"):
        train(tiny_run(tmp_path / "run", tmp_path / "binary"))


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path, text: Path, tiny_run: Build) -> None:
    Tokenizer.train([Path(__file__).read_text("utf-8")], 320).save(tmp_path / "tok")
    run = tiny_run(tmp_path / "run", text)  # of 300 tokens
    published = run.model_copy(update={"tokenizer": TokenizerConfig(path=tmp_path / "tok")})
    with pytest.raises(ValueError, match=r"320 tokens and the model 300; set model.change.vocab_size = 320"):
        train(published)
    (tmp_path / "tok" / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: not valid JSON"):
        train(published)
    without_eos = (tmp_path / "tok" / "tokenizer.json").read_text().replace("<|end_of_sentence|>", "<|other|>")
    (tmp_path / "tok" / "tokenizer.json").write_text(without_eos)
    (tmp_path / "tok" / "tokenizer_config.json").unlink()
    model = ModelConfig(preset="quickstart", change={**run.model.change, "vocab_size": 320})
    with pytest.raises(ValueError, match="the tokenizer has no end-of-text token"):
        train(published.model_copy(update={"model": model}))
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, text: Path, tiny_run: Build) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="file is a file, not a directory; give another place"):
            train(tiny_run(out, text))


def test_minutes_are_measured_by_one_process(
    tmp_path: Path, text: Path, tiny_run: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dovetail.train.run.checks.rank_and_world", lambda: (0, 2))
    with pytest.raises(ValueError, match="under torchrun set train.steps"):
        train(tiny_run(tmp_path / "run", text, steps=None, minutes=1.0))
    assert not (tmp_path / "run").exists()


def test_a_run_needs_one_budget() -> None:
    with pytest.raises(ValueError, match="exactly one of train.steps and train.minutes"):
        TrainConfig(steps=1, minutes=1.0)
