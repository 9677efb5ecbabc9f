"""The weights of a model as the CPU kernels take them: views of its tensors, which must stay put."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dovetail.model.attention.mla import MultiHeadLatentAttention
from dovetail.model.block import Block
from dovetail.model.experts.moe import MoeMlp
from dovetail.model.precision import has_recipe
from dovetail.model.transformer import Transformer
from dovetail.numerics.cpu.kernels import array
from dovetail.numerics.cpu.sharing import Sharing
from dovetail.spec.model import Moe

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedBlock:
    """Views of one block's tensors in the order the kernels take them."""

    layer: int
    attention: Arrays
    expansion: Tensor  # kv_b_proj, which `attention` has too
    mlp: Arrays
    choices: int  # experts per token; 0 for a dense block
    gate: tuple[int, int, int, bool, bool, np.float32]


class Head:
    """Logits of hidden states, by `product` of rows [R, dim] and weights [vocab, dim] -> [R, vocab] FP32."""

    def __init__(self, model: Transformer, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.weight, self.product, self.sharing = model.head_weight.detach(), product, Sharing()

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., dim] -> [..., vocab] FP32."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        with self.sharing.of_step(len(flat)):
            logits = self.product(flat, self.weight)
        return logits.view(*hidden.shape[:-1], len(self.weight))


def takes(model: Transformer) -> bool:
    """Whether the kernels compute what the model's layers do. They know nothing of a recipe, and
    `row_experts_numba.route_row` takes any gate but sigmoid for softmax."""
    moe = model.spec.moe
    has_gate = moe is None or moe.scoring_func in ("sigmoid", "softmax")
    return has_gate and not has_recipe(model)


def fuse(block: Block, model: Transformer) -> FusedBlock:
    mlp = block.mlp
    choices, gate = 0, (1, 1, 1, True, True, np.float32(1.0))
    tensors: tuple[Tensor, ...]
    if isinstance(mlp, MoeMlp):
        choices, gate = mlp.gate.moe.num_experts_per_tok, gate_of(mlp.gate.moe)
        tensors = _experts(mlp, model)
    else:
        tensors = mlp.gate_up_proj.weight, mlp.down_proj.weight
    return FusedBlock(
        layer=block.layer,
        attention=(array(block.input_layernorm.weight), *_attention(block.self_attn)),
        expansion=block.self_attn.kv_b_proj.weight.detach(),
        mlp=tuple(array(tensor) for tensor in (block.post_attention_layernorm.weight, *tensors)),
        choices=choices,
        gate=gate,
    )


def _experts(mlp: MoeMlp, model: Transformer) -> tuple[Tensor, ...]:
    moe, shared = mlp.gate.moe, mlp.shared_experts
    bias = mlp.gate.e_score_correction_bias
    dim, dtype = model.spec.hidden_size, model.embed_tokens.weight.dtype
    return (
        mlp.gate.weight,
        torch.zeros(moe.n_routed_experts) if bias is None else bias,
        mlp.experts.gate_up_proj,
        mlp.experts.down_proj,
        torch.empty(0, dim, dtype=dtype) if shared is None else shared.gate_up_proj.weight,
        torch.empty(dim, 0, dtype=dtype) if shared is None else shared.down_proj.weight,
    )


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
