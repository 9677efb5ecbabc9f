"""Pages of the cache: who holds which, and which of them another prompt may share.

A page is free, or held by one sequence or several. One whose content is known by a key keeps it when it is let go: it
is found again until it is needed for something else, the one that was let go longest ago first.

    pool.can_allocate(n)    then    pool.allocate(n)          n pages of nobody else
    pool.find(keys)         then    pool.share(pages)         the longest run of known pages from the start on
    pool.publish(page, key)                                   its content is final from now on
    pool.release(pages)                                       held once less
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """`num_pages` pages of `page_size` positions each."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"{num_pages} pages of {page_size} positions: there must be at least one of each")
        self.num_pages, self.page_size = num_pages, page_size
        self._holders = [0] * num_pages
        self._keys: list[bytes | None] = [None] * num_pages
        self._by_key: dict[bytes, int] = {}
        self._empty = list(range(num_pages - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()  # held by nobody, with known content; oldest first

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._kept)

    def pages_for(self, positions: int) -> int:
        return -(-positions // self.page_size)

    def can_allocate(self, count: int) -> bool:
        return count <= self.num_free

    def allocate(self, count: int) -> list[int]:
        assert self.can_allocate(count), f"{count} pages wanted, {self.num_free} free"
        return [self._take() for _ in range(count)]

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Pages with these contents, up to the first that is not there."""
        pages = []
        for key in keys:
            page = self._by_key.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def num_free_without(self, pages: Iterable[int]) -> int:
        """How many pages are free once these are shared."""
        return self.num_free - sum(1 for page in pages if self._holders[page] == 0)

    def share(self, pages: Iterable[int]) -> None:
        for page in pages:
            assert self._keys[page] is not None, f"page {page} was not found by a key"
            if self._holders[page] == 0:
                del self._kept[page]
            self._holders[page] += 1

    def publish(self, page: int, key: bytes) -> None:
        """Another page with the same content stays the one that is found."""
        assert self._holders[page] > 0, f"page {page} is nobody's"
        if key not in self._by_key and self._keys[page] is None:
            self._by_key[key], self._keys[page] = page, key

    def release(self, pages: Iterable[int]) -> None:
        """Give them in the order of their positions: of a run, the end is taken away first."""
        for page in reversed(list(pages)):
            assert self._holders[page] > 0, f"page {page} is nobody's"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if self._keys[page] is None:
                    self._empty.append(page)
                else:
                    self._kept[page] = None

    def _take(self) -> int:
        if self._empty:
            page = self._empty.pop()
        else:
            page, _ = self._kept.popitem(last=False)
            key = self._keys[page]
            assert key is not None
            del self._by_key[key]
            self._keys[page] = None
        self._holders[page] = 1
        return page


def page_keys(tokens: Sequence[int], page_size: int, count: int) -> list[bytes]:
    """A key for each of the first `count` pages: the digest of all tokens up to its end."""
    keys, before = [], b""
    for page in range(count):
        mine = array("q", tokens[page * page_size : (page + 1) * page_size])
        before = hashlib.blake2b(before + mine.tobytes(), digest_size=16).digest()
        keys.append(before)
    return keys
