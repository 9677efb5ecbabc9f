"""Four ranks, or two, started once for the tests of a module."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_processes import Ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(4, Path(tmp_path_factory.mktemp("ranks")))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(2, Path(tmp_path_factory.mktemp("ranks")))
    yield started
    started.stop()
