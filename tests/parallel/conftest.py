"""Every test here computes on one thread, as ranks do."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def as_many_threads_as_a_rank() -> Iterator[None]:
    """One: products of FP32 have other bits on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
