"""A layer of routed and shared experts, which drops no tokens [V3 eq 12].

The layer hands its tokens to a `Dispatcher`, runs the experts on the rows that come back, sorted by expert,
and hands the results over to be combined. Where the experts live is the dispatcher's business: `LocalDispatcher`
keeps all of them here; across ranks another one is handed in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dovetail.model.experts import moe_numba
from dovetail.model.experts.gate import Gate, Routing
from dovetail.model.experts.mlp import DenseMlp
from dovetail.model.experts.quantized_mlp import MlpPrecision, quantized_mlp
from dovetail.model.experts.swiglu import swiglu, swiglu_backward
from dovetail.numerics import capability
from dovetail.numerics.linear import Input
from dovetail.numerics.operands.sending import sent
from dovetail.numerics.products.grouped import dgrad, fprop, row_multiple, wgrad
from dovetail.numerics.weight_gradients import WeightGradients, now_or_later
from dovetail.spec.model import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatched:
    """Rows for the experts that live here, sorted by expert. `way_back` is the dispatcher's own: nobody else reads
    it."""

    rows: Tensor  # [R, dim]; rows of expert e are offsets[e] : offsets[e + 1], zero rows at each end
    offsets: list[int]  # [E + 1]
    way_back: object
    quantized: Input | None = None  # the same rows in the recipe's format, where they came over the wire in it


class Dispatcher(Protocol):
    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        """x [N, dim] -> rows of the experts that live here."""
        ...

    def combine(self, rows: Tensor, dispatched: Dispatched, routing: Routing) -> Tensor:
        """Expert outputs [R, dim] -> sum over choices of weight * output [N, dim]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """What the experts make of a block's tokens, before it is combined."""

    rows: Tensor | None  # [R, dim] of routed experts, in the order of the dispatched rows; None in a dense block
    local: Tensor | None  # [N, dim] of shared experts, or of the dense feed-forward: it needs no exchange


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """How rows and tokens belong together: the way back of `LocalDispatcher`."""

    row_ids: Tensor  # [N, K] int64: the row of each choice of each token; -1 where its expert is not here
    token_ids: Tensor  # [R] int64: the token of each row, -1 for padding


class LocalDispatcher:
    """All experts are here; each gets a multiple of `row_multiple` rows, by default what is fastest for them."""

    def __init__(self, row_multiple: int | None = None) -> None:
        self.row_multiple = row_multiple

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        multiple = self.row_multiple or row_multiple(x)
        offsets, row_ids, token_ids = plan_rows(routing.expert_ids, routing.counts, multiple)
        places = Places(row_ids=row_ids, token_ids=token_ids)
        return Dispatched(rows=spread(x, places), offsets=offsets, way_back=places)

    def combine(self, rows: Tensor, dispatched: Dispatched, routing: Routing) -> Tensor:
        assert isinstance(dispatched.way_back, Places)
        return weighted(rows, routing.weights, dispatched.way_back)


def plan_rows(ids: Tensor, counts: Tensor, multiple: int) -> tuple[list[int], Tensor, Tensor]:
    """Offsets [E + 1] rounded up to `multiple` rows per expert, row_ids [N, K], token_ids [R].

    ids [N, K] int64 are the experts of each token, -1 for a choice whose expert is not here; counts [E] int64.
    """
    padded = (counts + multiple - 1) // multiple * multiple
    ends = padded.cumsum(0)
    offsets = [0, *ends.tolist()]
    starts = ends - padded
    place = moe_numba.place if ids.device.type == "cpu" else place_reference
    return offsets, *place(ids, starts, offsets[-1])


def spread(x: Tensor, places: Places) -> Tensor:
    """x [N, dim] -> a row for each choice, zeros in padding [R, dim]."""
    if capability.on_cpu(x):
        return _Gather.apply(x, places.row_ids, places.token_ids)
    return gather_reference(x, places.token_ids)


def weighted(rows: Tensor, weights: Tensor, places: Places) -> Tensor:
    """rows [R, dim], weights [N, K] -> the sum over the choices that are here of weight * row [N, dim]."""
    if capability.on_cpu(rows):
        return _Combine.apply(rows, weights, places.row_ids, places.token_ids)
    return combine_reference(rows, weights, places.row_ids)


def gather(x: Tensor, token_ids: Tensor) -> Tensor:
    """The forward pass of `spread`, also of bytes: x [N, columns] of any type -> [R, columns]."""
    return moe_numba.gather(x.contiguous(), token_ids) if x.device.type == "cpu" else gather_reference(x, token_ids)


def summed(rows: Tensor, row_ids: Tensor) -> Tensor:
    """The backward pass of `spread`: rows [R, dim] -> the sum of each token's [N, dim], in FP32, rounded once."""
    ones = torch.ones(row_ids.shape, dtype=torch.float32, device=rows.device)
    if capability.on_cpu(rows):
        return moe_numba.combine(rows.contiguous(), ones, row_ids)
    return combine_reference(rows, ones, row_ids)


def place_reference(ids: Tensor, starts: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """row_ids [N, K] and token_ids [num_rows]: rows of expert e from starts[e] on, in the order of tokens."""
    flat = ids.flatten()
    counts = torch.bincount(flat[flat >= 0], minlength=len(starts))
    order = flat.argsort(stable=True)[flat.numel() - int(counts.sum()) :]  # without those of -1, which come first
    exclusive = counts.cumsum(0) - counts
    expert_of = flat[order]
    rows = torch.arange(order.numel(), device=ids.device) - exclusive[expert_of] + starts[expert_of]
    row_ids = torch.full_like(flat, -1).scatter_(0, order, rows).view_as(ids)
    token_ids = torch.full((num_rows,), -1, device=ids.device).scatter_(0, rows, order // ids.shape[1])
    return row_ids, token_ids


def gather_reference(x: Tensor, token_ids: Tensor) -> Tensor:
    return x[token_ids.clamp(min=0)] * (token_ids >= 0)[:, None]


def combine_reference(rows: Tensor, weights: Tensor, row_ids: Tensor) -> Tensor:
    """Summed in FP32, rounded once."""
    chosen = rows[row_ids.clamp(min=0)].masked_fill((row_ids < 0)[..., None], 0)
    return (chosen.to(weights.dtype) * weights[..., None]).sum(dim=1).to(rows.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, row_ids: Tensor, token_ids: Tensor) -> Tensor:
        ctx.save_for_backward(row_ids)
        return gather(x, token_ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (row_ids,) = ctx.saved_tensors
        return summed(grad, row_ids), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, row_ids: Tensor, token_ids: Tensor) -> Tensor:
        rows, weights = rows.contiguous(), weights.contiguous()
        ctx.save_for_backward(rows, weights, row_ids, token_ids)
        return moe_numba.combine(rows, weights, row_ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weights, row_ids, token_ids = ctx.saved_tensors
        return *moe_numba.combine_backward(grad.contiguous(), rows, weights, row_ids, token_ids), None, None


class Experts(nn.Module):
    """The weights of all routed experts, stacked; rows sorted by expert go through them."""

    def __init__(self, num_experts: int, dim: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, dim, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, width, dtype=dtype))
        self.precision: MlpPrecision | None = None  # BF16 or FP32 until a recipe says otherwise
        self.later: WeightGradients | None = None

    def forward(self, rows: Tensor, offsets: list[int], quantized: Input | None = None) -> Tensor:
        """rows [R, dim] -> [R, dim]. `quantized`: the same rows as the recipe's input, where they are that already."""
        if self.precision is None:
            return _Experts.apply(rows, self.gate_up_proj, self.down_proj, offsets, self.later)
        return quantized_mlp(rows, self.gate_up_proj, self.down_proj, offsets, self.precision, quantized, self.later)


class _Experts(torch.autograd.Function):
    """Grouped GEMM, SwiGLU, grouped GEMM; keeps the rows and the SwiGLU's input."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, gate_up: Tensor, down: Tensor, offsets: list[int], later: WeightGradients | None
    ) -> Tensor:
        hidden = fprop(rows, gate_up, offsets)
        ctx.save_for_backward(rows, gate_up, down, hidden)
        ctx.offsets, ctx.parameters, ctx.later = offsets, (gate_up, down), later
        return fprop(swiglu(hidden), down, offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        rows, gate_up, down, hidden = ctx.saved_tensors
        grad, offsets = grad.contiguous(), ctx.offsets
        grad_hidden, act = swiglu_backward(dgrad(grad, down, offsets), hidden)
        grad_down = now_or_later(ctx.later, ctx.parameters[1], lambda: wgrad(grad, act, offsets))
        grad_gate_up = now_or_later(ctx.later, ctx.parameters[0], lambda: wgrad(grad_hidden, rows, offsets))
        return dgrad(grad_hidden, gate_up, offsets), grad_gate_up, grad_down, None, None


class MoeMlp(nn.Module):
    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        super().__init__()
        moe = spec.moe
        assert moe is not None
        self.gate = Gate(spec.hidden_size, moe)
        self.experts = Experts(moe.n_routed_experts, spec.hidden_size, moe.moe_intermediate_size, dtype)
        shared_width = moe.n_shared_experts * moe.moe_intermediate_size
        self.shared_experts = DenseMlp(spec.hidden_size, shared_width, dtype) if shared_width else None
        self.expert_output: str | None = None  # a format of `numerics.operands.sending`, where a recipe has one

    def forward(self, x: Tensor, dispatcher: Dispatcher) -> tuple[Tensor, Routing]:
        """x [..., dim] -> the same shape, and where its tokens went."""
        tokens = x.flatten(0, -2)
        routing = self.gate(tokens)
        dispatched = dispatcher.dispatch(tokens, routing)
        computed = self.compute(tokens, dispatched)
        return self.combine(computed, dispatched, routing, dispatcher).view_as(x), routing

    def compute(self, tokens: Tensor, dispatched: Dispatched) -> Computed:
        """Routed experts on the dispatched rows, shared experts on tokens [N, dim]."""
        rows = self.experts(dispatched.rows, dispatched.offsets, dispatched.quantized)
        if self.expert_output is not None:
            rows = sent(rows, self.expert_output)
        return Computed(rows=rows, local=None if self.shared_experts is None else self.shared_experts(tokens))

    def combine(self, computed: Computed, dispatched: Dispatched, routing: Routing, dispatcher: Dispatcher) -> Tensor:
        """[N, dim]: the weighted sum of each token's routed experts, plus its shared ones."""
        assert computed.rows is not None
        output = dispatcher.combine(computed.rows, dispatched, routing)
        return output if computed.local is None else output + computed.local
