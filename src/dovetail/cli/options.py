"""Lets a verb take records, each field of which is an option, and expands "~" in paths.

Options that belong together stand in one dataclass, with their help, and the verb gets an object of it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from inspect import Parameter
from pathlib import Path
from typing import Any, get_type_hints

from dovetail.config import user_path


def flat(verb: Callable[..., None]) -> Callable[..., None]:
    """Return `verb` with the fields of its dataclasses as parameters, which is how typer reads it."""
    hints = get_type_hints(verb, include_extras=True)
    records = {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}
    parameters: list[Parameter] = []
    for parameter in inspect.signature(verb).parameters.values():
        record = records.get(parameter.name)
        if record is None:
            parameters.append(parameter.replace(annotation=hints[parameter.name], kind=Parameter.KEYWORD_ONLY))
        else:
            types = get_type_hints(record, include_extras=True)
            parameters += [_parameter(field, types[field.name]) for field in fields(record)]

    @functools.wraps(verb)
    def run(**given: Any) -> None:
        made = {
            name: record(**{each.name: given.pop(each.name) for each in fields(record)})
            for name, record in records.items()
        }
        verb(**given, **made)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameter(field: Field[Any], annotation: Any) -> Parameter:
    default = Parameter.empty if field.default is MISSING else field.default
    return Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def with_user_paths(verb: Callable[..., None]) -> Callable[..., None]:
    """Return `verb` with "~" expanded in every path that it is given."""

    @functools.wraps(verb)
    def run(**given: Any) -> None:
        verb(**{name: user_path(value) if isinstance(value, Path) else value for name, value in given.items()})

    return run
