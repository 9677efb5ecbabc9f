"""Run files: what a user may write, and the one line for each thing that is wrong."""

from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from dovetail.config import Record, UserPath, apply_override, differences, dump, load_toml, near_matches, read_json


class Optimizer(Record):
    learning_rate: float = Field(default=3e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["cosine", "constant"] = "cosine"


class Run(Record):
    steps: int
    name: str = "run"
    resume: bool = True
    data: Path | None = None
    optimizer: Optimizer = Optimizer()


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def failure(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_toml(write(tmp_path, text), Run, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_file_becomes_a_frozen_object(tmp_path: Path) -> None:
    run = load_toml(write(tmp_path, 'steps = 7\ndata = "books"\n[optimizer]\nbetas = [0.8, 0.9]\n'), Run)
    assert (run.steps, run.data, run.optimizer.betas) == (7, Path("books"), (0.8, 0.9))
    with pytest.raises(ValueError, match="frozen"):
        run.steps = 8


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("step = 7", ["run.toml", "unknown key 'step'", "did you mean steps?"]),
        (
            "steps = 7\n[optimizer]\nlearningrate = 1.0",
            ["unknown key 'optimizer.learningrate'", "learning_rate"],
        ),
        (
            "steps = 7\n[optimizer]\nzzz = 1.0",
            ["unknown key 'optimizer.zzz'", "betas, learning_rate, schedule"],
        ),
        ("name = 'a'", ["run.toml", "missing key 'steps'"]),
        ("steps = '200'", ["steps = '200'", "integer"]),
        ("steps = true", ["steps = True", "integer"]),
        ("steps = 1.5", ["steps = 1.5", "integer"]),
        ("steps = 7\nresume = 1", ["resume = 1", "boolean"]),
        (
            "steps = 7\n[optimizer]\nlearning_rate = -1.0",
            ["optimizer.learning_rate = -1.0", "greater than 0"],
        ),
        (
            "steps = 7\n[optimizer]\nschedule = 'linear'",
            ["optimizer.schedule = 'linear'", "'cosine' or 'constant'"],
        ),
        ("steps = 7\n[optimizer]\nbetas = [1.0]", ["optimizer.betas"]),
        ("steps = 7\nsteps = 8", ["run.toml", "not valid TOML", "line 2"]),
        ("steps = [", ["run.toml", "not valid TOML", "line 1"]),
    ],
)
def test_each_mistake_is_one_line_with_key_value_and_remedy(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = failure(tmp_path, text)
    assert all(part in message for part in parts), message


def test_several_mistakes_are_counted_and_the_unknown_key_comes_first(tmp_path: Path) -> None:
    assert "unknown key 'stepz'; did you mean steps? (and 1 more problem)" in failure(tmp_path, "stepz = 7")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent.toml: no such file"):
        load_toml(tmp_path / "absent.toml", Run)
    with pytest.raises(ValueError, match="is a directory"):
        load_toml(tmp_path, Run)
    (tmp_path / "binary.toml").write_bytes(b"steps = 7 # \xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_toml(tmp_path / "binary.toml", Run)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    assert load_toml(write(tmp_path, "\ufeffsteps = 7"), Run).steps == 7
    assert read_json(write(tmp_path, '\ufeff{"a": "\u00e9"}')) == {"a": "\u00e9"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON: .* line 1"),
        (b"[]", "holds a JSON list, not an object of keys"),
        ("{}".encode("utf-16"), "not UTF-8 text .byte 0.; save it as UTF-8"),
    ],
)
def test_json_that_cannot_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.json: {message}"):
        read_json(tmp_path / "a.json")


def test_the_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Table(Record):
        out: UserPath
        other: UserPath | None = None

    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path, 'out = "~/runs/~x"')
    assert load_toml("~/run.toml", Table) == Table(out=tmp_path / "runs/~x")
    assert load_toml(path, Table, ["other=~"]).other == tmp_path
    assert load_toml(path, Table, ["other=a~b"]).other == Path("a~b")
    with pytest.raises(ValueError, match="other = '~nobody-here/x': .*~nobody-here is nobody's home directory"):
        load_toml(path, Table, ["other=~nobody-here/x"])


def test_overrides_are_toml_values_and_bare_strings(tmp_path: Path) -> None:
    overrides = [
        "steps=200",
        "optimizer.learning_rate = 1e-4",
        "optimizer.betas=[0.5, 0.6]",
        "name=my-run",
        "resume=false",
    ]
    run = load_toml(write(tmp_path, "steps = 7"), Run, [*overrides, "data=/corpus/a b.txt"])
    assert run == Run(
        steps=200,
        name="my-run",
        resume=False,
        data=Path("/corpus/a b.txt"),
        optimizer=Optimizer(learning_rate=1e-4, betas=(0.5, 0.6)),
    )


@pytest.mark.parametrize("override", ["steps", "=3", "a..b=1", "optimizer.=1", "a b=1"])
def test_an_override_without_a_dotted_key_is_refused(tmp_path: Path, override: str) -> None:
    assert "expected key=value" in failure(tmp_path, "steps = 7", override)


def test_an_override_is_checked_like_the_file(tmp_path: Path) -> None:
    assert "unknown key 'optimizer.betaz'; did you mean betas?" in failure(tmp_path, "steps = 7", "optimizer.betaz=1")
    assert "steps is 7, not a table" in failure(tmp_path, "steps = 7", "steps.inner=1")


def test_an_override_cannot_smuggle_in_a_second_key() -> None:
    table: dict[str, object] = {}
    apply_override(table, "name=1\nsteps = 9")
    assert table == {"name": "1\nsteps = 9"}


TEXT = st.text(st.characters(blacklist_categories=("Cs",)))


class Everything(Record):
    text: str
    whole: int
    real: float
    flag: bool
    items: list[str]
    nested: dict[str, dict[str, float]]
    tables: list[dict[str, int]]
    empty: str | None = None


@given(
    text=TEXT,
    whole=st.integers(-(2**62), 2**62),
    real=st.floats(allow_nan=False),
    flag=st.booleans(),
    items=st.lists(TEXT),
    nested=st.dictionaries(TEXT, st.dictionaries(TEXT, st.floats(allow_nan=False, allow_infinity=False))),
    tables=st.lists(st.dictionaries(TEXT, st.integers(0, 9))),
)
def test_what_is_dumped_loads_again(tmp_path_factory: pytest.TempPathFactory, **fields: object) -> None:
    record = Everything.model_validate(fields)
    path = tmp_path_factory.getbasetemp() / "dumped.toml"
    path.write_bytes(dump(record).encode())
    assert load_toml(path, Everything) == record


def test_near_matches_names_all_where_there_are_few() -> None:
    assert near_matches("stpes", ["steps", "name"]) == "did you mean steps?"
    assert near_matches("q", ["steps", "name"]) == "known: name, steps"
    assert near_matches("q", []) == ""


def test_differences_are_told_by_dotted_key_with_both_values() -> None:
    one = {"steps": 3, "data": {"path": "x", "patterns": ["a"]}, "same": {"key": 1}}
    other = {"steps": 4, "data": {"patterns": ["a", "b"]}, "same": {"key": 1}, "more": {}}
    assert differences(one, other) == {
        "data.path": ("x", None),
        "data.patterns": (["a"], ["a", "b"]),
        "steps": (3, 4),
    }
    assert differences(one, one) == {}
