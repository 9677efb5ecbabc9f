"""Guides with console blocks are walked from top to bottom in an empty directory, each block as a reader would type it.

```console      `$ dovetail ...` or `$ pytest ...`, and what it prints: `...` stands for what differs from run to
                run, and where nothing is shown anything may come. It has to fail where an error is shown, a line
                that opens with `dovetail: `, and only there.
```toml a.toml  a file of that name, in any language
```python       code; blocks share their names, up to a diff
```diff         applied to a copy of the package's files, from here on; any other block is not run
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w+)(?: (\S+\.\w+))?\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if "\n```console\n" in page.read_text("utf-8")]
SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
QUIET = ["-q", "-p", "no:cacheprovider", "-p", "no:faulthandler"]


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_guide(page: Path, tmp_path: Path) -> None:
    blocks = FENCE.findall(page.read_text("utf-8"))
    starts = [0, *(i for i, (language, _, _) in enumerate(blocks) if language == "diff"), len(blocks)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONWARNINGS": "ignore", "COLUMNS": "120"}
    for start, end in pairwise(starts):
        if start:
            apply(blocks[start][2], tmp_path)  # what it changes is imported in a new process
        command = [sys.executable, __file__, json.dumps(blocks[start:end])]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_shown_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [])
    check("dovetail inspect 20m", "20m: ...\n")
    for wrong in ("21m: ...\n", "...\ndovetail: ...\n"):
        with pytest.raises(AssertionError, match="inspect 20m"):
            check("dovetail inspect 20m", wrong)


def apply(diff: str, directory: Path) -> None:
    for name in re.findall(r"^--- a/(\S+)$", diff, re.MULTILINE):
        if not (directory / name).exists():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, directory / name)
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=directory, check=True)


def run_blocks(blocks: list[list[str]]) -> None:
    """In this process and directory. A changed file below src/ is imported in place of the package's own."""
    for path in Path("src").rglob("*.py"):
        package = importlib.import_module(".".join(path.relative_to("src").parent.parts))
        package.__path__.insert(0, str(path.parent.resolve()))
    names: dict[str, Any] = {"__name__": "guide"}
    for language, file, text in blocks:
        if file:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).write_text(text, "utf-8")
        elif language == "python":
            exec(compile(text, "<guide>", "exec"), names)
        elif language == "console":
            for command in ("\n" + text).split("\n$ ")[1:]:
                check(*command.partition("\n")[::2])


def check(command: str, shown: str) -> None:
    from dovetail.cli.app import main

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        program, *words = shlex.split(command)
        sys.argv = [program, *words]
        try:
            code = {"dovetail": main, "pytest": lambda: pytest.main([*words, *QUIET])}[program]()
        except SystemExit as end:
            code = end.code
    if shown and not doctest.OutputChecker().check_output(shown, out.getvalue(), SAME):
        raise AssertionError(f"$ {command}\nshown:\n{shown}\nprinted:\n{out.getvalue()}")
    assert bool(code) == ("\ndovetail: " in "\n" + shown), f"$ {command}\n{out.getvalue()}"


if __name__ == "__main__":
    run_blocks(json.loads(sys.argv[1]))
