"""Weights from a run: what is generated from it is what is generated from its export, and mistakes come first."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dovetail import convert
from dovetail.cli import app as cli
from dovetail.convert import ExportOptions, export, import_, load_llm
from dovetail.engine.llm import LLM
from dovetail.engine.sampler import SamplingParams
from dovetail.spec.hf_config import write_hf
from dovetail.spec.model import ModelSpec
from dovetail.text.documents import DataConfig
from dovetail.train.run.loop import train
from dovetail.train.run.run_file import ModelConfig, RunConfig, TrainConfig

TINY = {"vocab_size": 300, "hidden_size": 128, "num_hidden_layers": 2}
DRAWN = SamplingParams(temperature=0.8, max_tokens=12, seed=3)


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with a moving average."""
    directory = tmp_path_factory.mktemp("run")
    (directory / "text").mkdir()
    for number in range(12):
        (directory / "text" / f"{number}.txt").write_text(Path(__file__).read_text("utf-8") + str(number))
    settings = {"steps": 4, "sequence_length": 32, "microbatch_size": 4, "learning_rate": 0.02, "ema_decay": 0.5}
    config = RunConfig(
        out=directory / "out",
        model=ModelConfig(preset="quickstart", change=TINY),
        data=DataConfig(kind="files", path=directory / "text", held_out_share=0.3),
        train=TrainConfig(**settings, dtype=request.param),
    )
    train(config)
    return directory / "out"


@pytest.mark.parametrize("ema", [False, True])
def test_a_run_generates_what_its_export_does(run: Path, tmp_path: Path, ema: bool) -> None:
    list(export(run, tmp_path / "model", ExportOptions(ema=ema)))
    llm, weights = load_llm(run, ema)
    exported = LLM.load(tmp_path / "model")
    assert weights == f"{run}: weights after step 4" + (", moving average" if ema else "")
    prompts = ["def test", "import"]
    for params in (DRAWN, SamplingParams(temperature=0.0, max_tokens=12)):
        for depth in (0, 1):
            mine, theirs = (each.generate(prompts, params, depth) for each in (llm, exported))
            assert [each.token_ids for each in mine] == [each.token_ids for each in theirs]


def test_the_moving_average_is_another_model(run: Path) -> None:
    plain, average = (load_llm(run, ema)[0].model.state_dict() for ema in (False, True))
    assert any(not plain[name].equal(average[name]) for name in plain)


def test_a_checkpoint_is_loaded_as_before(run: Path, tmp_path: Path) -> None:
    list(export(run, tmp_path / "model", ExportOptions()))
    llm, weights = load_llm(tmp_path / "model")
    assert weights == "" and llm.spec.vocab_size == 300
    with pytest.raises(ValueError, match="only a run has a moving average"):
        load_llm(tmp_path / "model", ema=True)


def test_fp8_for_transformers_that_would_change_nothing_is_refused_from_the_config_alone(
    tmp_path: Path, tiny_spec: Callable[[], ModelSpec]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(write_hf(tiny_spec())), encoding="utf-8")
    with pytest.raises(ValueError, match="sides that are multiples of 128, so none can be FP8 for transformers"):
        list(export(tmp_path, tmp_path / "out", ExportOptions(fp8="transformers")))


def test_mistakes_are_found_before_weights_are_read(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list(export(run, tmp_path / "model", ExportOptions()))
    (tmp_path / "file").write_text("")
    for name in ("load_weights", "import_hf"):
        monkeypatch.setattr(convert, name, lambda *arguments, **named: pytest.fail("weights were read"))
    monkeypatch.setattr(
        "dovetail.engine.loaded.import_hf", lambda *arguments, **named: pytest.fail("weights were read")
    )
    for source in (run, tmp_path / "model"):
        with pytest.raises(ValueError, match="speculate = 2 drafts per step, but the model has 1"):
            load_llm(source, speculate=2)
        with pytest.raises(ValueError, match="model exists and is not empty"):
            list(export(source, tmp_path / "model", ExportOptions()))
        with pytest.raises(ValueError, match="file is a file, not a directory"):
            list(export(source, tmp_path / "file" / "model", ExportOptions()))
    with pytest.raises(ValueError, match="model exists and is not empty"):
        list(import_(tmp_path / "model", tmp_path / "model", drop_mtp=False, overwrite=False))
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer.json: no such file"):
        load_llm(tmp_path / "model")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("runs/nothing", "runs/nothing: no such directory; nothing is downloaded"),
        ("quickstart", "a preset has a shape and no weights"),
        ("deepseek-ai/DeepSeek-V3", "nothing is downloaded: fetch the repository and give its directory"),
        ("./nothing", "nothing: no such directory; give the directory of a run or of a checkpoint"),
    ],
)
def test_what_is_nowhere_says_what_is_wanted(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for act in (load_llm, lambda path: list(import_(path, tmp_path / "out", False, False))):
        with pytest.raises(ValueError, match=message):
            act(Path(source))


def test_generate_says_which_weights_on_stderr(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompt", "def ", "--temperature", "0", "--max-tokens", "3", "--ema"]
    monkeypatch.setattr(sys, "argv", ["dovetail", "generate", str(run), *options])
    with pytest.raises(SystemExit) as done:
        cli.main()
    said = capfd.readouterr()
    assert not done.value.code
    assert said.out.startswith("def ") and f"{run}: weights after step 4, moving average\n" in said.err
