"""One transformer block, whole or in its four parts.

The parts are those between which exchanges stand [V3 §3.2.1]:

    attend     x + attention(norm(x)), its norm, and where the gate sends each token
    dispatch   tokens to the ranks of their experts        all-to-all; nothing in a dense block
    compute    routed experts on the rows that came, shared experts on the tokens here; or the dense feed-forward
    combine    results back to their tokens, summed        all-to-all; nothing in a dense block

`Block.forward` is the four in a row. A schedule that hides the exchanges of one micro-batch behind the arithmetic of
another, as DualPipe does, runs them one by one and cuts the autograd graph between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dovetail.model.attention.mla import Context, MultiHeadLatentAttention
from dovetail.model.experts.gate import Routing
from dovetail.model.experts.mlp import DenseMlp
from dovetail.model.experts.moe import Computed, Dispatched, Dispatcher, MoeMlp
from dovetail.model.norm import RmsNorm
from dovetail.spec.model import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Attended:
    """What `attend` hands on."""

    residual: Tensor  # [B, T, dim]: the block's input plus attention
    normed: Tensor  # [B, T, dim]: its norm, which the feed-forward takes
    routing: Routing | None  # of all B * T tokens; None in a dense block


class Block(nn.Module):
    """x + attention(norm(x)), then + feed_forward(norm(.))."""

    def __init__(self, spec: ModelSpec, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = RmsNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = MultiHeadLatentAttention(spec, dtype)
        self.post_attention_layernorm = RmsNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp: MoeMlp | DenseMlp
        if spec.is_moe_layer(layer):
            self.mlp = MoeMlp(spec, dtype)
        else:
            self.mlp = DenseMlp(spec.hidden_size, spec.intermediate_size, dtype)

    def forward(self, x: Tensor, context: Context, dispatcher: Dispatcher) -> tuple[Tensor, Routing | None]:
        """x [B, T, dim] -> the same shape, and where its tokens went; None in a dense block."""
        attended = self.attend(x, context)
        dispatched = self.dispatch(attended, dispatcher)
        computed = self.compute(attended, dispatched)
        return self.combine(attended, dispatched, computed, dispatcher), attended.routing

    def attend(self, x: Tensor, context: Context) -> Attended:
        residual = x + self.self_attn(context.again(self.input_layernorm, x), context, self.layer)
        normed = context.again(self.post_attention_layernorm, residual)
        routing = None if isinstance(self.mlp, DenseMlp) else self.mlp.gate(normed.flatten(0, -2))
        return Attended(residual=residual, normed=normed, routing=routing)

    def dispatch(self, attended: Attended, dispatcher: Dispatcher) -> Dispatched | None:
        if attended.routing is None:
            return None
        return dispatcher.dispatch(attended.normed.flatten(0, -2), attended.routing)

    def compute(self, attended: Attended, dispatched: Dispatched | None) -> Computed:
        if isinstance(self.mlp, DenseMlp):
            return Computed(rows=None, local=self.mlp(attended.normed))
        assert dispatched is not None
        return self.mlp.compute(attended.normed.flatten(0, -2), dispatched)

    def combine(
        self, attended: Attended, dispatched: Dispatched | None, computed: Computed, dispatcher: Dispatcher
    ) -> Tensor:
        if dispatched is None:
            assert computed.local is not None
            return attended.residual + computed.local
        assert isinstance(self.mlp, MoeMlp) and attended.routing is not None
        output = self.mlp.combine(computed, dispatched, attended.routing, dispatcher)
        return attended.residual + output.view_as(attended.residual)
