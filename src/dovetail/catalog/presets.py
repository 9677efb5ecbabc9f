"""Loads model presets by name.

`models/NAME.toml` holds either the flat keys of a published `config.json`, or a `[dial]` from which
`dovetail.spec.family` derives the rest. Every file says where its numbers come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dovetail.config import near_matches, read_toml, validate
from dovetail.spec.family import Dial, dovetail_spec
from dovetail.spec.hf_config import read_flat
from dovetail.spec.model import ModelSpec

_MODELS = Path(__file__).parent / "models"


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
    if "dial" in table:
        return dovetail_spec(validate(Dial, table["dial"], f"{where}: dial"))
    return read_flat(table, where)


def model_source(name: str) -> str:
    """Return where the numbers of preset `name` come from."""
    return str(_read(name)["source"])


def _read(name: str) -> dict[str, Any]:
    if name not in model_names():
        raise ValueError(f"no model preset {name!r}; {near_matches(name, model_names())}")
    return read_toml(_MODELS / f"{name}.toml")
