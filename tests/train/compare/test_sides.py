"""What differs between two runs, what the sides are called, which batches they share, and what cannot be compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dovetail.text.documents import DataConfig
from dovetail.text.tokenizer import Tokenizer
from dovetail.train.compare.sides import Comparison, comparison
from dovetail.train.run.run_file import ModelConfig, RunConfig, TokenizerConfig
from dovetail.train.step.schedule import Schedule, Segment, load_schedule

Build = Callable[..., RunConfig]
Compared = Callable[..., Comparison]


def with_data(config: RunConfig, **changes: object) -> RunConfig:
    return config.model_copy(update={"data": DataConfig(**{**config.data.model_dump(), **changes})})


def with_model(config: RunConfig, **changes: object) -> RunConfig:
    model = ModelConfig(preset="quickstart", change={**config.model.change, **changes})
    return config.model_copy(update={"model": model})


@pytest.mark.parametrize(
    ("b", "names", "directory"),
    [
        ({"precision": "deepseek-v3"}, ("bf16", "deepseek-v3"), "run-bf16-deepseek-v3"),
        (
            {"learning_rate": 0.002},
            ("learning_rate by default", "learning_rate 0.002"),
            "run-learning_rate_by_default-learning_rate_0.002",
        ),
        ({"precision": "deepseek-v3", "recompute": True}, ("A", "B"), "run-A-B"),
    ],
)
def test_one_setting_that_differs_names_the_sides(
    b: dict[str, object], names: tuple[str, str], directory: str, base: Build, tmp_path: Path
) -> None:
    what = comparison(base(), base(**b))
    assert what.names == names and what.out == tmp_path / directory
    assert list(what.changes) == sorted(f"train.{key}" for key in b)


def test_files_name_the_sides(base: Build, tmp_path: Path) -> None:
    what = comparison(base(), base(learning_rate=1e-3), names=("runs/small.toml", "b.toml"))
    assert what.names == ("runs/small.toml", "b.toml") and what.out == tmp_path / "small-b"


def test_a_recipe_file_is_called_by_its_path(base: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text('source = "x"\nlike = "deepseek-v3"\n', "utf-8")
    what = comparison(base(), base(precision="mine.toml"))
    assert what.changes == {"train.precision": ("bf16", "mine.toml")} and what.out == tmp_path / "run-bf16-mine"
    Path("mine.toml").write_text('source = "x"\nlike = "deepseek-v3.1"\n', "utf-8")
    again = comparison(what.settings.a, base(precision="mine.toml"))
    both = comparison(what.settings.b, again.settings.b)  # of one name: what is inside says the difference
    assert both.changes == {"train.precision.like": ("deepseek-v3", "deepseek-v3.1")}


@pytest.mark.parametrize(
    ("b", "unpaired"),
    [
        ({"precision": "deepseek-v3"}, ()),
        ({"learning_rate": 0.1}, ()),
        ({"microbatch_size": 2}, ()),  # of four sequences as well
        ({"sequence_length": 16}, ("sequence lengths",)),
        ({"seed": 1}, ("seeds",)),
        ({"steps": 5}, ("numbers of steps",)),
        ({"batch_size": 8, "seed": 1}, ("seeds", "batch sizes")),
    ],
)
def test_what_keeps_the_sides_from_the_same_batches(
    b: dict[str, object], unpaired: tuple[str, ...], compared: Compared, tmp_path: Path
) -> None:
    what = compared(b=b, batch_size=4)
    assert what.unpaired == unpaired and what.is_same_text
    assert list(what.held_out) == (["held-out text"] if unpaired else [])
    assert [side.out for side in what.sides] == [tmp_path / "pairs"] * 2  # one tokenizer for both


def test_batch_sizes_are_compared_over_the_whole_schedule(base: Build, tmp_path: Path) -> None:
    a = base(steps=8, microbatch_size=2)
    schedules = []
    for last in (4, 5, 6):
        sizes = Schedule(segments=(Segment(value=4, fraction=0.9), Segment(value=last)))
        schedule = load_schedule("quickstart").model_copy(update={"batch_size": sizes})
        schedules.append(a.model_copy(update={"schedule": schedule}))
    constant, rounded, growing = schedules
    assert comparison(constant, rounded, out=tmp_path).unpaired == ()  # 5 is 4, in micro-batches of two
    assert comparison(constant, growing, out=tmp_path).unpaired == ("batch sizes",)


def test_a_model_of_the_same_vocabulary_shares_tokenizer_and_batches(base: Build, tmp_path: Path) -> None:
    a = base()
    wider, other = with_model(a, hidden_size=96), with_model(a, vocab_size=310)
    assert comparison(a, wider).unpaired == ()
    what = comparison(a, other, out=tmp_path / "pairs")
    assert what.unpaired == ("tokenizers",) and not what.is_same_text
    assert list(what.held_out) == ["held-out text"]
    assert [side.out for side in what.sides] == [tmp_path / "pairs" / "a", tmp_path / "pairs" / "b"]


def test_other_text_is_measured_on_what_each_side_holds_out(base: Build, tmp_path: Path) -> None:
    a = base()
    for changes, unpaired, texts in (
        ({"fim_rate": 0.5}, ("text",), ["held-out text"]),
        ({"patterns": ("1*.txt",)}, ("tokenizers", "text"), ["A's held-out text", "B's held-out text"]),
        ({"path": tmp_path, "held_out_share": 0.0}, ("tokenizers", "text"), ["A's held-out text"]),
    ):
        what = comparison(a, with_data(a, **changes), out=tmp_path / "pairs")
        assert (what.unpaired, list(what.held_out), what.is_same_text) == (unpaired, texts, False)
    assert {data.fim_rate for data in what.held_out.values()} == {DataConfig().fim_rate}  # held-out text is never cut


def test_equal_tokenizer_files_are_one_tokenizer(base: Build, tmp_path: Path) -> None:
    for name, words in (("one", "alpha beta"), ("two", "alpha beta"), ("three", "gamma delta")):
        (tmp_path / name).mkdir()
        Tokenizer.train([f"{words} " * 9], 290).save(tmp_path / name)
    a, same, other = (
        base().model_copy(update={"tokenizer": TokenizerConfig(path=tmp_path / name)})
        for name in ("one", "two", "three")
    )
    assert comparison(a, with_model(same, hidden_size=96)).unpaired == ()
    assert comparison(a, other).unpaired == ("tokenizers",)
    assert comparison(a, base()).unpaired == ("tokenizers",)  # one is trained, and nobody knows it yet


def test_what_cannot_be_compared_is_refused_with_a_remedy(base: Build, tmp_path: Path) -> None:
    a = base()
    for b in (a, base(ema_decay=0.5, checkpoint_every=1, health_every=2)):
        with pytest.raises(
            ValueError, match="nothing that changes a loss differs between A and B: .* --set-b train.prec"
        ):
            comparison(a, b)
    with pytest.raises(ValueError, match=r"hold out different shares of it \(0.2 and 0.3\).*same data.held_out_share"):
        comparison(a, with_data(a, held_out_share=0.3))
    bare = with_data(a, held_out_share=0.0)
    with pytest.raises(
        ValueError, match=r"different batches \(other seeds\) and hold no text out.*--set data.held_out"
    ):
        comparison(bare, with_data(base(seed=1), held_out_share=0.0))
    assert comparison(bare, with_data(base(precision="deepseek-v3"), held_out_share=0.0)).unpaired == ()
    timed = base(steps=None, minutes=2)
    for sides in ((timed, a), (a, timed)):
        with pytest.raises(ValueError, match="train.minutes = 2; .* give --steps"):
            comparison(*sides)
    assert comparison(timed, base(seed=1), steps=7).steps == (7, 7)
