"""The latent cache, which is one tensor [V3 eqs 1-3].

It has kv_lora_rank + qk_rope_head_dim elements per token and layer.

Positions are explicit in every write, so nothing is ever taken back: a rejected draft stays in memory, unseen
because attention looks no further than the query's own position, until the true token overwrites it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.model.attention.mla import absorbed_attention
from dovetail.spec.model import Mla, ModelSpec


class ContiguousCache:
    """`batch` slots of `capacity` positions; layers past the last are the MTP modules' blocks."""

    def __init__(
        self,
        spec: ModelSpec,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        """Zeroed, not just allocated: a masked key has weight 0, and 0 * NaN would still be NaN."""
        mla = spec.attention
        if not isinstance(mla, Mla):
            raise ValueError("a latent cache belongs to an MLA model; grouped-query models are for counting only")
        layers = spec.num_hidden_layers + spec.num_nextn_predict_layers
        self.latent_dim = mla.kv_lora_rank
        self.data = torch.zeros(layers, batch, capacity, mla.cache_dim, dtype=dtype, device=device)

    @property
    def batch(self) -> int:
        return self.data.shape[1]

    @property
    def capacity(self) -> int:
        return self.data.shape[2]

    def reserve(self, num_keys: int) -> None:
        """Raises `ValueError` where positions 0 .. num_keys - 1 go beyond the capacity."""
        if num_keys > self.capacity:
            raise ValueError(
                f"position {num_keys - 1} is outside a cache of {self.capacity} positions per sequence; "
                f"build it with capacity >= {num_keys} (prompt + new tokens + drafts), or ask for fewer tokens"
            )

    def select(self, slots: Sequence[int]) -> SelectedSlots:
        """The cache of some slots, in that order, sharing this one's memory. Raises `ValueError` for no such slot."""
        for slot in slots:
            if not 0 <= slot < self.batch:
                raise ValueError(f"slot {slot} is not in a cache of {self.batch} slots (0 to {self.batch - 1})")
        return SelectedSlots(cache=self, slots=tuple(slots))


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedSlots:
    """A `model.attention.mla.LatentCache` of some slots: row b of every argument belongs to slots[b]."""

    cache: ContiguousCache
    slots: tuple[int, ...]

    def reserve(self, num_keys: int) -> None:
        self.cache.reserve(num_keys)

    def write(self, layer: int, positions: Tensor, latent: Tensor, rope_key: Tensor) -> None:
        assert positions.shape[0] == len(self.slots), "one row of positions per slot"
        data = self.cache.data[layer]
        slots = torch.tensor(self.slots, device=data.device)
        data[slots[:, None], positions] = torch.cat((latent, rope_key), dim=-1).to(data.dtype)

    def gather(self, layer: int, num_keys: int) -> tuple[Tensor, Tensor]:
        """Views where the slots are consecutive, else copies."""
        data = self.cache.data[layer]
        first, count = self.slots[0], len(self.slots)
        is_consecutive = self.slots == tuple(range(first, first + count))
        slots = torch.tensor(self.slots, device=data.device)
        seen = data[first : first + count, :num_keys] if is_consecutive else data[slots, :num_keys]
        return seen[..., : self.cache.latent_dim], seen[..., self.cache.latent_dim :]

    def attend(self, layer: int, query: Tensor, positions: Tensor, num_keys: int, scale: float) -> Tensor:
        latent, rope_key = self.gather(layer, num_keys)
        return absorbed_attention(query, latent, rope_key, positions, scale)
