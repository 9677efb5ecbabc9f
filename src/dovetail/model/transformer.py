"""The whole network: embedding, pre-norm blocks, final norm, head, and MTP modules [V3 §2].

One readable program on one device. Ranks and pages are handed in: a `Dispatcher` says where experts live, a
`LatentCache` where earlier tokens' latents are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dovetail.cost.memory.stages import Stage
from dovetail.model.attention.causal import document_starts
from dovetail.model.attention.mla import Context, LatentCache
from dovetail.model.attention.rope import tables
from dovetail.model.block import Block
from dovetail.model.experts.gate import Gate, Routing
from dovetail.model.experts.mlp import DenseMlp
from dovetail.model.experts.moe import Dispatcher, Experts, LocalDispatcher
from dovetail.model.norm import RmsNorm
from dovetail.model.recompute import Recompute
from dovetail.numerics.linear import Linear
from dovetail.numerics.weight_gradients import WeightGradients
from dovetail.spec.model import Mla, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    hidden: Tensor  # [B, T, dim], after the final norm (of an MTP module: after its own); see `Transformer.run_stage`
    routings: list[Routing]  # one per MoE layer, in order


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
        x, routing = self.block(joined, context, dispatcher)
        return Output(hidden=self.norm(x), routings=[] if routing is None else [routing])

    def _both(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        return torch.cat((self.enorm(embedding), self.hnorm(hidden)), dim=-1)


class Transformer(nn.Module):
    """The whole network, or one stage of a pipeline: its layers, and the ends that stand with them.

    Tensors of a stage have the names that they have in the whole. The stage that has the head has the final norm and
    the MTP modules too; these (and a tied head) need the embedding, so that it has a copy of it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype = torch.bfloat16,
        dispatcher: Dispatcher | None = None,
        recompute: bool = False,
        stage: Stage | None = None,
    ) -> None:
        """Weights are allocated, not initialised: see `initialize`. `recompute`: see `model.recompute`."""
        super().__init__()
        if not isinstance(spec.attention, Mla):
            raise ValueError("grouped-query models are described for counting only; dovetail builds MLA models")
        stage = stage or whole(spec)
        self.spec = spec
        self.stage = stage
        self.mla = spec.attention
        self.dispatcher: Dispatcher = dispatcher or LocalDispatcher()
        self.recompute = recompute
        modules = stage.mtp_modules(spec)
        if stage.has_embedding or modules or (stage.has_head and spec.tie_word_embeddings):
            self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size, dtype=dtype)
        self.layers = nn.ModuleDict({str(layer): Block(spec, layer, dtype) for layer in stage.layers})
        if stage.has_head:
            self.norm = RmsNorm(spec.hidden_size, spec.rms_norm_eps)
            self.lm_head = None if spec.tie_word_embeddings else _head(spec, dtype)
        self.mtp = nn.ModuleList(Mtp(spec, spec.num_hidden_layers + k, dtype) for k in range(modules))

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
        return self.run_stage(tokens, self.context(tokens, positions, document_ids, cache, absorbed))

    def run_stage(self, x: Tensor, context: Context) -> Output:
        """The layers here on tokens [B, T] int64, or on the hidden states [B, T, dim] of the stage before -> hidden
        states [B, T, dim] for the stage after, or, where the head is, after the final norm.

        `context` is the same on all stages: `Transformer.context` of the micro-batch's tokens.
        """
        routings: list[Routing] = []
        if self.stage.has_embedding:
            x = self.embed_tokens(x)
        with _saving(context):
            for block in self.layers.values():
                x, routing = block(x, context, self.dispatcher)
                routings += [] if routing is None else [routing]
        return Output(hidden=self.norm(x) if self.stage.has_head else x, routings=routings)

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

    def put_off_weight_gradients(self, later: WeightGradients | None) -> None:
        """From now on a backward pass makes the gradients of inputs and norms, and leaves those of all other weights to
        `later.make()`; with None it makes them all again."""
        for module in self.modules():
            if isinstance(module, Linear | DenseMlp | Experts | Gate):
                module.later = later

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
        num_keys = 0
        if cache is not None:
            num_keys = int(positions.max()) + 1
            cache.reserve(num_keys)
        return Context(
            positions=positions,
            cos=cos,
            sin=sin,
            first=first,
            cache=cache,
            num_keys=num_keys,
            absorbed=absorbed,
            recompute=Recompute() if self.recompute else None,
        )


def _saving(context: Context) -> AbstractContextManager[object]:
    return nullcontext() if context.recompute is None else context.recompute.hooks()


def _head(spec: ModelSpec, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(spec.hidden_size, spec.vocab_size, bias=False, dtype=dtype)


def whole(spec: ModelSpec) -> Stage:
    """All of a model as the only stage."""
    return Stage(layers=tuple(range(spec.num_hidden_layers)), has_embedding=True, has_head=True)


@torch.no_grad()
def initialize(model: Transformer, seed: int, block: tuple[int, int] = (0, 1)) -> None:
    """Normal(0, initializer_range) for every matrix, ones for norms, zeros for gate biases [V3 §4.2].

    Drawn in FP32 in the order of the whole model's state dict: one seed gives one model in every dtype, up to rounding,
    and to each stage its part of it. `block` (i, n): of routed experts the i-th of n blocks is here.
    """
    generator = torch.Generator().manual_seed(seed)
    here = dict(model.named_parameters())
    for name, shape in _parameter_shapes(model, is_whole=model.stage == whole(model.spec) and block == (0, 1)):
        if name.endswith("norm.weight"):
            drawn = torch.ones(shape)
        else:
            drawn = torch.randn(shape, generator=generator, dtype=torch.float32).mul_(model.spec.initializer_range)
        if name in here:
            here[name].copy_(drawn if drawn.shape == here[name].shape else drawn.chunk(block[1])[block[0]])
    for name, buffer in model.named_buffers():
        assert name.endswith("e_score_correction_bias"), name
        buffer.zero_()


def _parameter_shapes(model: Transformer, is_whole: bool) -> Iterator[tuple[str, torch.Size]]:
    """Of the whole model, in order."""
    everything = model
    if not is_whole:
        with torch.device("meta"):
            everything = Transformer(model.spec)
    return ((name, parameter.shape) for name, parameter in everything.named_parameters())
