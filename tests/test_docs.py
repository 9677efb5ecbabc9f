"""The documentation is true: names exist, links lead somewhere, code runs, tables are those of the classes.

A backticked dotted name that opens with a subpackage or module of dovetail, such as `train.run.loop.train`, is code.
Logs of the past (the changelog, docs/log.md) may name what is gone.
"""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from draw_tree import LONGEST, draw
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dovetail.catalog.precision import load_recipe
from dovetail.catalog.presets import read_model
from dovetail.config import load_toml, validate
from dovetail.model.checkpoint.weights import export_hf
from dovetail.model.transformer import Transformer, initialize
from dovetail.spec.family import Dial, dovetail_spec
from dovetail.text.documents import DataConfig
from dovetail.text.tokenizer import Tokenizer
from dovetail.train.layout.table import LayoutConfig
from dovetail.train.run.run_file import ModelConfig, RunConfig, TokenizerConfig, TrainConfig, resolve_model
from dovetail.train.step.optim import AdamWConfig
from dovetail.train.step.schedule import TrainingSchedule

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "dovetail"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LASTING = [page for page in PAGES if page.name not in ("CHANGELOG.md", "log.md")]
TOP = sorted({path.stem for path in SOURCE.iterdir() if path.stem.isidentifier() and not path.stem.startswith("_")})
NAME = re.compile(rf"`((?:{'|'.join(TOP)})(?:\.[A-Za-z_]\w*)+)`")
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILES = ("toml", "json", "jsonl", "py", "md")


def ids(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def blocks(page: Path, info: str) -> list[str]:
    return [body for header, body in FENCE.findall(page.read_text("utf-8")) if header.strip() == info]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text("utf-8"))


def resolve(name: str) -> Any:
    """What `name` stands for below dovetail: the longest module, then attributes."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module_name = ".".join(["dovetail", *parts[:length]])
        try:
            found = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not module_name.startswith(error.name):
                raise
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def names(text: str) -> list[str]:
    """Those of code: not of files, and not of published tensors (`model.layers.0.mlp.gate.weight`)."""
    found = [name for name in NAME.findall(text) if not name.startswith("model.layers.")]
    return [name for name in found if name.rsplit(".", 1)[1] not in FILES]


def test_a_name_is_found_and_a_wrong_one_is_not() -> None:
    assert names("`train.run.loop.train`, `config.json`, `torch.save`, `spec.model.ModelSpec.is_moe_layer`") == [
        "train.run.loop.train",
        "spec.model.ModelSpec.is_moe_layer",
    ]
    assert resolve("spec.model.ModelSpec").__name__ == "ModelSpec"
    for wrong in ("train.run.loop.trian", "train.run.lop.train", "spec.model.ModelSpec.is_moe_lair"):
        with pytest.raises((AttributeError, ModuleNotFoundError)):
            resolve(wrong)


@pytest.mark.parametrize("page", LASTING, ids=ids(LASTING))
def test_names_exist(page: Path) -> None:
    for name in names(prose(page)):
        resolve(name)


def test_the_tour_names_something_of_every_walk() -> None:
    found = set(names(prose(ROOT / "docs" / "tour.md")))
    assert found >= {
        "train.step.step.team_step",
        "engine.core.Core.step",
        "model.checkpoint.weights.export_hf",
        "cost.inspect.inspect",
    }
    assert len(found) > 80


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page}: {link}"
        assert target.is_relative_to(ROOT), f"{page}: {link} leaves the repository"
        assert not anchor or anchor in anchors(target), f"{page}: {link} has no such heading"


CODE = [  # of guides with console blocks, tests/test_guides.py runs all
    pytest.param(body, id=f"{page.relative_to(ROOT)}:{number}")
    for page in PAGES
    if not blocks(page, "console")
    for number, body in enumerate(blocks(page, "python"), start=1)
]


@pytest.fixture(scope="module")
def after_quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as `dovetail quickstart` leaves it, with a smaller model that has learnt nothing."""
    directory = tmp_path_factory.mktemp("docs")
    tokenizer = Tokenizer.train([Path(__file__).read_text("utf-8")], 320)
    spec = dovetail_spec(Dial(width=128, layers=2, experts=8, vocab_size=320))
    model = Transformer(spec)
    initialize(model, seed=0)
    tokenizer.save(directory)
    export_hf(model, spec, directory / "quickstart-5min" / "model", tokenizer_files=directory.glob("*.json"))
    return directory


@pytest.mark.parametrize("body", CODE)
def test_code_blocks_run(body: str, after_quickstart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(after_quickstart)
    exec(compile(body, "<docs>", "exec"), {"__name__": "docs"})


def test_the_tree_in_design_is_drawn_from_the_code() -> None:
    assert blocks(ROOT / "docs" / "design.md", "tree") == [draw(SOURCE)], "run python docs/draw_tree.py"


def test_every_file_and_folder_is_in_the_tree(tmp_path: Path) -> None:
    for name in ("__init__.py", "last.py", "room/__init__.py", "room/inner/__init__.py", "room/inner/first.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'"""About {name}.\n\nMore.\n"""\n', "utf-8")
    assert [line.split(maxsplit=1) for line in draw(tmp_path).splitlines() if line] == [
        ["__init__.py", "About __init__.py."],
        ["last.py", "About last.py."],
        ["room/", "About room/__init__.py."],
        ["inner/", "About room/inner/__init__.py."],
        ["first.py", "About room/inner/first.py."],
    ]


@pytest.mark.parametrize(
    "text",
    [
        "import os\n",
        '"""No period"""\n',
        '"""One sentence. And another."""\n',
        '"""A sentence that\ngoes on."""\n',
        '"""A sentence.\nNo blank line.\n"""\n',
        f'"""{"x" * LONGEST}."""\n',
    ],
)
def test_a_file_without_a_first_sentence_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(text, "utf-8")
    with pytest.raises(ValueError, match="the docstring has to open with one sentence"):
        draw(tmp_path)


def test_folders_hold_their_sentence_and_nothing_else() -> None:
    for path in SOURCE.glob("*/**/__init__.py"):
        assert len(ast.parse(path.read_text("utf-8")).body) == 1, path


def test_the_layers_in_design_are_those_that_are_checked() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    (printed,) = blocks(ROOT / "docs" / "design.md", "layers")
    assert printed.split("\n")[:-1] == [layer.replace("dovetail.", "") for layer in layers]


SECTIONS: dict[str, type[BaseModel]] = {
    "Top level": RunConfig,
    "[model]": ModelConfig,
    "[tokenizer]": TokenizerConfig,
    "[data]": DataConfig,
    "[train]": TrainConfig,
    "[layout]": LayoutConfig,
    "[optimizer]": AdamWConfig,
}
WORDS: dict[Any, str] = {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path"}


def kind(annotation: Any) -> str:
    """How the guide writes a field's type."""
    if annotation in WORDS:
        return WORDS[annotation]
    if get_origin(annotation) is Annotated:
        return kind(get_args(annotation)[0])
    arguments = [each for each in get_args(annotation) if each is not type(None)]
    if get_origin(annotation) is Literal:
        *most, last = (f'"{each}"' if isinstance(each, str) else str(each) for each in arguments)
        return f"{', '.join(most)} or {last}"
    if get_origin(annotation) is tuple:
        return f"list of {kind(arguments[0])}"
    if get_origin(annotation) is dict or isinstance(annotation, type):
        return "table"
    assert get_origin(annotation) in (Union, type(int | None)), annotation
    return " or ".join(kind(each) for each in arguments)


def default(value: Any) -> str:
    """How the guide writes a default: as TOML; "none" for None, nothing where one must be given or is a table."""
    if value is PydanticUndefined or isinstance(value, BaseModel):
        return ""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | dict):
        assert not value, value
        return "`{}`" if isinstance(value, dict) else "`[]`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value!r}`"


def table_rows(section: str) -> list[list[str]]:
    """key, value and default of the rows of a section's table in the training guide."""
    text = (ROOT / "docs" / "guides" / "train.md").read_text("utf-8")
    body = re.split(r"^#+ ", text.split(f"### {section}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")] for line in body.splitlines() if line[:1] == "|"
    ]
    assert rows[0] == ["key", "value", "default", "meaning"]
    return [row[:3] for row in rows[2:]]


@pytest.mark.parametrize("section", SECTIONS)
def test_keys_of_the_run_file(section: str) -> None:
    fields = SECTIONS[section].model_fields
    expected = [[f"`{name}`", kind(field.annotation), default(field.default)] for name, field in fields.items()]
    assert table_rows(section) == expected


def test_the_run_file_loads(tmp_path: Path) -> None:
    (body,) = blocks(ROOT / "docs" / "guides" / "train.md", "toml run-file")
    path = tmp_path / "notes.toml"
    path.write_text(body, "utf-8")
    config = load_toml(path, RunConfig, ["train.steps=200", "out=runs/short"])
    assert (config.train.steps, config.out) == (200, Path("runs/short"))
    assert resolve_model(config.model).num_hidden_layers == 4


def test_the_model_loads() -> None:
    (body,) = blocks(ROOT / "docs" / "guides" / "train.md", "toml model")
    spec = read_model(tomllib.loads(body), "docs")
    assert (spec.hidden_size, spec.num_hidden_layers, spec.vocab_size) == (256, 8, 8192)


def test_the_schedule_loads() -> None:
    (body,) = blocks(ROOT / "docs" / "guides" / "train.md", "toml schedule")
    schedule = validate(TrainingSchedule, tomllib.loads(body)["schedule"], "docs")
    assert len(schedule.learning_rate.segments) == 3


def test_the_recipe_loads(tmp_path: Path) -> None:
    (body,) = blocks(ROOT / "docs" / "guides" / "precision.md", "toml recipe")
    path = tmp_path / "mine.toml"
    path.write_text(body, "utf-8")
    recipe, base = load_recipe(path), load_recipe("deepseek-v3")
    assert base.sites.keys() - recipe.sites.keys() == {"mtp_join"}
    assert {site.grad.tile for site in recipe.sites.values()} == {"block"}
    assert {name for name, site in recipe.sites.items() if site.input.format == "e5m2"} == {"expert_up"}
