"""Four ranks, or two, started once for the tests of a module."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
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


@pytest.fixture(autouse=True)
def as_many_threads_as_a_rank() -> Iterator[None]:
    """One: products of FP32 have other bits on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
