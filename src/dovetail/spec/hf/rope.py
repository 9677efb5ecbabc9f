"""Reads the rotary keys of a `config.json`: the base, and how far YaRN stretches it.

Published files have `rope_theta` and a table `rope_scaling`; transformers 5 has one table `rope_parameters`. What is
written in another way and computes the same is read: YaRN by a factor of 1 is none, and an `attention_factor` may say
what follows from the mscales anyway. Whatever would compute something else is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dovetail.config import validate
from dovetail.spec.model import Yarn

_TABLES = ("rope_scaling", "rope_parameters")
_EXAMPLE = '{"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}'
_YARN = ("yarn", "deepseek_yarn")  # the latter is vLLM's name
_OTHERS = frozenset(["rope_theta", "rope_type", "type", "attention_factor", "truncate"])


def read_rope(flat: Mapping[str, Any], is_mla: bool, where: str) -> dict[str, Any]:
    """Return `rope_theta` and `rope_scaling` from either form of the file; error lines begin with `where`.

    Raises ValueError for a scaling that is not known, and for one that is not described.
    """
    rope = _table(flat, where)
    theta = rope.pop("rope_theta", flat.get("rope_theta"))
    if flat.get("rope_theta", theta) != theta:
        raise ValueError(
            f"{where}: rope_theta = {flat['rope_theta']!r}, and {theta!r} in a table; remove the wrong one"
        )
    keys: dict[str, Any] = {"rope_scaling": None} | ({} if theta is None else {"rope_theta": theta})
    kind = _kind(rope, where)
    if kind == "default" or not is_mla:  # grouped-query models are only counted
        return keys
    if kind not in _YARN:
        raise ValueError(f"{where}: rope scaling of type {kind!r} is not supported, only 'yarn' is")
    # The published code assumes 1 and 0 where mscales are absent [V3repo].
    scaling = {"mscale": 1.0, "mscale_all_dim": 0.0, **rope}
    scaling = {key: scaling[key] for key in Yarn.model_fields if key in scaling}
    is_none = scaling.get("factor") == 1
    _check_added(rope, 1.0 if is_none else validate(Yarn, scaling, f"{where}: rope_scaling").magnitude, where)
    return keys if is_none else {**keys, "rope_scaling": scaling}


def unread_keys(config: Mapping[str, Any]) -> list[str]:
    """Return the keys of the tables that nothing here knows, as table.key."""
    known = _OTHERS | Yarn.model_fields.keys()
    tables = [(name, table) for name in _TABLES if isinstance(table := config.get(name), Mapping)]
    pairs = [(f"{name}.{key}", key, value) for name, table in tables for key, value in table.items()]
    return [name for name, key, value in pairs if key not in known and value is not None]


def _table(flat: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return both tables as one. A null counts as absent."""
    rope: dict[str, Any] = {}
    for name in _TABLES:
        table = flat.get(name)
        if table is not None and not isinstance(table, Mapping):
            raise ValueError(f"{where}: {name} = {table!r}: expected an object such as {_EXAMPLE}, or null for none")
        rope |= {key: value for key, value in (table or {}).items() if value is not None}
    return rope


def _kind(rope: dict[str, Any], where: str) -> str:
    """Take the type out of the table and return it in lower case; "default" is no scaling."""
    kinds = {str(rope.pop(key)).lower() for key in ("rope_type", "type") if key in rope}
    if len(kinds) > 1:
        raise ValueError(f"{where}: rope_type and type of the rope scaling are {' and '.join(sorted(kinds))}; keep one")
    if not kinds and rope.keys() & Yarn.model_fields.keys():
        raise ValueError(f"{where}: rope_scaling has {', '.join(rope)} and no type; expected {_EXAMPLE}")
    return kinds.pop() if kinds else "default"


def _check_added(rope: Mapping[str, Any], magnitude: float, where: str) -> None:
    """Look at the keys that transformers added, which would change the rotation."""
    if rope.get("truncate", True) is not True:
        raise ValueError(f"{where}: truncate = {rope['truncate']!r} in the rope scaling is not supported, only true is")
    factor = rope.get("attention_factor", magnitude)
    if not isinstance(factor, int | float) or not math.isclose(factor, magnitude, rel_tol=1e-6):
        raise ValueError(
            f"{where}: attention_factor = {factor!r} in the rope scaling is not supported, only what factor, mscale "
            f"and mscale_all_dim give, {magnitude:g}; remove it to have that"
        )
