"""The pool of pages against a simple model of it, and what its keys say."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dovetail.engine.scheduling.blocks import BlockPool, page_keys

PAGES = 6
KEYS = [b"a", b"b", b"c", b"d"]


class Pool(RuleBasedStateMachine):
    """Beside it: holders of each page, its key, and the order in which pages with keys were let go."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(PAGES, 16)
        self.holders = [0] * PAGES
        self.key_of: dict[int, bytes] = {}
        self.kept: list[int] = []  # oldest first
        self.runs: list[list[int]] = []  # pages of each sequence

    def free(self) -> set[int]:
        return {page for page in range(PAGES) if self.holders[page] == 0}

    def found(self, keys: list[bytes]) -> list[int]:
        pages = {key: page for page, key in self.key_of.items()}
        run = []
        for key in keys:
            if key not in pages:
                break
            run.append(pages[key])
        return run

    @rule(count=st.integers(0, PAGES + 1))
    def allocate(self, count: int) -> None:
        assert self.pool.can_allocate(count) == (count <= len(self.free()))
        if count > len(self.free()):
            with pytest.raises(AssertionError, match=f"{count} pages wanted, {len(self.free())} free"):
                self.pool.allocate(count)
            return
        empty = self.free() - self.key_of.keys()
        expected_lost = self.kept[: max(count - len(empty), 0)]
        pages = self.pool.allocate(count)
        assert len(set(pages)) == count and set(pages) <= self.free()
        assert set(pages) - empty == set(expected_lost), "known pages go last, the one let go longest ago first"
        for page in expected_lost:
            del self.key_of[page]
        self.kept = self.kept[len(expected_lost) :]
        for page in pages:
            self.holders[page] = 1
        self.runs.append(pages)

    @rule(keys=st.permutations(KEYS), more=st.integers(0, 2))
    def find_and_share(self, keys: list[bytes], more: int) -> None:
        found = self.pool.find(keys)
        assert found == self.found(keys)
        fresh = len(self.free() - set(found))
        assert self.pool.num_free_without(found) == fresh
        if more > fresh:
            return
        self.pool.share(found)
        for page in found:
            self.holders[page] += 1
        self.kept = [page for page in self.kept if page not in found]
        self.allocate(more)
        self.runs.append(found + self.runs.pop())

    @precondition(lambda self: any(self.runs))
    @rule(data=st.data(), key=st.sampled_from(KEYS))
    def publish(self, data: st.DataObject, key: bytes) -> None:
        page = data.draw(st.sampled_from([page for run in self.runs for page in run]))
        self.pool.publish(page, key)
        if page not in self.key_of and key not in self.key_of.values():
            self.key_of[page] = key

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        run = self.runs.pop(data.draw(st.integers(0, len(self.runs) - 1)))
        self.pool.release(run)
        for page in reversed(run):
            self.holders[page] -= 1
            if self.holders[page] == 0 and page in self.key_of:
                self.kept.append(page)

    @invariant()
    def nothing_is_leaked(self) -> None:
        assert self.pool.num_free == len(self.free())
        assert [self.pool.find([key]) for key in KEYS] == [self.found([key]) for key in KEYS]

    def teardown(self) -> None:
        for run in self.runs:
            self.pool.release(run)
        assert self.pool.num_free == PAGES
        assert sorted(self.pool.allocate(PAGES)) == list(range(PAGES))
        assert self.pool.find(KEYS) == []


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_the_end_of_a_run_is_taken_away_first() -> None:
    pool = BlockPool(4, 2)
    old, new = pool.allocate(2), pool.allocate(2)
    for page, key in zip(old + new, KEYS, strict=True):
        pool.publish(page, key)
    pool.release(old)
    pool.release(new)
    assert [pool.allocate(1) for _ in range(4)] == [[old[1]], [old[0]], [new[1]], [new[0]]]


def test_pages_of_nobody_are_neither_published_nor_released() -> None:
    pool = BlockPool(2, 2)
    [page] = pool.allocate(1)
    pool.release([page])
    with pytest.raises(AssertionError, match="nobody's"):
        pool.publish(page, b"a")
    with pytest.raises(AssertionError, match="nobody's"):
        pool.release([page])
    with pytest.raises(AssertionError, match="not found by a key"):
        pool.share([page])
    assert pool.num_free == 2


@pytest.mark.parametrize(("positions", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_pages_for_positions(positions: int, pages: int) -> None:
    assert BlockPool(1, 16).pages_for(positions) == pages


@pytest.mark.parametrize("sizes", [(0, 16), (4, 0)])
def test_sizes_are_checked(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least one of each"):
        BlockPool(*sizes)


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(TOKENS, TOKENS, st.integers(1, 4))
def test_keys_are_equal_where_all_tokens_up_to_the_pages_end_are(one: list[int], other: list[int], size: int) -> None:
    keys, others = page_keys(one, size, len(one) // size), page_keys(other, size, len(other) // size)
    for page, (key, its) in enumerate(zip(keys, others, strict=False)):
        assert (key == its) == (one[: (page + 1) * size] == other[: (page + 1) * size])
    assert len(set(keys)) == len(keys)


def test_keys_do_not_run_together() -> None:
    """Neither 258 and 1, 1 (bytes), nor pages of other sizes."""
    assert page_keys([257, 0], 1, 1) != page_keys([1, 1], 1, 1)
    assert page_keys([1, 2, 3, 4], 2, 2)[1] != page_keys([1, 2, 3, 4], 4, 1)[0]
    assert page_keys([2**40, 5], 2, 1) != page_keys([0, 5], 2, 1)


def test_the_scheduler_loads_neither_torch_nor_numba() -> None:
    code = "import sys, dovetail.engine.scheduling.scheduler; assert not {'torch', 'numba', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
