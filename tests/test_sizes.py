"""The package stays small: no new file, function, class or folder exceeds its limit, and none of the old ones grows.

What exceeds a limit today stands in sizes.toml with its size. The table only shrinks: a listed thing that became
smaller, or is gone, fails too until its row says so.

Counted are the lines of a file, the lines of a function or class without its docstring, the parameters of a function
without `self`, `cls` and the `ctx` of an autograd function, and the .py files of a folder without `__init__.py`.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

Function = ast.FunctionDef | ast.AsyncFunctionDef
Sizes = dict[str, dict[str, int]]  # name of a thing -> what is counted -> how many

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_name("sizes.toml")
FILE_LINES, FUNCTION_LINES, KERNEL_LINES, CLASS_LINES, PARAMETERS, FOLDER_FILES = 300, 40, 120, 200, 6, 12


def definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Every function and class below `node`, nested ones included, with its dotted name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef):
            yield prefix + child.name, child
            yield from definitions(child, f"{prefix}{child.name}.")
        else:
            yield from definitions(child, prefix)


def code_lines(node: Function | ast.ClassDef) -> int:
    first = node.body[0]
    described = ast.get_docstring(node, clean=False) is not None
    return (node.end_lineno - node.lineno + 1) - (first.end_lineno - first.lineno + 1 if described else 0)


def parameters(node: Function) -> int:
    given = node.args
    positional = [each.arg for each in given.posonlyargs + given.args]
    own = positional[:1] in (["self"], ["cls"], ["ctx"])
    return len(positional) - own + len(given.kwonlyargs) + (given.vararg is not None) + (given.kwarg is not None)


def sizes(source: Path) -> Iterator[tuple[str, str, int, int]]:
    """Of everything below `source`: its name, what is counted, how many there are, and how many there may be."""
    for folder in [source, *(path for path in source.rglob("*") if path.is_dir())]:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        yield folder.relative_to(source).as_posix(), "files", len(files), FOLDER_FILES
    for path in source.rglob("*.py"):
        name, text = path.relative_to(source).as_posix(), path.read_text("utf-8")
        yield name, "lines", len(text.splitlines()), FILE_LINES
        of_function = KERNEL_LINES if path.stem.endswith(("_numba", "_triton")) else FUNCTION_LINES
        for dotted, node in definitions(ast.parse(text)):
            is_class = isinstance(node, ast.ClassDef)
            yield f"{name}::{dotted}", "lines", code_lines(node), CLASS_LINES if is_class else of_function
            if not is_class:
                yield f"{name}::{dotted}", "parameters", parameters(node), PARAMETERS


def exceeding(source: Path) -> Sizes:
    found: Sizes = {}
    for name, counted, number, limit in sizes(source):
        if number > limit:  # of two definitions of one name, such as both branches of an if, the larger
            row = found.setdefault(name, {})
            row[counted] = max(number, row.get(counted, 0))
    return found


def complaints(found: Sizes, listed: Sizes) -> list[str]:
    """Each difference between what exceeds and what is listed, in one line that says what to do."""
    lines = []
    for name in sorted({*found, *listed}):
        for counted in sorted({*found.get(name, {}), *listed.get(name, {})}):
            now, row = found.get(name, {}).get(counted), listed.get(name, {}).get(counted)
            if now is None:
                lines.append(f"{name} no longer exceeds the limit of {counted}: take {row} out of sizes.toml")
            elif row is None:
                lines.append(f"{name} exceeds the limit with {now} {counted}: make it smaller")
            elif now > row:
                lines.append(f"{name} grew from {row} to {now} {counted}: make it smaller")
            elif now < row:
                lines.append(f"{name} shrank from {row} to {now} {counted}: write {now} into sizes.toml")
    return lines


def test_nothing_new_exceeds_and_nothing_old_grows() -> None:
    found, listed = exceeding(ROOT / "src" / "dovetail"), tomllib.loads(TABLE.read_text("utf-8"))
    assert not complaints(found, listed), "\n".join(complaints(found, listed))


def test_the_table_is_sorted() -> None:
    names = list(tomllib.loads(TABLE.read_text("utf-8")))
    assert names == sorted(names)


def function(lines: int = 2, parameters: str = "", indent: str = "") -> str:
    return f"{indent}def planted({parameters}):\n" + f"{indent}    pass\n" * (lines - 1)


SEVEN = ", ".join("abcdefg")
PLANTED = [
    ("a.py", "pass\n" * 301, {"a.py": {"lines": 301}}),
    ("a.py", "pass\n" * 300, {}),
    ("a.py", function(41), {"a.py::planted": {"lines": 41}}),
    ("a.py", function(40), {}),
    ("a.py", 'def planted():\n    """It says.\n\n    More.\n    """\n' + "    pass\n" * 39, {}),
    ("a.py", "async " + function(41), {"a.py::planted": {"lines": 41}}),
    (
        "a.py",
        function() + function(41, indent="    "),
        {"a.py::planted": {"lines": 43}, "a.py::planted.planted": {"lines": 41}},
    ),
    ("a_numba.py", function(120), {}),
    ("a_numba.py", function(121), {"a_numba.py::planted": {"lines": 121}}),
    ("a_triton.py", function(121), {"a_triton.py::planted": {"lines": 121}}),
    ("a.py", "class Planted:\n" + "    pass\n" * 200, {"a.py::Planted": {"lines": 201}}),
    ("a.py", "class Planted:\n" + "    pass\n" * 199, {}),
    (
        "a.py",
        "if a:\n" + function(42, indent="    ") + "else:\n" + function(41, indent="    "),
        {"a.py::planted": {"lines": 42}},
    ),
    ("a.py", function(parameters=SEVEN), {"a.py::planted": {"parameters": 7}}),
    ("a.py", function(parameters="a, /, b, *c, d, e, f=1, **g"), {"a.py::planted": {"parameters": 7}}),
    ("a_numba.py", function(parameters=SEVEN), {"a_numba.py::planted": {"parameters": 7}}),
    ("a.py", function(parameters=f"self, {SEVEN[:-3]}"), {}),
    ("a.py", function(41, SEVEN), {"a.py::planted": {"lines": 41, "parameters": 7}}),
]


@pytest.mark.parametrize(("name", "text", "expected"), PLANTED)
def test_what_is_planted_is_found(name: str, text: str, expected: Sizes, tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / name).write_text(text, "utf-8")
    assert exceeding(tmp_path) == {f"room/{key}": row for key, row in expected.items()}


def test_a_crowded_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    for name in ("__init__", *"abcdefghijkl"):
        (tmp_path / "room" / f"{name}.py").touch()
    assert exceeding(tmp_path) == {}
    (tmp_path / "room" / "m.py").touch()
    assert exceeding(tmp_path) == {"room": {"files": 13}}


def test_every_difference_from_the_table_is_a_complaint() -> None:
    row = {"a.py::f": {"lines": 50}}
    assert complaints(row, row) == []
    for found, listed, expected in (
        (row, {}, "a.py::f exceeds the limit with 50 lines"),
        (row, {"a.py::f": {"parameters": 7, "lines": 50}}, "a.py::f no longer exceeds the limit of parameters"),
        (row, {"a.py::f": {"lines": 49}}, "a.py::f grew from 49 to 50 lines"),
        (row, {"a.py::f": {"lines": 51}}, "a.py::f shrank from 51 to 50 lines"),
        ({}, row, "a.py::f no longer exceeds the limit of lines"),
    ):
        (line,) = complaints(found, listed)
        assert line.startswith(expected)
