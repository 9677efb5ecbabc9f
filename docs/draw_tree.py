"""Draws the tree in design.md: every folder and file of the package with the first sentence of its docstring.

`python docs/draw_tree.py` rewrites the block, and tests/test_docs.py fails when that is due. The sentence of a folder
is that of its `__init__.py`, which holds nothing else.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "dovetail"
PAGE = ROOT / "docs" / "design.md"
BLOCK = re.compile(r"(?<=^```tree\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)
SOURCES = re.compile(r"\[.*?\]")  # such as [ISCA Fig. 8]
LONGEST = 100  # characters of a first sentence
COLUMN = 32  # where sentences begin


def first_sentence(path: Path) -> str:
    """Return the first sentence of a module's docstring.

    Raises ValueError unless it is a line of its own: one sentence that ends in a period, not too long, with nothing or
    a blank line after it.
    """
    line, _, rest = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n")
    is_one = line.endswith(".") and ". " not in SOURCES.sub("", line)
    if not is_one or len(line) > LONGEST or rest[:1] not in ("", "\n"):
        raise ValueError(
            f"{path}: the docstring has to open with one sentence of at most {LONGEST} characters on a line of its "
            f"own, with a period at its end and a blank line before what follows; it opens with {line!r}"
        )
    return line


def rows(folder: Path, indent: str = "") -> Iterator[str]:
    """Yield a line for each file of `folder`, then those of its folders, each under a line of its own."""
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py" or not indent:  # that of a folder below is the folder's own line
            yield f"{indent + path.name:{COLUMN}}{first_sentence(path)}"
    for inner in sorted({path.relative_to(folder).parts[0] for path in folder.glob("*/**/*.py")}):
        if not indent:
            yield ""
        yield f"{indent + inner + '/':{COLUMN}}{first_sentence(folder / inner / '__init__.py')}"
        yield from rows(folder / inner, indent + "  ")


def draw(source: Path) -> str:
    """Return the whole tree of the package in `source`."""
    return "".join(f"{row}\n" for row in rows(source))


if __name__ == "__main__":
    try:
        tree = draw(SOURCE)
    except ValueError as error:
        sys.exit(str(error))
    PAGE.write_text(BLOCK.sub(lambda _: tree, PAGE.read_text("utf-8")), "utf-8")
