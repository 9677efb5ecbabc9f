"""The latent cache in pages [V3 eqs 1-3].

It has kv_lora_rank + qk_rope_head_dim elements per token and layer.

A slot is one sequence being worked on. Its row of `tables` names the pages that hold its positions, `page_size` each;
several slots may share a page. Who gets which page is decided by `engine.scheduling`.

Positions are explicit in every write, so nothing is ever taken back: a rejected draft stays in memory, unseen
because attention looks no further than the query's own position, until the true token overwrites it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.model.attention.mla import absorbed_attention
from dovetail.spec.model import Mla, ModelSpec


class PagedCache:
    """Pages for `slots` sequences of up to `capacity` positions; layers past the last are the MTP modules' blocks."""

    def __init__(
        self,
        spec: ModelSpec,
        slots: int,
        capacity: int,
        pages: tuple[int, int],
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        """`pages`: their number, and the positions of each. torch.float8_e4m3fn: entries as `stores.Fp8Store` has them.

        Zeroed, not just allocated: a masked key has weight 0, and 0 * NaN would still be NaN."""
        mla = spec.attention
        if not isinstance(mla, Mla):
            raise ValueError("a latent cache belongs to an MLA model; grouped-query models are for counting only")
        layers = spec.num_hidden_layers + spec.num_nextn_predict_layers
        self.latent_dim, self.rope_dim = mla.kv_lora_rank, mla.qk_rope_head_dim
        self.is_fp8 = dtype == torch.float8_e4m3fn
        width = fp8_entry_bytes(mla) if self.is_fp8 else mla.cache_dim
        dtype = torch.uint8 if self.is_fp8 else dtype
        num_pages, page_size = pages
        self.page_size, self.capacity = page_size, capacity
        self.data = torch.zeros(layers, num_pages, page_size, width, dtype=dtype, device=device)
        self.tables = torch.zeros(slots, -(-capacity // page_size), dtype=torch.int64, device=device)

    @property
    def slots(self) -> int:
        return self.tables.shape[0]

    def assign(self, slot: int, pages: Sequence[int]) -> None:
        """From now on these pages hold the first positions of `slot`."""
        self.tables[slot, : len(pages)] = torch.tensor(pages, dtype=torch.int64)

    def reserve(self, num_keys: int) -> None:
        """Raises `ValueError` where positions 0 .. num_keys - 1 go beyond the capacity."""
        if num_keys > self.capacity:
            raise ValueError(
                f"position {num_keys - 1} is outside a cache of {self.capacity} positions per sequence; "
                f"build it with capacity >= {num_keys} (prompt + new tokens + drafts), or ask for fewer tokens"
            )

    def places(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Where positions of slots (two tensors that broadcast) lie among all positions of all pages."""
        return places_in(self.tables, self.page_size, slots, positions)

    def entries(self, layer: int) -> Tensor:
        """All positions of all pages [pages * page_size, latent + rope]."""
        return self.data[layer].flatten(0, 1)

    def select(self, slots: Sequence[int]) -> SelectedSlots:
        """The cache of some slots, in that order, sharing this one's memory. Raises `ValueError` for no such slot."""
        for slot in slots:
            if not 0 <= slot < self.slots:
                raise ValueError(f"slot {slot} is not in a cache of {self.slots} slots (0 to {self.slots - 1})")
        return SelectedSlots(cache=self, slots=tuple(slots))


def places_in(tables: Any, page_size: int, slots: Any, positions: Any) -> Any:
    """`PagedCache.places` by these tables, all of them tensors or all NumPy's arrays."""
    return tables[slots, positions // page_size] * page_size + positions % page_size


def fp8_entry_bytes(mla: Mla) -> int:
    """Of one token in one layer: the latent in E4M3, an FP32 scale per 128 of it, the rotary key in BF16."""
    return 4 * (-(-mla.kv_lora_rank // 4) + -(-mla.kv_lora_rank // 128)) + 2 * mla.qk_rope_head_dim


def contiguous_cache(
    spec: ModelSpec,
    slots: int,
    capacity: int,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> PagedCache:
    """A cache in which each slot has one page that holds all its positions."""
    cache = PagedCache(spec, slots, capacity, (slots, capacity), dtype, device)
    cache.tables[:, 0] = torch.arange(slots)
    return cache


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedSlots:
    """A `model.attention.mla.LatentCache` of some slots: row b of every argument belongs to slots[b]."""

    cache: PagedCache
    slots: tuple[int, ...]

    def reserve(self, num_keys: int) -> None:
        self.cache.reserve(num_keys)

    def write(self, layer: int, positions: Tensor, latent: Tensor, rope_key: Tensor) -> None:
        assert positions.shape[0] == len(self.slots), "one row of positions per slot"
        entries = self.cache.entries(layer)
        entries[self.cache.places(self._slots(), positions)] = torch.cat((latent, rope_key), dim=-1).to(entries.dtype)

    def gather(self, layer: int, num_keys: int) -> tuple[Tensor, Tensor]:
        """Views of a copy."""
        positions = torch.arange(num_keys, device=self.cache.data.device)
        seen = self.cache.entries(layer)[self.cache.places(self._slots(), positions)]
        return seen[..., : self.cache.latent_dim], seen[..., self.cache.latent_dim :]

    def attend(self, layer: int, query: Tensor, positions: Tensor, num_keys: int, scale: float) -> Tensor:
        latent, rope_key = self.gather(layer, num_keys)
        return absorbed_attention(query, latent, rope_key, positions, scale)

    def _slots(self) -> Tensor:
        return torch.tensor(self.slots, device=self.cache.data.device)[:, None]
