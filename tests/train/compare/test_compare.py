"""Two runs side by side: each as `train` would make it, in the order of seeds, and resumed by whole seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dovetail.config import load_toml
from dovetail.train.compare.compare import LOG, compare, keep_settings, measure
from dovetail.train.compare.pairs import HeldOutPair, Pair, Record, read_records
from dovetail.train.compare.sides import Comparison, Settings, comparison
from dovetail.train.report.metrics import StepMetrics, WholeHeldOutMetrics, read_metrics
from dovetail.train.run import loop
from dovetail.train.run.claim import only_run
from dovetail.train.run.loop import train
from dovetail.train.run.run_file import RunConfig
from dovetail.train.run.stop import Interrupted
from dovetail.train.step import step as stepping
from dovetail.train.step.team import Alone

Build = Callable[..., RunConfig]
Compared = Callable[..., Comparison]


def without_times(records: list[Record]) -> list[Record]:
    return [
        replace(each, **{side: replace(getattr(each, side), seconds=0.0) for side in "ab"})
        if isinstance(each, Pair)
        else each
        for each in records
    ]


def losses(records: list[Record], side: str) -> list[float]:
    steps = [getattr(each, side) for each in records if isinstance(each, Pair)]
    return [step.loss for step in steps if step is not None]


def differences(records: list[Record]) -> list[float]:
    return [each.difference for each in records if isinstance(each, Pair)]


def test_a_recipe_differs_from_another_and_not_from_itself(compared: Compared) -> None:
    what = compared(name="same")
    same = compare(replace(what, settings=what.settings.model_copy(update={"b": what.settings.a})), 1)
    assert differences(same) == [0.0] * 4
    other = compare(compared(), 1)
    assert losses(other, "a") == losses(same, "a")
    assert all(0 < abs(difference) < 0.1 for difference in differences(other))


@pytest.mark.parametrize(
    "b",
    [
        {"precision": "deepseek-v3"},
        {"sequence_length": 16, "seed": 7, "steps": 5, "learning_rate": 1e-3, "batch_size": 8},
    ],
)
def test_both_sides_are_the_runs_that_train_would_make(
    b: dict[str, object], tmp_path: Path, base: Build, compared: Compared
) -> None:
    changes = {"steps": 3, "seed": 3, "microbatch_size": 2}
    records = compare(compared(b=b, **changes), 1)
    for side, settings in (("a", changes), ("b", {**changes, **b})):
        config = base(**settings).model_copy(update={"out": tmp_path / side})
        train(config)
        metrics = read_metrics(config.out / "metrics.jsonl")
        steps = [each for each in metrics if isinstance(each, StepMetrics)]
        ours = [getattr(each, side) for each in records if isinstance(each, Pair)]
        ours = [each for each in ours if each is not None]
        assert [each.loss for each in ours] == [each.loss for each in steps]
        assert [each.mtp for each in ours] == [[each.mtp_loss] for each in steps]  # of one depth
        assert [each.tokens for each in ours] == [each.tokens for each in steps]
        bits = [getattr(each, side) for each in records if isinstance(each, HeldOutPair)]
        if "seed" in b:
            assert bits == [each.bits_per_byte for each in metrics if isinstance(each, WholeHeldOutMetrics)]
        else:
            assert bits == []  # the same batches: nothing else is measured


@pytest.mark.parametrize(
    ("recipe", "base_recipe", "alike"),  # of the losses: the first has seen no gradient, the second no stored moment
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
def test_ablations_train_and_differ_from_their_base(recipe: str, base_recipe: str, alike: int, base: Build) -> None:
    config = base(steps=3, precision=base_recipe)
    found = differences(compare(comparison(config, base(steps=3, precision=recipe)), 1))
    assert found[:alike] == [0.0] * alike
    assert all(0 < abs(difference) < 0.1 for difference in found[alike:])


def test_models_of_other_sizes_see_the_same_batches(base: Build, tmp_path: Path) -> None:
    a = base()
    wider = a.model.model_copy(update={"change": {**a.model.change, "hidden_size": 96, "num_nextn_predict_layers": 2}})
    summary = measure(comparison(a, a.model_copy(update={"model": wider}), out=tmp_path / "pairs"), 2)
    assert [gap.measure for gap in summary.gaps] == ["loss", "MTP loss, depth 1"]  # what both have
    assert summary.sides[0].parameters < summary.sides[1].parameters
    pairs = [each for each in read_records(tmp_path / "pairs" / LOG) if isinstance(each, Pair)]
    assert {(len(pair.a.mtp), len(pair.b.mtp)) for pair in pairs if pair.a and pair.b} == {(1, 2)}


def test_other_vocabularies_are_compared_by_bits_per_byte(base: Build, tmp_path: Path) -> None:
    a = base()
    other = a.model.model_copy(update={"change": {**a.model.change, "vocab_size": 320}})
    summary = measure(comparison(a, a.model_copy(update={"model": other}), out=tmp_path / "pairs"), 2)
    assert summary.loss is None and summary.mtp == ()
    (gap,) = summary.held_out
    assert [each.seed for each in gap.seeds] == [0, 1]
    assert all(each.a > 0 and each.gap == (each.b - each.a) / each.a for each in gap.seeds)
    assert (tmp_path / "pairs" / "compare.png").exists()


def test_seeds_come_in_order_and_do_not_depend_on_each_other(compared: Compared) -> None:
    pairs = compare(compared(seed=5), 3)
    places = [(pair.seed, pair.step) for pair in pairs if isinstance(pair, Pair)]
    assert places == [(seed, step) for seed in (5, 6, 7) for step in (1, 2, 3, 4)]
    assert len(set(losses(pairs, "a"))) == len(set(losses(pairs, "b"))) == 12
    alone = compare(compared(name="alone", seed=6), 1)
    assert without_times(alone) == without_times(pairs[4:8])


def test_a_stopped_comparison_goes_on_after_its_last_whole_seed(
    compared: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = stepping.team_step, []

    def stopping(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 8 + 5:  # in the third step of the second seed
            raise KeyboardInterrupt
        return step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "team_step", stopping)
    stopped = compared(name="stopped")
    with pytest.raises(Interrupted, match="1 whole seeds"):
        compare(stopped, 2)
    last = read_records(stopped.out / LOG)[-3:]
    assert [(pair.seed, pair.step) for pair in last if isinstance(pair, Pair)] == [(0, 4), (1, 1), (1, 2)]
    calls[:] = [1] * 100
    resumed = compare(stopped, 2)
    assert len(calls) == 100 + 8  # of the second seed alone
    assert resumed == read_records(stopped.out / LOG)
    assert without_times(resumed) == without_times(compare(compared(name="whole"), 2))
    calls.clear()
    assert compare(stopped, 1) == resumed[:4] and not calls
    assert [pair.seed for pair in compare(stopped, 3)] == [0] * 4 + [1] * 4 + [2] * 4
    assert len(calls) == 8


def test_a_seed_without_its_measurement_on_held_out_text_is_not_whole(compared: Compared) -> None:
    what = compared(b={"seed": 9}, steps=1)
    records = compare(what, 1)
    path = what.out / LOG
    path.write_text("".join(path.read_text("utf-8").splitlines(keepends=True)[:-1]), "utf-8")
    assert without_times(compare(what, 1)) == without_times(records)


def test_a_step_that_is_not_finite_is_null_and_counted(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = stepping.team_step, []

    def poisoned(team: Alone, *rest: object) -> object:
        calls.append(1)
        if len(calls) == 6:  # B's side of the third step
            team.models[0].norm.weight.data[0] = float("nan")
        return step(team, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "team_step", poisoned)
    what = compared()
    pairs = [pair for pair in compare(what, 1) if isinstance(pair, Pair)]
    assert [pair.b.skipped for pair in pairs if pair.b] == [False, False, True, True]
    assert not any(pair.a.skipped for pair in pairs if pair.a)
    assert math.isnan(pairs[-1].difference)
    last = json.loads((what.out / LOG).read_text().splitlines()[-1])
    assert last["b"]["loss"] is None and isinstance(last["a"]["loss"], float)


def test_before_the_first_record_settings_may_change(compared: Compared) -> None:
    """What stopped the first attempt was mended, and the tokenizer of that attempt may be another one."""
    keep_settings(compared(steps=1))
    mended = compared(steps=2)
    (mended.out / "tokenizer").mkdir()
    keep_settings(mended)
    assert load_toml(mended.out / "compare.toml", Settings) == mended.settings
    assert not (mended.out / "tokenizer").exists()


def test_a_comparison_is_made_by_one_process(compared: Compared) -> None:
    what = compared(steps=1)
    with only_run(what.out), pytest.raises(ValueError, match="this comparison is being made by another process"):
        compare(what, 1)


def test_a_side_that_cannot_be_trained_and_a_directory_with_other_settings(compared: Compared, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use dtype bfloat16"):
        compare(compared(name="wide", dtype="float32"), 1)
    assert not (tmp_path / "wide").exists()  # so that the same command with another dtype works
    compare(compared(steps=1), 1)
    with pytest.raises(
        ValueError, match=r"a comparison with other settings \(a.train.steps was 1 and is now 2; .*--out"
    ):
        compare(compared(steps=2), 1)
