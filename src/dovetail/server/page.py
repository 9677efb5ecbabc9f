"""The page at /: the files of the folder `page`, read once; nothing comes from other hosts."""

from __future__ import annotations

import mimetypes
from collections.abc import Mapping
from importlib.resources import files

from starlette.responses import Response

_POLICY = "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_HEADERS = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff", "cache-control": "no-cache"}


def read_pages() -> Mapping[str, Response]:
    """Return the answer for each path: "/" is index.html, every other file has its name."""
    pages = {}
    folder = files("dovetail.server") / "page"
    for file in folder.iterdir() if folder.is_dir() else ():
        if file.is_file():
            kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
            path = "/" if file.name == "index.html" else f"/{file.name}"
            pages[path] = Response(file.read_bytes(), media_type=kind, headers=_HEADERS)
    return pages
