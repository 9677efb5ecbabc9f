"""Finds a model as users name it: a preset, a TOML file, a `config.json`, or a directory with one.

A preset is a file `models/NAME.toml` of the catalog. It and a user's own TOML file hold either the flat keys of a
published `config.json` or a `[dial]` from which `dovetail.spec.family` derives the rest; a preset also says where its
numbers come from. Weights are not read, and nothing is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dovetail.config import near_matches, read_json, read_toml, user_path, validate
from dovetail.spec.family import Dial, dovetail_spec
from dovetail.spec.hf_config import read_flat, read_hf, unread_keys
from dovetail.spec.model import ModelSpec

ACCEPTED = "a model is a preset (dovetail list models), a .toml file, a config.json, or a directory that holds one"
_MODELS = Path(__file__).parent / "models"
_WEIGHTS = frozenset([".safetensors", ".gguf", ".bin", ".pt", ".pth"])
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # as in deepseek-ai/DeepSeek-V3


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundModel:
    """A model, and where it was found."""

    spec: ModelSpec
    source: str  # where the numbers are from: what the preset or the TOML file says, else the path of the file
    unread: tuple[str, ...] = ()  # keys of a config.json that nothing here knows
    directory: Path | None = None  # that was named and holds the config.json


def find_model(target: str) -> FoundModel:
    """Return the model that `target` names; a preset goes before a file of the same name.

    Raises ValueError, one line, for a name that is none (with near matches and what is accepted), for the name of a
    repository elsewhere, and for a file that is wrong.
    """
    if target in model_names():
        return FoundModel(spec=load_model(target), source=model_source(target))
    path = user_path(target)
    if path.exists() or path.suffix in (".toml", ".json"):
        return read_model_file(path)
    near = near_matches(target, model_names()).rstrip("?")
    raise ValueError(f"{target}: no such preset or file; {repository_remedy(target) or f'{near}; {ACCEPTED}'}")


def read_model_file(path: Path) -> FoundModel:
    """Read a .toml file, a config.json, or the config.json in a directory. Raises ValueError, one line."""
    if path.suffix == ".toml" and not path.is_dir():
        table = read_toml(path)
        if "model" in table:
            raise ValueError(f"{path}: a run file, not a model: name what its [model] names, or the run's directory")
        return FoundModel(spec=read_model(table, where=str(path)), source=str(table.get("source", path)))
    directory = path if path.is_dir() else None
    file = path if directory is None else path / "config.json"
    if not file.is_file():
        missing = "no such file" if directory is None else "a directory without a config.json"
        raise ValueError(f"{path}: {missing}; {ACCEPTED}")
    if file.suffix in _WEIGHTS:
        raise ValueError(f"{path}: holds weights, not the description of a model; {ACCEPTED}")
    config = read_json(file)
    spec = read_hf(config, where=str(file))
    return FoundModel(spec=spec, source=str(file), unread=tuple(unread_keys(config)), directory=directory)


def repository_remedy(target: str) -> str:
    """Say what to do where `target` is nothing here and looks like the name of a repository elsewhere; else ""."""
    path = Path(target)
    if not _REPOSITORY.fullmatch(target) or path.exists() or path.parent.is_dir():
        return ""
    preset = path.name.lower()
    shape = f", or take the preset {preset}, which has its shape" if preset in model_names() else ""
    return f"nothing is downloaded: fetch the repository and give its directory{shape}"


def model_names() -> list[str]:
    """Return the names that `load_model` takes, sorted."""
    return sorted(path.stem for path in _MODELS.glob("*.toml"))


@cache
def load_model(name: str) -> ModelSpec:
    """Load the preset `name`. Raises ValueError with near matches for an unknown one."""
    return read_model(_read(name), where=f"models/{name}.toml")


def read_model(table: Mapping[str, Any], where: str = "model") -> ModelSpec:
    """Return the model that a TOML table describes, by a `dial` or by flat config.json keys.

    Raises ValueError with a line that begins with `where`.
    """
    if "dial" not in table:
        return read_flat(table, where)
    if others := sorted(table.keys() - {"dial", "source"}):
        raise ValueError(f"{where}: {others[0]} beside [dial], which says all: give one or the other")
    return dovetail_spec(validate(Dial, table["dial"], f"{where}: dial"))


def model_source(name: str) -> str:
    """Return where the numbers of preset `name` come from."""
    return str(_read(name)["source"])


def _read(name: str) -> dict[str, Any]:
    if name not in model_names():
        raise ValueError(f"no model preset {name!r}; {near_matches(name, model_names())}")
    return read_toml(_MODELS / f"{name}.toml")
