"""What ranks do in the tests of dispatch, and what one process does instead."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dovetail.catalog.precision import load_recipe
from dovetail.model.experts.gate import Routing
from dovetail.model.experts.moe import Dispatcher, Experts, LocalDispatcher, MoeMlp, Places, combine_reference
from dovetail.model.precision import apply_recipe
from dovetail.model.transformer import Transformer, initialize
from dovetail.parallel.experts import dispatch
from dovetail.parallel.experts.dispatch import OneHop, TwoHop
from dovetail.parallel.experts.formats import Back, formats_of
from dovetail.parallel.experts.wire import Wire
from dovetail.parallel.mesh import Mesh, form_mesh
from dovetail.parallel.part import gather_whole, take_part
from dovetail.spec.layout import Layout
from dovetail.spec.model import ModelSpec

EXPERTS, CHOICES, DIM, WIDTH = 16, 4, 24, 16
DISPATCHERS: dict[str, Callable[..., OneHop | TwoHop]] = {"one": OneHop, "two": TwoHop}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Tokens of all ranks, rank by rank, and where they go."""

    hops: str
    ep: int
    ranks_per_node: int
    tokens: tuple[int, ...]  # of each rank
    x: Tensor  # [N, dim]
    ids: Tensor  # [N, K]
    weights: Tensor  # [N, K] FP32
    grad: Tensor  # [N, dim] of the output
    gate_up: Tensor  # [E, 2 width, dim]
    down: Tensor  # [E, dim, width]
    recipe: str = "bf16"
    back: Back = "bf16"
    is_checked: bool = False
    in_parts: bool = False  # the graph is cut around the experts, as schedules do that hide exchanges
    twin: str = ""  # what is broken

    def part(self, first: int, last: int) -> Case:
        """That of ranks first .. last - 1."""
        start, stop = sum(self.tokens[:first]), sum(self.tokens[:last])
        cut = {name: getattr(self, name)[start:stop] for name in ("x", "ids", "weights", "grad")}
        return replace(self, tokens=self.tokens[first:last], **cut)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    output: Tensor
    x: Tensor  # gradients
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    nic: int = 0  # bytes sent
    node: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactSum:
    value: Tensor  # FP64
    size: Tensor  # the sum of the terms' sizes

    def error(self, actual: Tensor) -> float:
        """The largest error, as a share of the size of the terms."""
        if actual.numel() == 0:
            return 0.0
        return float(((actual.double() - self.value).abs() / self.size.clamp(min=1e-300)).max())


@dataclass(frozen=True, slots=True, kw_only=True)
class Alone:
    """What `LocalDispatcher` makes of a case, and the exact sums of the rows that its experts made."""

    result: Result
    output: ExactSum
    x: ExactSum  # the gradient


def case(seed: int, hops: str, mesh: tuple[int, int], dtype: torch.dtype, **changes: object) -> Case:
    """Ragged tokens, none on one rank in three cases of four; choices in two of four groups, or all over the place; in
    half of the cases the graph is cut around the experts."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tokens = torch.randint(0, 20, (4,), generator=generator)
    if seed % 4:
        tokens[seed % 3] = 0
    scores = normal(int(tokens.sum()), EXPERTS)
    scores[:, seed % EXPERTS] = -99.0  # nobody chooses this one
    if seed % 2:
        groups = scores.view(-1, 4, EXPERTS // 4)
        left_out = normal(len(scores), 4).topk(2).indices
        groups.scatter_(1, left_out[..., None].expand(-1, -1, EXPERTS // 4), -99.0)
    settings = {
        "hops": hops,
        "in_parts": seed % 4 > 1,
        "ep": mesh[0],
        "ranks_per_node": mesh[1],
        "tokens": tuple(tokens.tolist()),
        "x": normal(len(scores), DIM).to(dtype),
        "ids": scores.topk(CHOICES).indices,
        "weights": normal(len(scores), CHOICES).abs(),
        "grad": normal(len(scores), DIM).to(dtype),
        "gate_up": (0.3 * normal(EXPERTS, 2 * WIDTH, DIM)).to(dtype),
        "down": (0.3 * normal(EXPERTS, DIM, WIDTH)).to(dtype),
    }
    return Case(**{**settings, **changes})


def joined(results: Sequence[Result], name: str) -> Tensor:
    return torch.cat([getattr(each, name) for each in results])


def counts_of(hops: str, others: int) -> int:
    """Bytes of the counts for `others` ranks: of each of their experts, or of copies for the rank and for its node."""
    return 8 * others * (EXPERTS // 4 if hops == "one" else 2)


@functools.cache
def mesh_of(ep: int, ranks_per_node: int, is_checked: bool = False) -> Mesh:
    return form_mesh(Layout(dp=dist.get_world_size(), ep=ep), ranks_per_node, is_checked)


def try_mesh(layouts: list[Layout], ranks_per_node: list[int]) -> str:
    """The message with which `form_mesh` refuses what this rank was given."""
    try:
        form_mesh(layouts[dist.get_rank()], ranks_per_node[dist.get_rank()])
    except ValueError as error:
        return str(error)
    return ""


def hang() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)
    dist.barrier()


def sent_and_gathered() -> list[bool]:
    """Whether each group of the mesh has the ranks that it says, by its own collectives."""
    mesh, piped, found = mesh_of(4, 2), form_mesh(Layout(pp=2, dp=2), 2), []
    for group in (mesh.pp, mesh.dp, mesh.ep, mesh.edp, mesh.node, mesh.rail, piped.pp):
        ranks = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size)]
        dist.all_gather(ranks, torch.tensor([mesh.rank]), group=group.handle)
        found.append(tuple(int(rank) for rank in ranks) == group.ranks)
    return found


def on_ranks(cases: list[Case]) -> list[Result]:
    """This rank's part of each."""
    return [_on_rank(case) for case in cases]


def _on_rank(case: Case) -> Result:
    mesh = mesh_of(case.ep, case.ranks_per_node, case.is_checked)
    own = case.part(mesh.rank, mesh.rank + 1)
    block = slice(*(len(case.down) // case.ep * (mesh.ep.index + end) for end in (0, 1)))
    own = replace(own, gate_up=case.gate_up[block], down=case.down[block])
    dispatcher = DISPATCHERS[case.hops](mesh, formats_of(load_recipe(case.recipe), case.back))
    with BROKEN.get(case.twin, nullcontext)():
        result = (run_in_parts if case.in_parts else run)(own, dispatcher, len(case.down))
    return replace(result, nic=dispatcher.traffic.nic, node=dispatcher.traffic.node)


def on_one(cases: list[Case]) -> list[list[Alone]]:
    """What one process makes of the tokens of each ep group: rank 0 does it."""
    if dist.get_rank() > 0:
        return []
    return [
        [alone(case.part(first, first + case.ep)) for first in range(0, len(case.tokens), case.ep)] for case in cases
    ]


def routing_of(case: Case, experts: int) -> Routing:
    counts = torch.bincount(case.ids.flatten(), minlength=experts)
    return Routing(
        expert_ids=case.ids, weights=case.weights.clone().requires_grad_(), scores=case.weights, counts=counts
    )


def run(case: Case, dispatcher: Dispatcher, experts: int) -> Result:
    x, routing, layer = case.x.clone().requires_grad_(), routing_of(case, experts), layer_of(case)
    dispatched = dispatcher.dispatch(x, routing)
    rows = layer(dispatched.rows, dispatched.offsets, dispatched.quantized)
    output = dispatcher.combine(rows, dispatched, routing)
    leaves = (x, routing.weights, layer.gate_up_proj, layer.down_proj)
    x_grad, weights, gate_up, down = torch.autograd.grad(output, leaves, case.grad)
    return Result(output=output.detach(), x=x_grad, weights=weights, gate_up=gate_up, down=down)


def run_in_parts(case: Case, dispatcher: Dispatcher, experts: int) -> Result:
    x, routing, layer = case.x.clone().requires_grad_(), routing_of(case, experts), layer_of(case)
    dispatched = dispatcher.dispatch(x, routing)
    rows = dispatched.rows.detach().requires_grad_()
    made = layer(rows, dispatched.offsets, dispatched.quantized)
    sent = made.detach().requires_grad_()
    output = dispatcher.combine(sent, dispatched, routing)
    sent_grad, weights = torch.autograd.grad(output, (sent, routing.weights), case.grad)
    rows_grad, gate_up, down = torch.autograd.grad(made, (rows, layer.gate_up_proj, layer.down_proj), sent_grad)
    (x_grad,) = torch.autograd.grad(dispatched.rows, x, rows_grad)
    return Result(output=output.detach(), x=x_grad, weights=weights, gate_up=gate_up, down=down)


def layer_of(case: Case) -> Experts:
    layer = Experts(len(case.down), case.x.shape[1], case.down.shape[2], case.x.dtype)
    layer.gate_up_proj.data, layer.down_proj.data = case.gate_up.clone(), case.down.clone()
    apply_recipe(layer, load_recipe(case.recipe))
    return layer


def alone(case: Case) -> Alone:
    x, routing, layer = case.x.clone().requires_grad_(), routing_of(case, len(case.down)), layer_of(case)
    dispatched = LocalDispatcher().dispatch(x, routing)
    rows = layer(dispatched.rows, dispatched.offsets)
    output = LocalDispatcher().combine(rows, dispatched, routing)
    (grad,) = torch.autograd.grad(output, dispatched.rows, case.grad)
    assert isinstance(dispatched.way_back, Places)
    row_ids = dispatched.way_back.row_ids
    return Alone(
        result=run(case, LocalDispatcher(), len(case.down)),
        output=exact_sum(rows.detach(), case.weights, row_ids),
        x=exact_sum(grad, torch.ones_like(case.weights), row_ids),
    )


def exact_sum(rows: Tensor, weights: Tensor, row_ids: Tensor) -> ExactSum:
    rows, weights = rows.double(), weights.double()
    return ExactSum(
        value=combine_reference(rows, weights, row_ids), size=combine_reference(rows.abs(), weights.abs(), row_ids)
    )


# ---- A whole layer, with its gate ----


def layer_on_ranks(
    spec: ModelSpec, hops: str, shape: tuple[int, int], tokens: tuple[int, ...], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Output and gradients of one process with all tokens, on rank 0, and those of this rank; shape is ep and ranks per
    node."""
    mesh = mesh_of(*shape)
    assert spec.moe is not None
    generator = torch.Generator().manual_seed(0)
    layer = MoeMlp(spec, dtype)
    for parameter in layer.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.3).to(parameter.dtype)
    x = torch.randn(sum(tokens), spec.hidden_size, generator=generator).to(dtype)
    grad = torch.randn(x.shape, generator=generator).to(dtype)
    alone = _gradients(layer, x, grad, LocalDispatcher()) if mesh.rank == 0 else {}
    start = sum(tokens[: mesh.rank])
    stop = start + tokens[mesh.rank]
    each = spec.moe.n_routed_experts // mesh.ep.size
    for name in ("gate_up_proj", "down_proj"):
        parameter = getattr(layer.experts, name)
        parameter.data = parameter.data[each * mesh.ep.index : each * (mesh.ep.index + 1)].clone()
    return alone, _gradients(layer, x[start:stop], grad[start:stop], DISPATCHERS[hops](mesh))


def _gradients(layer: MoeMlp, x: Tensor, grad: Tensor, dispatcher: Dispatcher) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    output, _ = layer(x, dispatcher)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    found = torch.autograd.grad(output, (x, *parameters), grad)
    return {"output": output.detach(), **dict(zip(("x", *names), found, strict=True))}


# ---- A whole model ----


def model_on_ranks(
    spec: ModelSpec, hops: str, shape: tuple[int, int], tokens: Tensor
) -> tuple[tuple[Tensor, dict[str, Tensor]] | None, tuple[Tensor, dict[str, Tensor]], bool]:
    """On rank 0: loss and gradients of one process on tokens [ranks, B, T], the same by all ranks, and whether weights
    that were cut and gathered are those that were."""
    mesh = mesh_of(*shape)
    model = Transformer(spec, torch.float32)
    initialize(model, 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alone = _loss_and_gradients(model, tokens.flatten(0, 1), tokens.numel()) if mesh.rank == 0 else None
    dist.barrier()  # one rank has compiled the kernels for all
    take_part(model, mesh, DISPATCHERS[hops](mesh))
    loss, gradients = _loss_and_gradients(model, tokens[mesh.rank], tokens.numel())
    dist.all_reduce(loss, group=mesh.dp.handle)
    for name, gradient in gradients.items():
        dist.all_reduce(gradient, group=(mesh.edp if ".experts." in name else mesh.dp).handle)
    after = gather_whole(model, mesh, model.state_dict())
    is_same = before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    return alone, (loss, gather_whole(model, mesh, gradients)), is_same


def _loss_and_gradients(model: Transformer, tokens: Tensor, total: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Of the next token, as this part of the mean over `total` tokens."""
    logits = model.logits(model(tokens).hidden)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, dims=1).flatten(), reduction="sum") / total
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return loss.detach(), dict(zip(names, gradients, strict=True))


# ---- Twins with a fault each ----


@contextmanager
def _sent_twice() -> Iterator[None]:
    """Every row goes over a wire twice, and the second is thrown away."""
    exchange = Wire._exchange

    def twice(self: Wire, rows: Tensor, given: list[int], taken: list[int], operation: str) -> Tensor:
        doubled = [2 * count for count in given], [2 * count for count in taken]
        return exchange(self, rows.repeat_interleave(2, dim=0), *doubled, operation)[::2]

    with patch.object(Wire, "_exchange", twice):
        yield


@contextmanager
def _summed_in_bf16() -> Iterator[None]:
    def weighted(rows: Tensor, weights: Tensor, places: Places) -> Tensor:
        total = torch.zeros(len(weights), rows.shape[1], dtype=rows.dtype)
        for row_ids, weight in zip(places.row_ids.t(), weights.t(), strict=True):
            is_here = row_ids >= 0
            total[is_here] += (weight[is_here, None] * rows[row_ids[is_here]]).to(rows.dtype)
        return total

    with patch.object(dispatch, "weighted", weighted):
        yield


BROKEN = {"sent twice": _sent_twice, "summed in BF16": _summed_in_bf16}
