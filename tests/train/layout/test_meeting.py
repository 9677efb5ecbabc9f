"""Ranks of one attempt find each other, whatever earlier attempts have left."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from dovetail.train.layout.meeting import AbsentError, meet

PATIENCE = timedelta(seconds=10)


def met(store: dist.Store, late: int, world: int = 3) -> set[str]:
    """The names that ranks come to; rank `late` begins half a second after the others."""

    def come(rank: int) -> str:
        time.sleep(0.5 * (rank == late))
        return meet(store, rank, world, PATIENCE)

    with ThreadPoolExecutor(world) as ranks:
        return set(ranks.map(come, range(world)))


def test_each_attempt_has_a_name_that_all_its_ranks_know() -> None:
    """Also where words of an earlier attempt are there, and the list and the agreement of one that came to its end."""
    store, names = dist.HashStore(), []
    store.set("word/2", "of a rank that was killed before the others came")
    for late in (2, 0, 1):
        [name] = met(store, late)
        names.append(name)
    assert len(set(names)) == 3


def test_ranks_that_do_not_come_are_named() -> None:
    store = dist.HashStore()
    store.set("word/1", "of a rank that was killed")
    with pytest.raises(AbsentError, match="of 2 ranks, 1 did not come within 0.5 s"):
        meet(store, 0, 2, timedelta(seconds=0.5))
