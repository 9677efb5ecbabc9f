"""Runs rows on any CPU by `rows_numba` and `row_experts_numba`, with FP32 between operations.

All rows of a call are written to the cache before any is attended to, and each attends up to its own position, in the
absorbed form. Chunks of prompts are rows like others.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dovetail.engine.steps import row_experts_numba, rows_numba
from dovetail.engine.steps.cache import PagedCache
from dovetail.engine.steps.rows import Chunk, Short, joined
from dovetail.engine.steps.weights import Arrays, FusedBlock, Head, fuse
from dovetail.model.attention.rope import tables
from dovetail.model.norm import RmsNorm
from dovetail.model.transformer import Mtp, Transformer
from dovetail.numerics.cpu.kernels import array
from dovetail.numerics.cpu.sharing import Sharing


class FusedSteps:
    """`run`, `draft`, `logits` and `forget` as in `Runner`, up to rounding."""

    def __init__(self, model: Transformer, cache: PagedCache) -> None:
        self.model, self.cache = model, cache
        self.blocks = [fuse(block, model) for block in model.layers.values()]
        self.drafters = [fuse(mtp.block, model) for mtp in model.mtp]
        positions = torch.arange(cache.capacity)
        self.cos, self.sin = (each.numpy() for each in tables(model.spec, model.mla.qk_rope_head_dim, positions))
        self.eps = np.float32(model.spec.rms_norm_eps)
        self.sharing, self.draft_sharing = Sharing(), Sharing()
        self.embedding = array(model.embed_tokens.weight)
        self.caches = [array(data) for data in cache.data]
        self.logits = Head(model, _logits).logits

    def run(self, short: Short, chunks: list[Chunk], wanted: list[int] | None, chosen: list[Tensor] | None) -> Tensor:
        everything = joined(short, chunks)
        rows = self._rows(everything)
        with self.sharing.of_step(len(everything.tokens)):
            x = rows_numba.embed(self.embedding, np.array(everything.tokens))
            for block in self.blocks:
                ids = self._run(block, x, rows)
                if chosen is not None and block.choices:
                    chosen.append(ids)
            hidden = self._finish(x, self.model.norm)
        return hidden if wanted is None else hidden[wanted]

    def draft(self, depth: int, short: Short, chunks: list[Chunk], hidden: Tensor, next_tokens: list[int]) -> Tensor:
        mtp = self.model.mtp[depth]
        assert isinstance(mtp, Mtp)
        weights = (array(each) for each in (mtp.enorm.weight, mtp.hnorm.weight, mtp.eh_proj.weight))
        rows = self._rows(joined(short, chunks))
        with self.draft_sharing.of_step(len(next_tokens)):
            tokens = np.array(next_tokens)
            x = rows_numba.join(self.embedding, array(hidden.contiguous()), tokens, self.eps, *weights)
            self._run(self.drafters[depth], x, rows)
            return self._finish(x, mtp.norm)

    def forget(self, slot: int) -> None:
        """Nothing is kept."""

    def _rows(self, rows: Short) -> Arrays:
        """Tables, and slots, positions, cos, sin of the rows. Raises ValueError beyond the cache's capacity."""
        self.cache.reserve(max(rows.positions) + 1)
        where = np.array(rows.positions)
        return self.cache.tables.numpy(), np.array(rows.slots), where, self.cos[where], self.sin[where]

    def _run(self, block: FusedBlock, x: np.ndarray, rows: Arrays) -> Tensor:
        """x [R, dim] through the block, in place -> the experts chosen [R, K]."""
        scale, heads = np.float32(self.model.layers["0"].self_attn.scale), self.model.mla.num_attention_heads
        rows_numba.attention(x, self.eps, *block.attention, self.caches[block.layer], *rows, scale, heads)
        ids = torch.empty(len(x), block.choices, dtype=torch.int64)
        if block.choices:
            row_experts_numba.experts(x, self.eps, *block.mlp, ids.numpy(), block.gate)
        else:
            row_experts_numba.dense(x, self.eps, *block.mlp)
        return ids

    def _finish(self, x: np.ndarray, norm: RmsNorm) -> Tensor:
        hidden = torch.empty(x.shape, dtype=self.model.embed_tokens.weight.dtype)
        rows_numba.finish(x, array(norm.weight), self.eps, array(hidden))
        return hidden


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """[R, dim] -> [R, vocab] FP32."""
    logits = torch.empty(len(hidden), len(weight))
    rows_numba.head(array(hidden), array(weight), logits.numpy())
    return logits
