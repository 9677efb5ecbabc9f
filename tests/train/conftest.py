"""Texts for runs of a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def text(tmp_path: Path, write_text: Callable[[Path], Path]) -> Path:
    return write_text(tmp_path / "text")
