"""Reads a user's TOML file into frozen, validated objects, and writes such objects as TOML.

A user writes one TOML file and may change single keys with `--set train.steps=200`. The classes that describe its
tables live in the files that read them. Every mistake is one `ValueError` line that names the file, the key, the
value and a remedy.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


class Record(BaseModel):
    """The base of the classes that describe a user's tables: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


SchemaT = TypeVar("SchemaT", bound=BaseModel)


def load_toml(path: str | Path, schema: type[SchemaT], overrides: Sequence[str] = ()) -> SchemaT:
    """Read the TOML file `path`, apply `overrides` ("train.steps=200") and validate the result as `schema`.

    Raises ValueError (one line) for a missing or malformed file, an unknown key (with its near matches), a
    wrong type or value, and an override that does not parse.
    """
    table = read_toml(path)
    for override in overrides:
        apply_override(table, override)
    return validate(schema, table, where=str(path))


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read the tables of one TOML file. Raises ValueError with the line and column for malformed text."""
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        last = f"at line {text.rstrip().count(chr(10)) + 1}, the end"
        problem = str(error).replace("at end of document", last)
        raise ValueError(f"{path}: not valid TOML: {problem}") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """Read the object in one JSON file. Raises ValueError for malformed text, and for JSON that is no object."""
    try:
        table = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}; write the file again") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path}: holds a JSON {type(table).__name__}, not an object of keys and values")
    return table


def read_text(path: str | Path) -> str:
    """Return the text of a file that a user wrote: UTF-8, with a byte order mark or without. Raises ValueError."""
    try:
        return user_path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a directory, not a file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def user_path(path: str | Path) -> Path:
    """Return `path` with "~" or "~user" at its start expanded. Raises ValueError where this user has no home."""
    expanded = Path(os.path.expanduser(path))
    if str(expanded).startswith("~"):  # so it was left as it is
        raise ValueError(f"{path}: {expanded.parts[0]} is nobody's home directory; write ./{path} for such a name")
    return expanded


UserPath = Annotated[Path, AfterValidator(user_path)]  # a path in a user's table


def apply_override(table: dict[str, Any], override: str) -> None:
    """Set one dotted key of `table` in place.

    The value is TOML (`3`, `1e-3`, `true`, `[1, 2]`, `"text"`); what is not TOML is taken as a bare string,
    so that a name or a path needs no quotes inside the shell's. Raises ValueError when the form is not
    key=value or the key goes through something that is not a table.
    """
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(_BARE_KEY.fullmatch(name) for name in names):
        raise ValueError(f"--set {override}: expected key=value with a dotted key, such as train.steps=200")
    for depth, name in enumerate(names[:-1], start=1):
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ValueError(f"--set {override}: {'.'.join(names[:depth])} is {table!r}, not a table")
    table[names[-1]] = _override_value(text.strip())


def _override_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def validate(schema: type[SchemaT], table: Mapping[str, Any], where: str) -> SchemaT:
    """Build `schema` from plain data. Raises ValueError with one line that starts with `where`.

    Types are strict, so that `steps = "200"` and `steps = true` are errors and not 200 and 1. The data goes through
    JSON, because pydantic's strict mode still makes a tuple of a list and a path of a string there.
    """
    try:
        return schema.model_validate_json(json.dumps(table, default=_plain), strict=True)
    except ValidationError as error:
        raise ValueError(f"{where}: {_first_problem(error, schema)}") from None


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, BaseModel) else str(value)  # a record, or a TOML date


def near_matches(name: str, known: Iterable[str]) -> str:
    """Return a remedy for a misspelt name: "did you mean a or b?", or all names if they are few, or "" if many."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(names)}" if 0 < len(names) <= 24 else ""


def _first_problem(error: ValidationError, schema: type[BaseModel]) -> str:
    problems = error.errors(include_url=False, include_context=True)
    # An unknown key is nearly always the cause of the others (a misspelt required key is also missing).
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        remedy = near_matches(str(first["loc"][-1]), _known_keys(schema, first["loc"][:-1]))
        text = f"unknown key {path!r}" + (f"; {remedy}" if remedy else "")
    elif first["type"] == "missing":
        text = f"missing key {path!r}"
    else:
        text = _wrong_value(path, first["msg"].removeprefix("Value error, "), first["input"])
    others = len(problems) - 1
    return text + (f" (and {others} more problem{'s' if others > 1 else ''})" if others else "")


def _wrong_value(path: str, message: str, value: Any) -> str:
    if isinstance(value, Mapping | BaseModel):  # a rule across keys: its message has the numbers already
        return f"{path}: {message}" if path else message
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return f"{path} = {shown}: {message[:1].lower()}{message[1:]}"


def _known_keys(schema: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Return the keys allowed at `location`, by walking the annotations past list indices and union tags."""
    schemas: list[type[BaseModel]] = [schema]
    for part in location:
        fields = [each.model_fields[part] for each in schemas if part in each.model_fields]
        if fields:
            schemas = [inner for field in fields for inner in _inner_schemas(field.annotation)]
        else:
            schemas = [each for each in schemas if each.__name__ == part] or schemas
    return [name for each in schemas for name in each.model_fields]


def _inner_schemas(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [inner for part in getattr(annotation, "__args__", ()) for inner in _inner_schemas(part)]


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys whose values differ between two tables, with both values.

    The value is None where a table lacks the key.
    """
    first, second = _flat(one), _flat(other)
    keys = sorted(first.keys() | second.keys())
    return {key: (first.get(key), second.get(key)) for key in keys if first.get(key) != second.get(key)}


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in table.items():
        rows |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return rows


def as_table(record: BaseModel) -> dict[str, Any]:
    """Return `record` as the plain data that TOML has. Keys that are None are left out."""
    return record.model_dump(mode="json", exclude_none=True)


def dump(record: BaseModel) -> str:
    """Return `record` as TOML that `load_toml` reads back to an equal object; keys that are None are left out."""
    lines: list[str] = []
    _dump_table(as_table(record), (), lines)
    return "\n".join(lines).strip() + "\n"


def _dump_table(table: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    plain = {key: value for key, value in table.items() if not _is_table(value)}
    if path and (plain or not table):
        lines += ["", f"[{'.'.join(_toml_key(name) for name in path)}]"]
    lines += [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in plain.items()]
    for key, value in table.items():
        if _is_table(value):
            _dump_table(value, (*path, key), lines)


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _toml_key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _toml_string(key)


def _toml_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace(
        "\x7f", "\\u007f"
    )  # TOML has JSON's escapes, and escapes DEL too


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _toml_string(value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml_value(each) for each in value if each is not None)}]"
    if isinstance(value, Mapping):  # inside a list
        inner = ", ".join(f"{_toml_key(key)} = {_toml_value(each)}" for key, each in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    raise AssertionError(f"model_dump(mode='json') gave a {type(value).__name__}")
