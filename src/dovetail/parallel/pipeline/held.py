"""One stage of the model on one rank: forward of a micro-batch, and its backward whole or in halves.

    F  runs the layers here, on hidden states that are cut off from the stage before; the last stage's loss too
    I  the gradient of the input, from that of the output; norms, embedding and head get theirs on the way
    W  the gradients of all other weights
    B  both

A stage adds the balance loss of its own layers to what it differentiates. Of a micro-batch it keeps what autograd saved
and its input, until B; after I what W needs. Gradients of micro-batches add up in FP32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dovetail.model.experts.gate import Routing
from dovetail.model.transformer import Output, Transformer
from dovetail.numerics.weight_gradients import WeightGradients
from dovetail.text.corpus import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What the last stage makes of a micro-batch's final hidden states."""

    loss: Tensor  # scalar, of all targets
    routings: Sequence[Routing]  # of the MTP modules
    report: object


@dataclass(frozen=True, slots=True, kw_only=True)
class Aims:
    """What a step differentiates: the sum of the loss at the end and of all layers' balance losses."""

    end: Callable[[Transformer, Output, Batch], Ended]
    balance: Callable[[Sequence[Routing], Batch], Tensor]  # scalar, with its coefficient, of layers' routings
    separate_documents: bool = False


@dataclass(slots=True, kw_only=True)
class Sums:
    """What the stages of a rank add up during a step."""

    gradients: dict[str, Tensor] = field(default_factory=dict)  # FP32, by the names that weights have in the whole
    counts: dict[int, Tensor] = field(default_factory=dict)  # [E] tokens per expert, by layer; MTP modules come last
    balances: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # by micro-batch and stage
    reports: dict[int, object] = field(default_factory=dict)  # by micro-batch


@dataclass(slots=True, kw_only=True)
class _Kept:
    """Of one micro-batch between its forward and its backward."""

    start: Tensor | None  # the input, whose gradient the stage before waits for
    roots: list[GradientEdge]
    grads: list[Tensor | None]  # of the roots; the hidden states' is still to come
    later: WeightGradients | None = None  # between I and W


class Held:
    """A stage during one step."""

    def __init__(self, number: int, model: Transformer, aims: Aims, sums: Sums) -> None:
        self.number, self.model, self.aims, self.sums = number, model, aims, sums
        self.kept: dict[int, _Kept] = {}
        self._later = WeightGradients()
        self._parameters = dict(model.named_parameters())
        spec, stage = model.spec, model.stage
        mtp = range(spec.num_hidden_layers, spec.num_hidden_layers + len(model.mtp))
        self._layers = [layer for layer in (*stage.layers, *mtp) if spec.is_moe_layer(layer)]

    def forward(self, microbatch: int, batch: Batch, x: Tensor | None, is_split: bool) -> Tensor | None:
        """Hidden states for the stage after, cut off; None at the last. x: those of the stage before; None at the
        first. `is_split`: whether the backward will come in halves."""
        model = self.model
        model.put_off_weight_gradients(self._later if is_split else None)
        tokens = batch.tokens[:, :-1].contiguous()
        ids = batch.document_ids[:, :-1] if self.aims.separate_documents else None
        start = None if x is None else x.detach().requires_grad_()
        output = model.run_stage(tokens if start is None else start, model.context(tokens, None, ids, None, False))
        routings, roots = list(output.routings), list[Tensor]()
        if model.stage.has_head:
            ended = self.aims.end(model, output, batch)
            routings += ended.routings
            roots.append(ended.loss)
            self.sums.reports[microbatch] = ended.report
        if routings:
            roots.append(self.aims.balance(routings, batch))
            self.sums.balances[microbatch, self.number] = roots[-1].detach()
        self._count(routings)
        grads = [torch.ones_like(root) for root in roots]
        if not model.stage.has_head:
            roots.append(output.hidden)
        # Edges of the graph, so that the tensor itself may go once it has been sent.
        edges = [get_gradient_edge(root) for root in roots]
        self.kept[microbatch] = _Kept(start=start, roots=edges, grads=list(grads))
        return None if model.stage.has_head else output.hidden.detach()

    def backward(self, microbatch: int, grad: Tensor | None, is_whole: bool) -> Tensor | None:
        """The gradient of the input, None at the first stage; weights put off are left to `weights` unless
        `is_whole`. grad: that of the output; None at the last stage."""
        kept = self.kept[microbatch]
        torch.autograd.backward(kept.roots, kept.grads if grad is None else [*kept.grads, grad])
        self._collect()
        found = None if kept.start is None else kept.start.grad
        if is_whole:
            del self.kept[microbatch]
        else:
            self.kept[microbatch] = _Kept(start=None, roots=[], grads=[], later=self._later.take())
        return found

    def weights(self, microbatch: int) -> None:
        """The gradients that the input half has put off."""
        later = self.kept.pop(microbatch).later
        assert later is not None
        later.make()
        self._collect()

    def _count(self, routings: Sequence[Routing]) -> None:
        counts = self.sums.counts
        for layer, routing in zip(self._layers, routings, strict=True):
            counts[layer] = counts[layer] + routing.counts if layer in counts else routing.counts

    def _collect(self) -> None:
        gradients = self.sums.gradients
        for name, parameter in self._parameters.items():
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                continue
            if name in gradients:
                gradients[name] += gradient
            else:
                gradients[name] = gradient.float()
