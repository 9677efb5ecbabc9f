"""Reads what a search varies, such as `topk_group=2,4,8`; several settings are combined.

Keys of the flat model table (those of a config.json) and `precision`, the name of a recipe, give one workload for each
combination of values. Keys of a layout limit the values that the search tries anyway (`Choices`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from dovetail.catalog.precision import load_recipe
from dovetail.config import apply_override, near_matches
from dovetail.planner.training.chunks import Workload
from dovetail.spec.hf_config import read_flat
from dovetail.spec.layout import ScheduleName
from dovetail.spec.model import Gqa, Mla, ModelSpec, Moe

MICROBATCH_SIZES = (1, 2, 4)  # sequences
SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)
PRECISION = "precision"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """The values that a search may take for each part of a layout; None means all that are legal."""

    pp: tuple[int, ...] | None = None
    ep: tuple[int, ...] | None = None
    tp: tuple[int, ...] | None = None
    dp: tuple[int, ...] | None = None
    microbatch_size: tuple[int, ...] = MICROBATCH_SIZES
    schedule: tuple[ScheduleName, ...] = SCHEDULES
    chunks: tuple[int, ...] = (2,)  # for "interleaved"
    zero: tuple[Literal[0, 1], ...] = (1,)

    def __post_init__(self) -> None:
        unknown = [name for name in self.schedule if name not in SCHEDULES]
        if unknown:
            raise ValueError(f"schedule = {unknown[0]}: no such schedule; {near_matches(str(unknown[0]), SCHEDULES)}")
        for key in LAYOUT_KEYS:
            values = () if key == "schedule" else getattr(self, key) or ()
            for value in values:
                least, most = (0, 1) if key == "zero" else (1, math.inf)
                if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                    expected = "0 or 1" if key == "zero" else "a whole number of at least 1"
                    raise ValueError(f"{key} = {value}: expected {expected}")

    @staticmethod
    def of(fixed: Mapping[str, int | str]) -> Choices:
        """Return choices with a single value for each key of `fixed`."""
        return Choices(**{name: (value,) for name, value in fixed.items()})  # type: ignore[arg-type]

    @property
    def given(self) -> dict[str, tuple[int | str, ...]]:
        """The choices that differ from a free one."""
        free = Choices()
        values = {name: getattr(self, name) for name in LAYOUT_KEYS}
        return {name: value for name, value in values.items() if value != getattr(free, name)}

    def __str__(self) -> str:
        return ", ".join(f"{name} = {' or '.join(map(str, values))}" for name, values in self.given.items())

    def among(self, name: str, values: Sequence[int]) -> list[int]:
        """Return those of `values` that may be taken for `name`."""
        wanted = getattr(self, name)
        return [value for value in values if wanted is None or value in wanted]


LAYOUT_KEYS = tuple(field.name for field in fields(Choices))
FREE = Choices()


def vary(work: Workload, settings: Sequence[str], choices: Choices = FREE) -> tuple[list[Workload], Choices]:
    """Return `work` with every combination of the settings' values, each labelled with its own, and `choices` limited
    to the values given for a layout's keys.

    Raises ValueError, one line, for a setting that is not key=value,value, a key that is unknown (with near matches),
    given twice or not one of this model, and an illegal value or combination, with the reason.
    """
    table = _flat(work.spec)
    values = dict(_parsed(setting, table, work.spec) for setting in settings)
    if len(values) < len(settings):
        keys = [setting.partition("=")[0].strip() for setting in settings]
        raise ValueError(f"--vary: {next(key for key in keys if keys.count(key) > 1)} is given twice")
    wanted = {key: values.pop(key) for key in LAYOUT_KEYS if key in values}
    for key in wanted.keys() & choices.given.keys():
        raise ValueError(f"--vary {key}: it is already fixed to {' or '.join(map(str, choices.given[key]))}")
    works = [
        _varied(work, table, dict(zip(values, combination, strict=True)))
        for combination in itertools.product(*values.values())
    ]
    return works, replace(choices, **wanted)


def _parsed(setting: str, table: Mapping[str, Any], spec: ModelSpec) -> tuple[str, tuple[Any, ...]]:
    """Return the key and its values, which are read as TOML."""
    key, equals, text = (part.strip() for part in setting.partition("="))
    texts = list(dict.fromkeys(each.strip() for each in text.split(",")))
    if not (key and equals and all(texts)):
        raise ValueError(f"--vary {setting}: expected key=value,value, such as topk_group=2,4,8")
    if key not in _keys(table):
        raise ValueError(f"--vary {key}: {_unknown(key, table, spec)}")
    values: list[Any] = []
    for each in texts:
        parsed: dict[str, Any] = {}
        apply_override(parsed, f"value={each}")
        values.append(each if key == PRECISION else parsed["value"])
    return key, tuple(values)


def _unknown(key: str, table: Mapping[str, Any], spec: ModelSpec) -> str:
    if key in Moe.model_fields and spec.moe is None:
        return "the model has no experts"
    if key in Mla.model_fields or key in Gqa.model_fields:
        return f"the model's attention is {type(spec.attention).__name__}, which has no such dimension"
    known = f"known are those of the model, such as n_routed_experts, {', '.join(LAYOUT_KEYS)} and {PRECISION}"
    return f"no such key; {near_matches(key, _keys(table)) or known}"


def _keys(table: Mapping[str, Any]) -> list[str]:
    """Return all keys that can be varied; of the model's those that are numbers, words or switches."""
    return [*(key for key, value in table.items() if not isinstance(value, dict)), *LAYOUT_KEYS, PRECISION]


def _varied(work: Workload, table: Mapping[str, Any], changes: Mapping[str, Any]) -> Workload:
    label = ", ".join(f"{key} = {value}" for key, value in changes.items())
    shapes = {key: value for key, value in changes.items() if key != PRECISION}
    spec = read_flat({**table, **shapes}, where=f"--vary {label}") if shapes else work.spec
    _check_taken(spec, shapes, label)
    recipe = load_recipe(changes[PRECISION]) if PRECISION in changes else work.recipe
    return replace(work, spec=spec, recipe=recipe, label=label)


def _check_taken(spec: ModelSpec, shapes: Mapping[str, Any], label: str) -> None:
    """Raise ValueError if the model does not use a value: a gate without groups takes one group, whatever is asked."""
    table = _flat(spec)
    for key, value in shapes.items():
        if key in table and table[key] != value:
            raise ValueError(f"--vary {label}: with the model's other keys {key} is {table[key]}, whatever is asked")


def _flat(spec: ModelSpec) -> dict[str, Any]:
    """Return the model as one flat table."""
    table = spec.model_dump(exclude={"attention", "moe"})
    table |= spec.attention.model_dump()
    table |= spec.moe.model_dump() if spec.moe else {}
    return table
