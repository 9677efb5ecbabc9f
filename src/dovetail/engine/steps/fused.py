"""Runs the short steps of `runner` on a CPU, by the kernels of `rows_numba` and `row_experts_numba`.

Rows [R] may be any mix of slots; all rows of a call are written to the cache before any is attended to, and each
attends up to its own position. The model's weights must stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dovetail.engine.steps import row_experts_numba, rows_numba
from dovetail.engine.steps.cache import PagedCache
from dovetail.engine.steps.sharing import Sharing
from dovetail.model.attention.mla import MultiHeadLatentAttention
from dovetail.model.attention.rope import tables
from dovetail.model.block import Block
from dovetail.model.experts.moe import MoeMlp
from dovetail.model.norm import RmsNorm
from dovetail.model.precision import has_recipe
from dovetail.model.transformer import Mtp, Transformer
from dovetail.numerics.cpu.kernels import array
from dovetail.spec.model import Moe

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedBlock:
    """Views of one block's tensors in the order the kernels take them."""

    attention: Arrays
    mlp: Arrays
    cache: np.ndarray  # [pages, page size, latent + rope]
    choices: int  # experts per token; 0 for a dense block
    gate: tuple[int, int, int, bool, bool, np.float32]


def takes(model: Transformer) -> bool:
    """Whether the kernels compute what the model's layers do. They know nothing of a recipe, and
    `row_experts_numba.route_row` takes any gate but sigmoid for softmax."""
    moe = model.spec.moe
    has_gate = moe is None or moe.scoring_func in ("sigmoid", "softmax")
    return has_gate and not has_recipe(model)


class FusedSteps:
    """`step`, `draft` and `logits` as in `Runner`, up to rounding."""

    def __init__(self, model: Transformer, cache: PagedCache) -> None:
        self.model, self.cache = model, cache
        self.blocks = [_fuse(block, model, cache) for block in model.layers.values()]
        self.drafters = [_fuse(mtp.block, model, cache) for mtp in model.mtp]
        positions = torch.arange(cache.capacity)
        self.cos, self.sin = (each.numpy() for each in tables(model.spec, model.mla.qk_rope_head_dim, positions))
        self.eps = np.float32(model.spec.rms_norm_eps)
        self.sharing, self.draft_sharing, self.head_sharing = Sharing(), Sharing(), Sharing()
        self.embedding, self.head_weight = array(model.embed_tokens.weight), array(model.head_weight)

    def step(self, tokens: Tensor, slots: Tensor, positions: Tensor, chosen: list[Tensor] | None = None) -> Tensor:
        rows = self._rows(slots, positions)
        with self.sharing.of_step(len(tokens)):
            x = rows_numba.embed(self.embedding, tokens.numpy())
            for block in self.blocks:
                ids = self._run(block, x, rows)
                if chosen is not None and block.choices:
                    chosen.append(ids)
            return self._finish(x, self.model.norm)

    def draft(self, depth: int, hidden: Tensor, next_tokens: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        mtp = self.model.mtp[depth]
        assert isinstance(mtp, Mtp)
        weights = (array(each) for each in (mtp.enorm.weight, mtp.hnorm.weight, mtp.eh_proj.weight))
        rows = self._rows(slots, positions)
        with self.draft_sharing.of_step(len(next_tokens)):
            x = rows_numba.join(self.embedding, array(hidden.contiguous()), next_tokens.numpy(), self.eps, *weights)
            self._run(self.drafters[depth], x, rows)
            return self._finish(x, mtp.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = torch.empty(flat.shape[0], self.head_weight.shape[0], dtype=torch.float32)
        with self.head_sharing.of_step(len(flat)):
            rows_numba.head(array(flat), self.head_weight, logits.numpy())
        return logits.view(*hidden.shape[:-1], -1)

    def _rows(self, slots: Tensor, positions: Tensor) -> Arrays:
        """Tables, and slots, positions, cos, sin of the rows. Raises ValueError beyond the cache's capacity."""
        self.cache.reserve(int(positions.max()) + 1)
        where = positions.numpy()
        return self.cache.tables.numpy(), slots.numpy(), where, self.cos[where], self.sin[where]

    def _run(self, block: FusedBlock, x: np.ndarray, rows: Arrays) -> Tensor:
        """x [R, dim] through the block, in place -> the experts chosen [R, K]."""
        scale, heads = np.float32(self.model.layers["0"].self_attn.scale), self.model.mla.num_attention_heads
        rows_numba.attention(x, self.eps, *block.attention, block.cache, *rows, scale, heads)
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


def _fuse(block: Block, model: Transformer, cache: PagedCache) -> FusedBlock:
    mlp = block.mlp
    norm = array(block.post_attention_layernorm.weight)
    data = array(cache.data[block.layer])
    attention = (array(block.input_layernorm.weight), *_attention(block.self_attn))
    if not isinstance(mlp, MoeMlp):
        weights = (norm, array(mlp.gate_up_proj.weight), array(mlp.down_proj.weight))
        no_gate = (1, 1, 1, True, True, np.float32(1.0))
        return FusedBlock(attention=attention, mlp=weights, cache=data, choices=0, gate=no_gate)
    moe, shared = mlp.gate.moe, mlp.shared_experts
    bias = mlp.gate.e_score_correction_bias
    dim, dtype = model.spec.hidden_size, model.embed_tokens.weight.dtype
    tensors = (
        mlp.gate.weight,
        torch.zeros(moe.n_routed_experts) if bias is None else bias,
        mlp.experts.gate_up_proj,
        mlp.experts.down_proj,
        torch.empty(0, dim, dtype=dtype) if shared is None else shared.gate_up_proj.weight,
        torch.empty(dim, 0, dtype=dtype) if shared is None else shared.down_proj.weight,
    )
    weights = (norm, *(array(tensor) for tensor in tensors))
    return FusedBlock(attention=attention, mlp=weights, cache=data, choices=moe.num_experts_per_tok, gate=gate_of(moe))


def _attention(attention: MultiHeadLatentAttention) -> Arrays:
    if attention.mla.q_lora_rank is None:
        weight = attention.q_proj.weight
        queries = (weight.new_empty(0, weight.shape[1]), torch.empty(0), weight)
    else:
        queries = (attention.q_a_proj.weight, attention.q_a_layernorm.weight, attention.q_b_proj.weight)
    rest = (
        attention.kv_a_proj_with_mqa.weight,
        attention.kv_a_layernorm.weight,
        attention.kv_b_proj.weight,
        attention.o_proj.weight,
    )
    return tuple(array(tensor) for tensor in (*queries, *rest))


def gate_of(moe: Moe) -> tuple[int, int, int, bool, bool, np.float32]:
    """Groups, groups kept, scores that make a group's worth, sigmoid?, renormalised?, factor."""
    best = 2 if moe.topk_method == "noaux_tc" else 1
    is_sigmoid = moe.scoring_func == "sigmoid"
    return (moe.n_group, moe.topk_group, best, is_sigmoid, moe.norm_topk_prob, np.float32(moe.routed_scaling_factor))
