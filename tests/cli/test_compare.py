"""`dovetail compare`: the guide's example, two run files, JSON, and mistakes."""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from dovetail.cli import app as cli

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "compare.md").read_text("utf-8")
TINY = (
    *("steps=2", "sequence_length=32"),
    *("vocab_size=300", "hidden_size=64", "num_hidden_layers=2", "intermediate_size=64", "n_routed_experts=8"),
    *("moe_intermediate_size=32", "num_experts_per_tok=2"),
)
SET = [
    *("--set", "data.kind=files", "--set", "data.path=text", "--set", "data.held_out_share=0.2"),
    *(part for key in TINY[:2] for part in ("--set", f"train.{key}")),
    *(part for key in TINY[2:] for part in ("--set", f"model.change.{key}")),
]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's run file in the current directory, and little text."""
    monkeypatch.chdir(tmp_path)
    (run_file,) = re.findall(r"^```toml run-file\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    Path("small.toml").write_text(run_file, "utf-8")
    Path("text").mkdir()
    words = random.Random(0)
    for number in range(20):
        lines = (" ".join(words.choices(["alpha", "beta", "gamma", "delta"], k=12)) for _ in range(30))
        Path("text", f"{number}.txt").write_text("\n".join(lines), "utf-8")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["compare", *arguments])


def test_the_guide_s_example() -> None:
    (command,) = re.findall(r"^```sh compare\ndovetail compare (.*?)\n```", GUIDE, re.MULTILINE)
    done = invoke(*shlex.split(command), *SET)
    assert done.exit_code == 0, done.exception
    assert "deepseek-v3 against bf16: 3 seeds of 2 steps" in done.stdout
    for text in ("95 % interval", "MTP loss, depth 1", "parameters", "step time", "standard deviation", "A is bf16"):
        assert text in done.stdout
    out = Path("runs/small-bf16-deepseek-v3")
    assert {"compare.toml", "compare.jsonl", "compare.png"} <= {each.name for each in out.iterdir()}
    again = invoke(*shlex.split(command), *SET, "--json")  # from the log
    record = json.loads(again.stdout)
    assert [each["seed"] for each in record["loss"]["seeds"]] == [0, 1, 2] and len(record["mtp"]) == 1


def test_every_command_of_the_guide_is_understood() -> None:
    """That it gets as far as the checks of its settings; files that it names are there."""
    Path("large.toml").write_text(Path("small.toml").read_text("utf-8").replace("quickstart", "20m"), "utf-8")
    Path("mine.toml").write_text('source = "x"\nlike = "deepseek-v3"\nmoments = "float32"\n', "utf-8")
    (block,) = re.findall(r"^## What can be compared\n\n```\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    commands = [line.removeprefix("dovetail compare ") for line in block.splitlines()]
    assert len(commands) == 4
    for command in commands:  # which stop where the text should be read
        done = invoke(*shlex.split(command), "--set", "data.kind=files", "--set", "data.path=nowhere")
        assert isinstance(done.exception, ValueError) and str(done.exception).startswith("nowhere: no such file")


def test_two_run_files_of_other_vocabularies() -> None:
    Path("b.toml").write_text(Path("small.toml").read_text("utf-8"), "utf-8")
    arguments = ("small.toml", "b.toml", *SET, "--set-b", "model.change.vocab_size=310", "--seeds", "2")
    done = invoke(*arguments, "--out", "pairs")
    assert done.exit_code == 0, done.exception
    assert "b.toml against small.toml: 2 seeds of 2 steps" in done.stdout
    assert "do not see the same batches (other tokenizers)" in done.stdout
    assert "model.change.vocab_size: 300 -> 310" in done.stdout and "bits per byte, held-out text" in done.stdout
    assert {"a", "b", "compare.jsonl"} <= {each.name for each in Path("pairs").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("small.toml",), "nothing that changes a loss differs between A and B"),
        (("small.toml", "--set-b", "train.precision=fp8"), "'fp8' is no precision recipe"),
        (("small.toml", "--set-b", "train.precison=bf16"), "unknown key 'train.precison'; did you mean precision"),
        (("small.toml", "b.toml"), "b.toml: no such file"),
        (("small.toml", "--set-b", "data.held_out_share=0.1"), "same data.held_out_share"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(arguments: tuple[str, ...], words: str) -> None:
    done = invoke(*arguments)
    assert isinstance(done.exception, ValueError) and words in str(done.exception)
    assert not Path("runs").exists()
