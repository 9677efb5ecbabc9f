"""Runs rows on a CPU with AVX-512 BF16: chunks of prompts and short rows in one pass over the weights.

It computes what `model.transformer` does, up to rounding: chunks in the expanded form of attention, short rows in the
absorbed one. The difference is a promise: the bits of a row depend on its own sequence alone. Products are those of
`invariant_numba`; torch's choose an order of sums by the number of rows. So a prompt may be cut anywhere, begin behind
pages that another one has filled, or be computed again, and the same numbers come out.

A chunk of a prompt needs keys and values of all positions before it. They are expanded from the latents once and kept
while the prompt is unfinished, as far as `KEPT_SHARE` of the cache's memory goes; beyond, they are expanded anew for
each chunk.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import numba
import numpy as np
import torch
from torch import Tensor

from dovetail.engine.steps import attention_numba, block_numba
from dovetail.engine.steps.cache import PagedCache, places_in
from dovetail.engine.steps.rows import Chunk, Short, joined
from dovetail.engine.steps.stores import Bf16Store, Fp8Store
from dovetail.engine.steps.weights import FusedBlock, Head, fuse
from dovetail.model.attention.rope import tables
from dovetail.model.norm import RmsNorm
from dovetail.model.transformer import Mtp, Transformer
from dovetail.numerics.cpu.kernels import array
from dovetail.numerics.cpu.sharing import Sharing
from dovetail.numerics.products import invariant_numba

KEPT_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class ChunkRows:
    chunk: Chunk
    first: int  # row
    end: int  # the row past its last
    places: Tensor  # in the cache, of all positions of its slot up to its last


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Of one pass."""

    tokens: np.ndarray  # [R]
    short: int  # so many come first
    slots: np.ndarray  # [R]
    positions: np.ndarray  # [R]
    places: np.ndarray  # [R]: in the cache
    cos: np.ndarray  # [R, rope / 2] FP32
    sin: np.ndarray
    everything: np.ndarray  # 0 .. R - 1
    chunks: list[ChunkRows]


class TiledSteps:
    """`run`, `draft` and `logits`; see `Runner`."""

    def __init__(self, model: Transformer, cache: PagedCache) -> None:
        self.model, self.cache = model, cache
        self.blocks = [fuse(block, model) for block in model.layers.values()]
        self.drafters = [fuse(mtp.block, model) for mtp in model.mtp]
        positions = torch.arange(cache.capacity)
        self.embedding, self.tables = array(model.embed_tokens.weight), cache.tables.numpy()
        self.store = Fp8Store(cache) if cache.is_fp8 else Bf16Store(cache)
        self.cos, self.sin = (each.numpy() for each in tables(model.spec, model.mla.qk_rope_head_dim, positions))
        self.eps = np.float32(model.spec.rms_norm_eps)
        self.scale = np.float32(model.layers["0"].self_attn.scale)
        self.logits = Head(model, partial(invariant_numba.product, dtype=torch.float32)).logits
        self.sharing, self.draft_sharing = Sharing(), Sharing()
        self.kept: dict[tuple[int, int], Tensor] = {}  # by slot and layer: keys and values of its first positions
        self.kept_bytes = 0
        self.most_bytes = int(KEPT_SHARE * cache.data.nbytes)

    def run(self, short: Short, chunks: list[Chunk], wanted: list[int] | None, chosen: list[Tensor] | None) -> Tensor:
        """Hidden [R, dim] after the final norm of all rows, or [W, dim] of the rows `wanted`, ascending: in the last
        block the others' latents are all that is needed of them."""
        rows = self.rows(short, chunks)
        x = block_numba.gathered(self.embedding, rows.tokens)
        asked = None if wanted is None else np.array(wanted, dtype=np.int64)
        *before, last = self.blocks
        with self._threads(self.sharing, rows):
            for block in before:
                x = self._block(block, x, rows, None, chosen)
            return self._normed(self._block(last, x, rows, asked, chosen), self.model.norm)

    def draft(self, depth: int, short: Short, chunks: list[Chunk], hidden: Tensor, next_tokens: list[int]) -> Tensor:
        """MTP module `depth` on rows: hidden [R, dim] and the token [R] after each -> [R, dim]."""
        mtp = self.model.mtp[depth]
        assert isinstance(mtp, Mtp)
        rows = self.rows(short, chunks)
        weights = (array(each) for each in (mtp.enorm.weight, mtp.hnorm.weight, mtp.eh_proj.weight))
        with self._threads(self.draft_sharing, rows):
            embedded = block_numba.gathered(self.embedding, np.array(next_tokens))
            x = block_numba.join(embedded, array(hidden.contiguous()), self.eps, *weights, numba.get_num_threads())
            return self._normed(self._block(self.drafters[depth], x, rows, None, None), mtp.norm)

    def forget(self, slot: int) -> None:
        """Its prompt is finished, or given up."""
        for key in [key for key in self.kept if key[0] == slot]:
            self.kept_bytes -= self.kept.pop(key).nbytes

    def rows(self, short: Short, chunks: list[Chunk]) -> Rows:
        everything = joined(short, chunks)
        self.cache.reserve(max(everything.positions) + 1)
        slots, where = np.array(everything.slots), np.array(everything.positions)
        places = partial(places_in, self.tables, self.cache.page_size)
        ends = list(accumulate((len(chunk.tokens) for chunk in chunks), initial=len(short.tokens)))
        return Rows(
            tokens=np.array(everything.tokens),
            short=len(short.tokens),
            slots=slots,
            positions=where,
            places=places(slots, where),
            cos=self.cos[where],
            sin=self.sin[where],
            everything=np.arange(len(where)),
            chunks=[
                ChunkRows(chunk, first, end, torch.from_numpy(places(chunk.slot, np.arange(chunk.range.stop))))
                for chunk, first, end in zip(chunks, ends[:-1], ends[1:], strict=True)
            ],
        )

    def _block(
        self, block: FusedBlock, x: np.ndarray, rows: Rows, wanted: np.ndarray | None, chosen: list[Tensor] | None
    ) -> np.ndarray:
        """x [R, dim] BF16 bits, changed in place -> the same, or a copy of the rows wanted."""
        heads, threads = self.model.mla.num_attention_heads, numba.get_num_threads()
        norm, q_a, q_a_norm, q_b, kv_a, kv_a_norm, kv_b, o = block.attention
        asked = rows.everything if wanted is None else wanted
        entries, places = self.store.target(block.layer, rows.places)
        q = block_numba.project(
            x, asked, self.eps, norm, q_a, q_a_norm, q_b, kv_a, kv_a_norm, rows.cos, rows.sin, places, entries, heads,
            threads,
        )  # fmt: skip
        self.store.written(block.layer, entries, rows.places)
        if wanted is not None:
            x = x[wanted]
        if not len(x):
            return x
        mixed = np.empty((len(x), heads, self.model.mla.v_head_dim), np.uint16)
        if rows.short:
            self._attend_short(block, q, rows, asked, mixed)
        for each in rows.chunks:
            begin, stop = np.searchsorted(asked, (each.first, each.end))
            if begin < stop:
                self._attend(block, each, q[begin:stop], rows.positions[asked[begin:stop]], mixed[begin:stop])
        block_numba.add_product(x, mixed.reshape(len(x), -1), o, threads)
        if not block.choices:
            block_numba.dense(x, self.eps, *block.mlp, threads)
            return x
        ids = np.empty((len(x), block.choices), np.int64)
        block_numba.experts(x, self.eps, *block.mlp, ids, block.gate, threads)
        if chosen is not None:
            chosen.append(torch.from_numpy(ids))
        return x

    def _attend_short(self, block: FusedBlock, q: np.ndarray, rows: Rows, asked: np.ndarray, out: np.ndarray) -> None:
        """The short rows among `asked`, which come first."""
        count = int(np.searchsorted(asked, rows.short))
        mine = asked[:count]
        positions = rows.positions[mine]
        keys = self.store.keys(block.layer, rows.slots[mine], positions)
        attention_numba.attend_absorbed(
            q[:count], block.attention[6], keys.entries, keys.page_size, keys.tables, keys.slots, positions, self.scale,
            out[:count],
        )  # fmt: skip

    def _attend(
        self, block: FusedBlock, rows: ChunkRows, q: np.ndarray, positions: np.ndarray, out: np.ndarray
    ) -> None:
        """Queries [T, H, D] of a chunk over all positions of its slot up to their own."""
        kv, rope_key = self._keys_values(block, rows.chunk, rows.places[: int(positions[-1]) + 1])
        splits = -(-2 * numba.get_num_threads() // q.shape[1])
        keys = array(kv.view(len(kv), q.shape[1], -1))
        attention_numba.attend(q, keys, array(rope_key), positions, self.scale, out, splits)

    def _keys_values(self, block: FusedBlock, chunk: Chunk, places: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [S, H (nope + v)] of a slot's first positions, and their rotary keys [S, rope]."""
        key = chunk.slot, block.layer
        entries = self.store.gather(block.layer, places)
        kept = self.kept.get(key)
        start = 0 if kept is None else len(kept)
        latent = self.cache.latent_dim
        kv = invariant_numba.product(entries[start:, :latent].contiguous(), block.expansion)
        if kept is not None:
            kv = torch.cat((kept, kv))
        more = kv.nbytes - (0 if kept is None else kept.nbytes)
        if chunk.goes_on and self.kept_bytes + more <= self.most_bytes:
            self.kept[key] = kv
            self.kept_bytes += more
        return kv, entries[:, latent:].contiguous()

    def _normed(self, x: np.ndarray, norm: RmsNorm) -> Tensor:
        return torch.from_numpy(block_numba.norm(x, array(norm.weight), self.eps)).view(torch.bfloat16)

    def _threads(self, sharing: Sharing, rows: Rows) -> AbstractContextManager[None]:
        """All threads for chunks; for short rows alone, what `sharing` finds."""
        return nullcontext() if rows.chunks else sharing.of_step(rows.short)
