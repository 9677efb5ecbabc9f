"""The precision of a run file: a name, a recipe file that is kept with the run, a table; and what cannot be trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from dovetail.catalog.precision import load_recipe
from dovetail.config import dump, load_toml
from dovetail.train.report.metrics import StepMetrics, read_metrics
from dovetail.train.run.loop import train
from dovetail.train.run.run_file import RunConfig

Build = Callable[..., RunConfig]
OWN = 'source = "a thesis"\nlike = "deepseek-v3"\n[every]\ngrad = { tile = "block" }\n'


@pytest.fixture
def run_file(tmp_path: Path, text: Path, tiny_run: Build, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run file of three steps, in the current directory, beside the recipe file mine.toml."""
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(OWN, "utf-8")
    path = Path("run.toml")
    path.write_text(dump(tiny_run(Path("out"), text, steps=3, dtype="bfloat16")), "utf-8")
    return path


def config_of(run_file: Path, precision: str, *others: str) -> RunConfig:
    return load_toml(run_file, RunConfig, [f"train.precision={precision}", *others])


def test_a_recipe_file_trains_as_the_recipe_of_the_catalog_that_it_spells(run_file: Path) -> None:
    losses = {}
    for precision in ("mine.toml", "v3-block-gradients", "deepseek-v3"):
        train(config_of(run_file, precision, f"out=out/{precision}"))
        steps = read_metrics(Path("out", precision, "metrics.jsonl"))
        losses[precision] = [each.loss for each in steps if isinstance(each, StepMetrics)]
    assert losses["mine.toml"] == losses["v3-block-gradients"] != losses["deepseek-v3"]


def test_a_run_keeps_what_its_recipe_file_said(run_file: Path) -> None:
    train(config_of(run_file, "mine.toml"))
    train(config_of(run_file, "mine.toml"))  # goes on
    Path("mine.toml").write_text(OWN.replace("block", "tensor"), "utf-8")
    with pytest.raises(ValueError, match=r"train.precision.every.grad.tile was 'block' and is now 'tensor'"):
        train(config_of(run_file, "mine.toml"))
    Path("mine.toml").unlink()
    kept = load_toml(Path("out/run.toml"), RunConfig)
    assert load_recipe(kept.train.precision).name == "mine.toml"
    train(kept)  # the directory is enough


def test_a_recipe_stands_in_the_run_file_too(run_file: Path) -> None:
    lines = 'precision = { name = "mine", source = "x", like = "deepseek-v3", every = { grad = { tile = "block" } } }'
    run_file.write_text(run_file.read_text("utf-8").replace('precision = "bf16"', lines), "utf-8")
    recipe = load_recipe(load_toml(run_file, RunConfig).train.precision)
    assert recipe.sites == load_recipe("v3-block-gradients").sites and recipe.name == "mine"


@pytest.mark.parametrize(
    ("precision", "words"),
    [
        ("deepsek-v3", "train.precision = 'deepsek-v3': 'deepsek-v3' is no precision recipe; did you mean deepseek-v3"),
        ("nowhere.toml", "train.precision = 'nowhere.toml': nowhere.toml: no such file"),
        ("3", "train.precision = 3: expected the name of a recipe, a recipe file, or a table"),
        (
            '{ name = "x", source = "x", evry = {} }',
            "train.precision: a recipe: unknown key 'evry'; did you mean every",
        ),
        ('{ source = "x" }', "train.precision: a recipe: missing key 'name'"),
    ],
)
def test_what_is_no_recipe(precision: str, words: str, run_file: Path) -> None:
    with pytest.raises(ValueError, match=f"^run.toml: {words}") as caught:
        config_of(run_file, precision)
    assert not isinstance(caught.value, ValidationError)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ('[sites.expert_up]\ninput = { tile = "row" }', "'cannot.toml' quantises one of expert_up and expert_down"),
        ('expert_output = "logfmt-13"', "expert_output 'logfmt-13': LogFMT has 4 to 12 bits"),
    ],
)
def test_a_recipe_that_training_cannot_run_is_refused_before_anything_is_written(
    recipe: str, words: str, run_file: Path
) -> None:
    Path("cannot.toml").write_text(f'source = "x"\n{recipe}\n', "utf-8")
    with pytest.raises(ValueError, match=words):
        train(config_of(run_file, "cannot.toml"))
    assert not Path("out").exists()
