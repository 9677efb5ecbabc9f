"""Runs many rows at once on a CPU with AVX-512 BF16: prompts, whole or in chunks, several together.

It computes what `model.transformer` does, in the expanded form of attention, up to rounding. The difference is a
promise: the bits of a row depend on its own sequence alone. Products are those of `grouped_numba`, which sum each
element in the order of k; torch's choose an order by the number of rows. So a prompt may be cut anywhere, begin behind
pages that another one has filled, or be computed again, and the same numbers come out.

A chunk of a prompt needs keys and values of all positions before it. They are expanded from the latents once and kept
while the prompt is unfinished, as far as `KEPT_SHARE` of the cache's memory goes; beyond, they are expanded anew for
each chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numba
import numpy as np
import torch
from torch import Tensor

from dovetail.engine.steps import prompts_numba, row_experts_numba
from dovetail.engine.steps.cache import PagedCache
from dovetail.engine.steps.fused import gate_of
from dovetail.model.attention.mla import MultiHeadLatentAttention
from dovetail.model.attention.rope import tables
from dovetail.model.block import Block
from dovetail.model.experts.gate import Routing
from dovetail.model.experts.moe import LocalDispatcher, MoeMlp
from dovetail.model.experts.swiglu import swiglu
from dovetail.model.transformer import Mtp, Transformer
from dovetail.numerics.cpu.kernels import array
from dovetail.numerics.products import grouped_numba

KEPT_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Chunk:
    """Positions start .. start + len(tokens) - 1 of a slot."""

    slot: int
    start: int
    tokens: list[int]
    goes_on: bool = False  # more of the prompt is to come

    @property
    def range(self) -> range:
        return range(self.start, self.start + len(self.tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of all chunks, one after the other."""

    chunks: list[tuple[int, int, int]]  # slot, first row, row past the last
    positions: Tensor  # [R] int64
    cos: Tensor  # [R, rope / 2] FP32
    sin: Tensor
    places: Tensor  # [R]: in the cache
    unfinished: frozenset[int]  # slots whose prompts go on after these rows

    def first(self, wanted: Tensor) -> Rows:
        """The rows `wanted`, ascending, alone."""
        bounds = [(slot, *torch.searchsorted(wanted, torch.tensor([a, b])).tolist()) for slot, a, b in self.chunks]
        each = (self.positions, self.cos, self.sin, self.places)
        positions, cos, sin, places = (x[wanted] for x in each)
        return replace(self, chunks=bounds, positions=positions, cos=cos, sin=sin, places=places)


class PromptSteps:
    """`prompt` and `prompt_draft` as in `Runner`."""

    def __init__(self, model: Transformer, cache: PagedCache) -> None:
        self.model, self.cache = model, cache
        self.dispatcher = LocalDispatcher(row_multiple=1)
        self.cos, self.sin = tables(model.spec, model.mla.qk_rope_head_dim, torch.arange(cache.capacity))
        self.kept: dict[tuple[int, int], Tensor] = {}  # by slot and layer: keys and values of its first positions
        self.kept_bytes = 0
        self.most_bytes = int(KEPT_SHARE * cache.data.nbytes)

    def rows(self, chunks: list[Chunk]) -> Rows:
        bounds, row = [], 0
        for chunk in chunks:
            bounds.append((chunk.slot, row, row + len(chunk.tokens)))
            row += len(chunk.tokens)
        positions = torch.cat([torch.arange(chunk.range.start, chunk.range.stop) for chunk in chunks])
        slots = torch.tensor([chunk.slot for chunk in chunks for _ in chunk.tokens])
        self.cache.reserve(int(positions.max()) + 1)
        return Rows(
            chunks=bounds,
            positions=positions,
            cos=self.cos[positions],
            sin=self.sin[positions],
            places=self.cache.places(slots, positions),
            unfinished=frozenset(chunk.slot for chunk in chunks if chunk.goes_on),
        )

    def prompt(self, tokens: Tensor, rows: Rows, wanted: Tensor | None, chosen: list[Tensor] | None) -> Tensor:
        """tokens [R] -> hidden [R, dim] after the final norm, or [W, dim] of the rows `wanted` alone: in the last block
        the others' latents are all that is needed of them."""
        x = self.model.embed_tokens(tokens)
        *before, last = self.model.layers.values()
        for block in before:
            x = self._block(block, x, rows, None, chosen)
        hidden: Tensor = self.model.norm(self._block(last, x, rows, wanted, chosen))
        return hidden

    def draft(self, depth: int, hidden: Tensor, next_tokens: Tensor, rows: Rows) -> Tensor:
        """MTP module `depth` on rows: hidden [R, dim] and the token [R] after each -> [R, dim]."""
        mtp = self.model.mtp[depth]
        assert isinstance(mtp, Mtp)
        embedded = self.model.embed_tokens(next_tokens)
        joined = _product(torch.cat((mtp.enorm(embedded), mtp.hnorm(hidden)), dim=-1), mtp.eh_proj.weight)
        output: Tensor = mtp.norm(self._block(mtp.block, joined, rows, None, None))
        return output

    def forget(self, slot: int) -> None:
        """Its prompt is finished, or given up."""
        for key in [key for key in self.kept if key[0] == slot]:
            self.kept_bytes -= self.kept.pop(key).nbytes

    def _block(self, block: Block, x: Tensor, rows: Rows, wanted: Tensor | None, chosen: list[Tensor] | None) -> Tensor:
        attention = block.self_attn
        normed = block.input_layernorm(x)
        both = _product(normed, attention.kv_a_proj_with_mqa.weight)
        norm = attention.kv_a_layernorm
        prompts_numba.remember(
            *(array(each) for each in (both, norm.weight)),
            np.float32(norm.eps),
            *(array(each) for each in (rows.cos, rows.sin, rows.places, self.cache.entries(block.layer))),
        )
        if wanted is not None and not len(wanted):
            return x[:0]
        if wanted is not None:
            x, normed, rows = x[wanted], normed[wanted], rows.first(wanted)
        x = x + self._attention(attention, normed, rows, block.layer)
        normed = block.post_attention_layernorm(x)
        mlp = block.mlp
        if isinstance(mlp, MoeMlp):
            return x + self._experts(mlp, normed, chosen)
        return x + _feed_forward(normed, mlp.gate_up_proj.weight, mlp.down_proj.weight)

    def _attention(self, attention: MultiHeadLatentAttention, normed: Tensor, rows: Rows, layer: int) -> Tensor:
        mla = attention.mla
        if mla.q_lora_rank is None:
            q = _product(normed, attention.q_proj.weight)
        else:
            q = _product(
                attention.q_a_layernorm(_product(normed, attention.q_a_proj.weight)), attention.q_b_proj.weight
            )
        q = q.view(len(q), mla.num_attention_heads, mla.qk_head_dim)
        prompts_numba.rotate(array(q), array(rows.cos), array(rows.sin))
        out = q.new_empty(len(q), mla.num_attention_heads, mla.v_head_dim)
        splits = -(-2 * numba.get_num_threads() // mla.num_attention_heads)
        for slot, begin, end in rows.chunks:
            if begin == end:
                continue
            positions = rows.positions[begin:end]
            goes_on = slot in rows.unfinished
            kv, rope_key = self._keys_values(attention, (slot, layer), int(positions[-1]) + 1, goes_on)
            kv = kv.view(len(kv), mla.num_attention_heads, -1)
            arrays = (array(each) for each in (q[begin:end], kv, rope_key, positions))
            prompts_numba.attend(*arrays, np.float32(attention.scale), array(out[begin:end]), splits)
        return _product(out.flatten(1), attention.o_proj.weight)

    def _keys_values(
        self, attention: MultiHeadLatentAttention, key: tuple[int, int], num_keys: int, goes_on: bool
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [S, H (nope + v)] of the first positions of a slot in a layer, and rotary keys [S, rope]."""
        slot, layer = key
        entries = self.cache.entries(layer)[self.cache.places(torch.tensor(slot), torch.arange(num_keys))]
        latent = self.cache.latent_dim
        kept = self.kept.get(key)
        start = 0 if kept is None else len(kept)
        kv = _product(entries[start:, :latent], attention.kv_b_proj.weight)
        if kept is not None:
            kv = torch.cat((kept, kv))
        more = kv.nbytes - (0 if kept is None else kept.nbytes)
        if goes_on and self.kept_bytes + more <= self.most_bytes:
            self.kept[key] = kv
            self.kept_bytes += more
        return kv, entries[:, latent:].contiguous()

    def _experts(self, mlp: MoeMlp, x: Tensor, chosen: list[Tensor] | None) -> Tensor:
        moe, gate = mlp.gate.moe, mlp.gate
        ids = torch.empty(len(x), moe.num_experts_per_tok, dtype=torch.int64)
        weights = torch.empty(len(x), moe.num_experts_per_tok)
        bias = gate.e_score_correction_bias
        bias = torch.zeros(moe.n_routed_experts) if bias is None else bias
        arrays = (array(each) for each in (x, gate.weight, bias, ids, weights))
        row_experts_numba.route(*arrays, gate_of(moe))
        if chosen is not None:
            chosen.append(ids)
        counts = torch.bincount(ids.flatten(), minlength=moe.n_routed_experts)
        routing = Routing(expert_ids=ids, weights=weights, scores=weights, counts=counts)
        dispatched = self.dispatcher.dispatch(x, routing)
        offsets = dispatched.offsets
        hidden = grouped_numba.fprop(dispatched.rows, mlp.experts.gate_up_proj, offsets)
        output = grouped_numba.fprop(swiglu(hidden), mlp.experts.down_proj, offsets)
        output = self.dispatcher.combine(output, dispatched, routing)
        shared = mlp.shared_experts
        if shared is None:
            return output
        return output + _feed_forward(x, shared.gate_up_proj.weight, shared.down_proj.weight)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return grouped_numba.fprop(x, weight[None], [0, len(x)])


def _feed_forward(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return _product(swiglu(_product(x, gate_up)), down)
