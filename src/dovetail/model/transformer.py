"""The whole network: embedding, pre-norm blocks, final norm, head, and the MTP modules [V3 §2].

One readable program on one device. Ranks and pages are handed in: a `Dispatcher` says where experts live, a
`LatentCache` where earlier tokens' latents are.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dovetail.model.attention.causal import document_starts
from dovetail.model.attention.mla import Context, LatentCache, MultiHeadLatentAttention
from dovetail.model.attention.rope import tables
from dovetail.model.experts.gate import Routing
from dovetail.model.experts.mlp import DenseMlp
from dovetail.model.experts.moe import Dispatcher, LocalDispatcher, MoeMlp
from dovetail.model.norm import RmsNorm
from dovetail.model.recompute import Recompute
from dovetail.numerics.linear import Linear
from dovetail.spec.model import Mla, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    hidden: Tensor  # [B, T, dim], after the final norm (of the MTP module: after its own)
    routings: list[Routing]  # one per MoE layer, in order


class Block(nn.Module):
    """x + attention(norm(x)), then + mlp(norm(.))."""

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

    def forward(self, x: Tensor, context: Context, dispatcher: Dispatcher, routings: list[Routing]) -> Tensor:
        x = x + self.self_attn(context.again(self.input_layernorm, x), context, self.layer)
        normed = context.again(self.post_attention_layernorm, x)
        if isinstance(self.mlp, DenseMlp):
            return x + self.mlp(normed)
        output, routing = self.mlp(normed, dispatcher)
        routings.append(routing)
        return x + output


class Mtp(nn.Module):
    """One multi-token prediction module [V3 eqs 21-23].

    The contract, each point of which released weights rely on: `hidden` is the main model's output after its
    final norm (or the previous module's output after its own); eh_proj takes [embedding; hidden], although the
    paper writes them the other way round; the module's own norm comes before the shared head; position i takes
    the embedding of token i + 1 and predicts token i + 2; embedding and head are the main model's.
    """

    def __init__(self, spec: ModelSpec, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        dim, eps = spec.hidden_size, spec.rms_norm_eps
        self.enorm = RmsNorm(dim, eps)
        self.hnorm = RmsNorm(dim, eps)
        self.eh_proj = Linear(2 * dim, dim, dtype)
        self.block = Block(spec, layer, dtype)
        self.norm = RmsNorm(dim, eps)

    def forward(self, hidden: Tensor, embedding: Tensor, context: Context, dispatcher: Dispatcher) -> Output:
        joined = self.eh_proj(context.again(self._both, hidden, embedding))
        routings: list[Routing] = []
        return Output(hidden=self.norm(self.block(joined, context, dispatcher, routings)), routings=routings)

    def _both(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        return torch.cat((self.enorm(embedding), self.hnorm(hidden)), dim=-1)


class Transformer(nn.Module):
    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype = torch.bfloat16,
        dispatcher: Dispatcher | None = None,
        recompute: bool = False,
    ) -> None:
        """Weights are allocated, not initialised: see `initialize`. `recompute`: see `model.recompute`."""
        super().__init__()
        if not isinstance(spec.attention, Mla):
            raise ValueError("grouped-query models are described for counting only; dovetail builds MLA models")
        self.spec = spec
        self.mla = spec.attention
        self.dispatcher: Dispatcher = dispatcher or LocalDispatcher()
        self.recompute = recompute
        layers = spec.num_hidden_layers
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(Block(spec, i, dtype) for i in range(layers))
        self.norm = RmsNorm(spec.hidden_size, spec.rms_norm_eps)
        self.lm_head = None if spec.tie_word_embeddings else _head(spec, dtype)
        self.mtp = nn.ModuleList(Mtp(spec, layers + k, dtype) for k in range(spec.num_nextn_predict_layers))

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: LatentCache | None = None,
        absorbed: bool = False,
    ) -> Output:
        """tokens [B, T] int64 -> hidden [B, T, dim].

        positions [B, T] default to 0 .. T-1; document_ids [B, T] keep packed documents apart (training only);
        `absorbed` chooses the decoding form of attention.
        """
        context = self.context(tokens, positions, document_ids, cache, absorbed)
        routings: list[Routing] = []
        x = self.embed_tokens(tokens)
        with _saving(context):
            for block in self.layers:
                x = block(x, context, self.dispatcher, routings)
        return Output(hidden=self.norm(x), routings=routings)

    def mtp_forward(
        self,
        depth: int,
        hidden: Tensor,
        next_tokens: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: LatentCache | None = None,
        absorbed: bool = False,
    ) -> Output:
        """MTP module `depth` (0 first) on hidden [B, T, dim] and the token after each position [B, T]."""
        context = self.context(next_tokens, positions, document_ids, cache, absorbed)
        with _saving(context):
            output: Output = self.mtp[depth](hidden, self.embed_tokens(next_tokens), context, self.dispatcher)
        return output

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., dim] -> [..., vocab] FP32."""
        return F.linear(hidden, self.head_weight).float()

    @property
    def head_weight(self) -> Tensor:
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def context(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        document_ids: Tensor | None,
        cache: LatentCache | None,
        absorbed: bool,
    ) -> Context:
        if document_ids is not None and (cache is not None or absorbed):
            raise ValueError("document_ids keep documents apart in training; with a cache give one document per row")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        cos, sin = tables(self.spec, self.mla.qk_rope_head_dim, positions)
        first = None if document_ids is None else document_starts(document_ids)
        return Context(
            positions=positions,
            cos=cos,
            sin=sin,
            first=first,
            cache=cache,
            absorbed=absorbed,
            recompute=Recompute() if self.recompute else None,
        )


def _saving(context: Context) -> AbstractContextManager[object]:
    return nullcontext() if context.recompute is None else context.recompute.hooks()


def _head(spec: ModelSpec, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(spec.hidden_size, spec.vocab_size, bias=False, dtype=dtype)


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Normal(0, initializer_range) for every matrix, ones for norms, zeros for gate biases [V3 §4.2].

    Drawn in FP32 in the order of the state dict, so one seed gives one model in every dtype, up to rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        else:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_(drawn.mul_(model.spec.initializer_range))
    for name, buffer in model.named_buffers():
        assert name.endswith("e_score_correction_bias"), name
        buffer.zero_()
