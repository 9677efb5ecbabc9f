"""The loss gap of FP8 at a tiny size: the verdict, the table, resuming, the command."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial

import pytest
from typer.testing import CliRunner

from dovetail.cli import app as cli
from dovetail.reproduce import fp8_loss_gap
from dovetail.reproduce.fp8_loss_gap import HEADER, Result, as_json, printed_notes, printed_rows, reproduce, run_config
from dovetail.text.documents import DataConfig
from dovetail.train.compare.gap import PAPER
from dovetail.train.run.run_file import ModelConfig, RunConfig

TINY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "n_routed_experts": 8,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The experiment's own settings, with a tiny model and little text."""
    text = tmp_path_factory.mktemp("text")
    words = random.Random(0)
    for number in range(12):
        lines = (" ".join(words.choices(["alpha", "beta", "gamma", "delta"], k=12)) for _ in range(60))
        (text / f"{number}.txt").write_text("\n".join(lines))
    train = run_config().train.model_copy(update={"steps": 5, "sequence_length": 32})
    data = DataConfig(kind="files", path=text, held_out_share=0.0)
    changes = {"model": ModelConfig(preset="quickstart", change=TINY), "data": data, "train": train}
    return run_config().model_copy(update=changes)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> Result:
    return reproduce(tmp_path_factory.mktemp("reproduce") / "gap.png", 2, config)


def test_ours_is_beside_the_paper(result: Result) -> None:
    rows = list(printed_rows(result))
    assert {len(row) for row in rows} == {len(HEADER)} and len(rows) == 2 + 2
    assert [row[0] for row in rows if row[-1]] == ["mean"] and rows[2][-1] == "< 0.25%"
    assert result.picture.exists() and (result.directory / "compare.jsonl").exists()
    record = json.loads(json.dumps(as_json(result)))
    assert record["paper"] == PAPER and record["is_reproduced"] == result.is_reproduced
    assert [each["gap"] for each in record["loss"]["seeds"]] == [each.gap for each in result.gap.seeds]


def spread(result: Result, *gaps: float) -> Result:
    seeds = tuple(replace(result.gap.seeds[0], seed=index, gap=gap) for index, gap in enumerate(gaps))
    return replace(result, gap=replace(result.gap, seeds=seeds))


@pytest.mark.parametrize(
    ("gaps", "is_reproduced", "words"),
    [
        ((0.0010, 0.0011, 0.0012), True, ("above bf16", "within the paper's 0.25%")),
        ((0.0002, -0.0003, 0.0003), True, ("cannot be told apart", "within the paper's 0.25%")),
        ((-0.0010, 0.0030, 0.0005), False, ("cannot be told apart", "cannot say whether")),
        ((0.0100, 0.0101, 0.0102), False, ("above bf16", "beyond the paper's 0.25%")),
        ((0.0001,), False, ("one seed does not say",)),
    ],
)
def test_a_spread_that_hides_the_gap_is_told(
    result: Result, gaps: tuple[float, ...], is_reproduced: bool, words: tuple[str, ...]
) -> None:
    found = spread(result, *gaps)
    assert found.is_reproduced == is_reproduced
    notes = "\n".join(printed_notes(found))
    assert all(each in notes for each in words), notes


def test_the_command_goes_on_where_it_was(result: Result, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_loss_gap, "reproduce", partial(reproduce, num_seeds=2, config=config))
    log = result.directory / "compare.jsonl"
    before = log.read_bytes()
    done = CliRunner().invoke(cli.app, ["reproduce", "fp8_loss_gap", "--out", str(result.picture)])
    assert "Loss of the deepseek-v3 recipe over BF16" in done.stdout and "(95 %)" in done.stdout
    assert log.read_bytes() == before
    if done.exception is not None:
        assert "not every published number was reproduced" in str(done.exception) and not result.is_reproduced
