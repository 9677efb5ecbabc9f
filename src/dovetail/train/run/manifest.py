"""Lists a directory's files with their sizes and SHA-256, and checks them.

It is written last, so a directory without one was never finished, and a file that changed since is found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from dovetail.atomic import write_bytes

NAME = "manifest.json"


class Fingerprint(TypedDict):
    bytes: int
    sha256: str


def fingerprint(path: Path) -> Fingerprint:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def write(directory: Path, files: Mapping[str, Fingerprint], about: Mapping[str, Any]) -> None:
    """Write the manifest of `files` (by name) durably; `about` says what else a reader should know (JSON)."""
    text = json.dumps({**about, "files": dict(files)}, indent=1, sort_keys=True)
    write_bytes(directory / NAME, text.encode())


def damage(directory: Path, rank: int = 0, num_ranks: int = 1) -> str | None:
    """What is wrong with the files in `directory`, in words; None if each is as the manifest has it.

    With several ranks, each looks at its share of the files.
    """
    try:
        files = json.loads((directory / NAME).read_bytes())["files"]
        for name in sorted(files)[rank::num_ranks]:
            expected, size = files[name], (directory / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} of {expected['bytes']} bytes"
            if fingerprint(directory / name)["sha256"] != expected["sha256"]:
                return f"{name} does not match its SHA-256"
    except OSError as error:
        return f"{Path(error.filename or directory).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{NAME} is not readable"
    return None
