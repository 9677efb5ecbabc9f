"""Loads a network fabric by its name, or from a user's file.

`fabrics/NAME.toml` mirrors `spec.fabric.FabricSpec`. A fabric may say `like = "mpft"`: it is that fabric, with the
keys that it gives itself in place of the other's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dovetail.config import near_matches, read_toml, validate
from dovetail.spec.fabric import ONLY_FOR, FabricSpec

_FABRICS = Path(__file__).parent / "fabrics"


def fabric_names() -> list[str]:
    """Return the names that `load_fabric` takes, sorted."""
    return sorted(path.stem for path in _FABRICS.glob("*.toml"))


def load_fabric(name: str | Path, endpoints: int | None = None) -> FabricSpec:
    """Load the fabric of that name, or the TOML file at that path, for `endpoints` GPUs if given.

    What ends in .toml or has a path separator in it is a path. Raises ValueError, one line, for an unknown name, a
    file that is wrong, and endpoints that do not fit its nodes and planes.
    """
    text = str(name)
    if text.endswith(".toml") or "/" in text:
        table = _whole(read_toml(text), where=text)
    elif text in fabric_names():
        table = _catalog(text)
    else:
        raise ValueError(f"no fabric {text!r}: neither in the catalog nor a .toml file; {_nearest(text)}")
    if endpoints is not None:
        table = table | {"endpoints": endpoints}
    return validate(FabricSpec, table, where=text)


def resized(spec: FabricSpec, **changes: Any) -> FabricSpec:
    """Return `spec` with other values, such as endpoints=2048, checked again."""
    kept = {key: value for key in spec.model_fields_set if (value := getattr(spec, key)) is not None}
    return validate(FabricSpec, kept | changes, where=spec.name)


def _nearest(name: str) -> str:
    return near_matches(name, fabric_names()) or f"known: {', '.join(fabric_names())}"


@cache
def _catalog(name: str) -> dict[str, Any]:
    return _whole(read_toml(_FABRICS / f"{name}.toml"), where=f"fabrics/{name}.toml")


def _whole(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the table completed by the keys of the fabric it is like. Raises ValueError for an unknown one."""
    if "like" not in table:
        return dict(table)
    base = table["like"]
    if base not in fabric_names():
        raise ValueError(f"{where}: like = {base!r} is no fabric of the catalog; {_nearest(str(base))}")
    lent = _catalog(base)
    if table.get("kind", lent["kind"]) != lent["kind"]:
        lent = {key: value for key, value in lent.items() if key not in ONLY_FOR}
    return lent | {key: value for key, value in table.items() if key != "like"}
