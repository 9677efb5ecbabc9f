"""Two recipes side by side: equal where they must be, in the order of seeds, and resumed by whole seeds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dovetail.cli import app as cli
from dovetail.config import dump
from dovetail.train.compare import compare as comparing
from dovetail.train.compare.compare import LOG, Comparison, compare, comparison
from dovetail.train.compare.pairs import Pair, line, read_pairs, whole_seeds
from dovetail.train.report.metrics import StepMetrics, read_metrics
from dovetail.train.run.loop import Interrupted, train
from dovetail.train.run.run_file import RunConfig

Build = Callable[..., RunConfig]


@pytest.fixture
def settings(tmp_path: Path, text: Path, tiny_run: Build) -> Callable[..., Comparison]:
    """`settings(recipe, name, key=value)`: four steps of a tiny model, in directory `name`."""

    def build(recipe: str = "deepseek-v3", name: str = "pairs", **changes: object) -> Comparison:
        config = tiny_run(tmp_path / "run", text, **{"steps": 4, "dtype": "bfloat16", **changes})
        return comparison(config, recipe, out=tmp_path / name)

    return build


def without_times(pairs: list[Pair]) -> list[Pair]:
    return [replace(pair, base_seconds=0.0, seconds=0.0) for pair in pairs]


def test_a_recipe_differs_from_another_and_not_from_itself(settings: Callable[..., Comparison]) -> None:
    same = compare(settings("bf16", "same"), 1)
    assert [pair.difference for pair in same] == [0.0] * 4
    other = compare(settings(), 1)
    assert [pair.base_loss for pair in other] == [pair.base_loss for pair in same]
    assert all(0 < abs(pair.difference) < 0.1 for pair in other)


def test_both_sides_are_the_runs_that_train_would_make(
    tmp_path: Path, text: Path, tiny_run: Build, settings: Callable[..., Comparison]
) -> None:
    changes = {"steps": 3, "dtype": "bfloat16", "seed": 3, "microbatch_size": 2}
    pairs = compare(settings(**changes), 1)
    losses = {"bf16": [pair.base_loss for pair in pairs], "deepseek-v3": [pair.loss for pair in pairs]}
    for precision, ours in losses.items():
        out = tmp_path / precision
        train(tiny_run(out, text, precision=precision, **changes))
        steps = [each for each in read_metrics(out / "metrics.jsonl") if isinstance(each, StepMetrics)]
        assert ours == [each.loss for each in steps]
        assert [pair.tokens for pair in pairs] == [each.tokens for each in steps]


@pytest.mark.parametrize(
    ("recipe", "base", "alike"),  # of the losses: the first has seen no gradient, the second no stored moment
    [
        ("v3-per-tensor", "deepseek-v3", 0),
        ("v3-e5m2-gradients", "deepseek-v3", 1),
        ("v3-block-gradients", "deepseek-v3", 1),
        ("v3-hopper", "deepseek-v3", 0),
        ("v3-no-promotion", "deepseek-v3", 0),
        ("bf16-fp32-moments", "bf16", 2),
        ("combine-e4m3", "bf16", 0),
        ("combine-logfmt-8", "combine-e5m2", 0),
    ],
)
def test_ablations_train_and_differ_from_their_base(
    recipe: str, base: str, alike: int, tmp_path: Path, text: Path, tiny_run: Build
) -> None:
    config = tiny_run(tmp_path / "run", text, steps=3, dtype="bfloat16")
    differences = [pair.difference for pair in compare(comparison(config, recipe, base), 1)]
    assert differences[:alike] == [0.0] * alike
    assert all(0 < abs(difference) < 0.1 for difference in differences[alike:])


def test_seeds_come_in_order_and_do_not_depend_on_each_other(settings: Callable[..., Comparison]) -> None:
    pairs = compare(settings(seed=5), 3)
    assert [(pair.seed, pair.step) for pair in pairs] == [(seed, step) for seed in (5, 6, 7) for step in (1, 2, 3, 4)]
    assert len({pair.loss for pair in pairs}) == len({pair.base_loss for pair in pairs}) == 12
    alone = compare(settings(name="alone", seed=6), 1)
    assert without_times(alone) == without_times(pairs[4:8])


def test_a_stopped_comparison_goes_on_after_its_last_whole_seed(
    settings: Callable[..., Comparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = comparing.train_step, []

    def stopping(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 8 + 5:  # in the third step of the second seed
            raise KeyboardInterrupt
        return step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(comparing, "train_step", stopping)
    stopped = settings(name="stopped")
    with pytest.raises(Interrupted, match="1 whole seeds"):
        compare(stopped, 2)
    assert [(pair.seed, pair.step) for pair in read_pairs(stopped.run.out / LOG)][-3:] == [(0, 4), (1, 1), (1, 2)]
    calls[:] = [1] * 100
    resumed = compare(stopped, 2)
    assert len(calls) == 100 + 8  # of the second seed alone
    assert resumed == read_pairs(stopped.run.out / LOG)
    assert without_times(resumed) == without_times(compare(settings(name="whole"), 2))
    calls.clear()
    assert compare(stopped, 1) == resumed[:4] and not calls
    assert [pair.seed for pair in compare(stopped, 3)] == [0] * 4 + [1] * 4 + [2] * 4
    assert len(calls) == 8


def test_a_step_that_is_not_finite_is_null_and_counted(
    settings: Callable[..., Comparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = comparing.train_step, []

    def poisoned(model: comparing.Transformer, *rest: object) -> object:
        calls.append(1)
        if len(calls) == 6:  # the recipe's side of the third step
            model.norm.weight.data[0] = float("nan")
        return step(model, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(comparing, "train_step", poisoned)
    pairs = compare(settings(), 1)
    assert [pair.skipped for pair in pairs] == [False, False, True, True]
    assert not any(pair.base_skipped for pair in pairs)
    last = json.loads((settings().run.out / LOG).read_text().splitlines()[-1])
    assert last["loss"] is None and isinstance(last["base_loss"], float)


def test_settings_that_cannot_be_compared(
    tmp_path: Path, text: Path, tiny_run: Build, settings: Callable[..., Comparison]
) -> None:
    timed = tiny_run(tmp_path / "run", text, steps=None, minutes=2)
    with pytest.raises(ValueError, match=r"train.minutes = 2; .* give --steps"):
        comparison(timed, "deepseek-v3")
    assert comparison(timed, "deepseek-v3", steps=7).steps == 7
    assert comparison(timed, "bf16", steps=7).run.out == tmp_path / "run-bf16-bf16"
    for names in (("deepseek-v33",), ("bf16", "deepseek-v33")):
        with pytest.raises(ValueError, match="'deepseek-v33' is no precision recipe; did you mean deepseek-v3"):
            comparison(timed, *names, steps=7)
    with pytest.raises(ValueError, match="use dtype bfloat16"):
        compare(settings(name="wide", dtype="float32"), 1)
    assert not (tmp_path / "wide").exists()  # so that the same command with another dtype works
    compare(settings(steps=1), 1)
    with pytest.raises(ValueError, match="other settings .*there steps = 1; now steps = 2.* another --out"):
        compare(settings(steps=2), 1)


def test_a_log_with_a_torn_end_and_one_with_a_bad_line(tmp_path: Path) -> None:
    pair = Pair(
        seed=0,
        step=1,
        tokens=8,
        base_loss=2.0,
        loss=float("nan"),
        base_skipped=False,
        skipped=True,
        base_seconds=0.1,
        seconds=0.2,
    )
    second, path = replace(pair, step=2, loss=3.0), tmp_path / LOG
    path.write_text(line(pair) + line(second) + line(pair)[:40])
    first, *rest = read_pairs(path)
    assert rest == [second] and first.loss != first.loss and second.difference == 0.5
    for bad in ("{}\n", "[]\n", '{"seed": 0, "stop": 1}\n', line(pair)[:40] + "\n"):
        path.write_text(line(pair) + bad + line(second))
        with pytest.raises(ValueError, match="line 2 is not of a comparison"):
            read_pairs(path)
    assert whole_seeds([pair, second], 2) == {0: [pair, second]}
    assert whole_seeds([second, pair], 2) == whole_seeds([pair], 2) == whole_seeds([pair, second], 1) == {}


def test_the_command(tmp_path: Path, text: Path, tiny_run: Build) -> None:
    path, out = tmp_path / "run.toml", tmp_path / "pairs"
    path.write_text(dump(tiny_run(tmp_path / "run", text, dtype="bfloat16")))
    arguments = ["compare", str(path), "--recipe", "deepseek-v3", "--seeds", "2", "--set", f"out={tmp_path / 'other'}"]
    done = CliRunner().invoke(cli.app, [*arguments, "--steps", "2", "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "deepseek-v3 against bf16, 2 steps" in done.stdout and "standard deviation" in done.stdout
    assert {"compare.toml", LOG, "compare.png"} <= {each.name for each in out.iterdir()}
    again = CliRunner().invoke(cli.app, [*arguments, "--steps", "2", "--out", str(out), "--json"])
    record = json.loads(again.stdout)
    assert [each["seed"] for each in record["seeds"]] == [0, 1] and record["steps"] == 2
    failed = CliRunner().invoke(cli.app, ["compare", str(path), "--recipe", "fp8"])
    assert isinstance(failed.exception, ValueError) and "no precision recipe" in str(failed.exception)
    assert not (tmp_path / "run-bf16-fp8").exists()
