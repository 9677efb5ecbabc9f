"""How the kernels of `tiled` write and read the cache: BF16 where it lies, FP8 by way of BF16 copies.

Whatever the format, attention sees what is in the cache, a chunk's own positions included. So with FP8, too, it makes
no difference where a prompt is cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dovetail.engine.steps import cache_numba
from dovetail.engine.steps.cache import PagedCache
from dovetail.numerics.cpu.kernels import array
from dovetail.numerics.formats.rounding_numba import form_of


@dataclass(frozen=True, slots=True)
class Keys:
    """Entries [., latent + rope] BF16 bits that short rows attend to: in pages of `page_size`, by the tables [., .] of
    `slots` [R]."""

    entries: np.ndarray
    page_size: int
    tables: np.ndarray
    slots: np.ndarray


class Bf16Store:
    """The cache's own memory."""

    def __init__(self, cache: PagedCache) -> None:
        self.cache, self.tables = cache, cache.tables.numpy()
        self.layers = [array(cache.entries(layer)) for layer in range(cache.data.shape[0])]

    def target(self, layer: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Entries to write to, and at which places."""
        return self.layers[layer], places

    def written(self, layer: int, entries: np.ndarray, places: np.ndarray) -> None:
        """They are in the cache already."""

    def keys(self, layer: int, slots: np.ndarray, positions: np.ndarray) -> Keys:
        return Keys(self.layers[layer], self.cache.page_size, self.tables, slots)

    def gather(self, layer: int, places: Tensor) -> Tensor:
        """A copy [S, latent + rope]."""
        return self.cache.entries(layer)[places]


class Fp8Store:
    """A cache of format "fp8"."""

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache
        form = form_of("e4m3")
        assert form is not None
        self.form, self.width = form, cache.latent_dim + cache.rope_dim
        self.first_scale = -(-cache.latent_dim // 4)
        self.first_half = 2 * (self.first_scale + -(-cache.latent_dim // cache_numba.TILE))
        flat = cache.data.flatten(1, 2)
        self.data, self.scales = flat.numpy(), flat.view(torch.float32).numpy()
        self.halves = flat.view(torch.uint16).numpy()

    def target(self, layer: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.empty((len(places), self.width), np.uint16), np.arange(len(places))

    def written(self, layer: int, entries: np.ndarray, places: np.ndarray) -> None:
        views = self.data[layer], self.scales[layer], self.halves[layer]
        cache_numba.pack(entries, places, *views, self.first_scale, self.first_half, self.form)

    def keys(self, layer: int, slots: np.ndarray, positions: np.ndarray) -> Keys:
        """All positions of the slots up to the last that is asked for, each slot's in a page of its own."""
        which, mine = np.unique(slots, return_inverse=True)
        longest = int(positions.max()) + 1
        where = torch.arange(longest)[None]
        places = self.cache.places(torch.from_numpy(which)[:, None], where).flatten()
        entries = array(self.gather(layer, places))
        return Keys(entries, longest, np.arange(len(which))[:, None], mine)

    def gather(self, layer: int, places: Tensor) -> Tensor:
        entries = torch.empty(len(places), self.width, dtype=torch.bfloat16)
        views = self.data[layer], self.scales[layer], self.halves[layer]
        cache_numba.unpack(*views, self.first_scale, self.first_half, places.numpy(), self.form, array(entries))
        return entries
