"""Who imports whom in the package, imports inside functions and for type checkers included."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "dovetail"
KERNELS = ("_numba", "_triton")  # how a file of kernels ends
Sources = Mapping[str, str]  # text of each module


def sources(package: Path) -> dict[str, str]:
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text("utf-8")
    return found


def imports(modules: Sources) -> dict[str, set[str]]:
    """What each module imports of the others: `from package import name` is the module `package.name`, if there is one,
    and else `package`."""
    graph: dict[str, set[str]] = {}
    for module, text in modules.items():
        named = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: a relative import"
                inside = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
                named |= {full if full in modules else str(node.module) for full in inside.values()}
        graph[module] = {name for name in named if name in modules}
    return graph


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules of which each imports the next and the last is the first; none where there is no circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))  # graphlib lists them from what is imported to who imports it
    return []


def reached(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """All that `start` imports, directly or by way of others."""
    found: set[str] = set()
    left = [start]
    while left:
        new = graph[left.pop()] - found
        found |= new
        left += new
    return found


def upward(graph: Mapping[str, set[str]]) -> Iterator[str]:
    """Kernels that reach what they are the kernel of: of the files beside x_y_numba.py x, x_y, and their references."""
    for module in graph:
        kind = next((kind for kind in KERNELS if module.endswith(kind)), None)
        if kind is not None:
            package, _, name = module.removesuffix(kind).rpartition(".")
            parts = name.split("_")
            stems = [f"{package}.{'_'.join(parts[: count + 1])}" for count in range(len(parts))]
            above = {stem + end for stem in stems for end in ("", "_reference")} & reached(graph, module)
            yield from (f"{module} imports {each}" for each in sorted(above))


PLANTED = {
    "a": "import b.x",
    "b": "",
    "b.x": "def f():\n    from b import x_triton",
    "b.x_numba": "from b.y import Record",
    "b.x_triton": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from b.z import Record",
    "b.y": "",
    "b.z": "import b.x_reference",
    "b.x_reference": "from b.y import Record",
    "b.x_wide_numba": "from b.y import Record",
}


def test_a_kernel_never_imports_its_reference() -> None:
    """Constants and records that both need stand in a module below both."""
    assert not list(upward(imports(sources(PACKAGE))))
    planted = ["b.x_triton imports b.x_reference"]
    assert list(upward(imports(PLANTED))) == planted  # by way of z
    assert list(upward(imports({**PLANTED, "b.x_wide_numba": "from b import x"}))) == [
        *planted,
        "b.x_wide_numba imports b.x",
        "b.x_wide_numba imports b.x_reference",
    ]


def test_no_import_circle() -> None:
    found = circle(imports(sources(PACKAGE)))
    assert not found, " imports ".join(found)
    assert not circle(imports(PLANTED))
    closed = imports({**PLANTED, "b.z": "from b.x import f"})
    planted = circle(closed)
    assert set(planted) == {"b.x", "b.x_triton", "b.z"} and planted[0] == planted[-1]
    assert all(later in closed[one] for one, later in pairwise(planted))
