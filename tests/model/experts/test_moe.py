"""Dispatch, experts, combine: kernels against references, and the layer against a loop over tokens."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.model.experts.gate import Routing
from dovetail.model.experts.moe import (
    Experts,
    LocalDispatcher,
    MoeMlp,
    Places,
    combine_reference,
    gather_reference,
    place_reference,
    plan_rows,
    spread,
    summed,
    weighted,
)
from dovetail.numerics.formats.errors import normwise_error, rowwise_error, tolerance
from dovetail.spec.model import ModelSpec

Draw = Callable[..., Tensor]
SpecFactory = Callable[..., ModelSpec]
# tokens, choices, experts, dim
SHAPES = [(0, 2, 4, 24), (1, 1, 1, 24), (1, 3, 8, 5), (37, 2, 4, 70), (130, 4, 16, 24)]
NO_TOKENS, SOME = SHAPES[0], SHAPES[3]


def routing_for(tokens: int, choices: int, experts: int, draw: Draw) -> Routing:
    """Each token to different experts; the last expert gets none where there is a choice."""
    scores = draw(tokens, experts)
    if experts > choices:
        scores[:, -1] = -9.0
    ids = scores.topk(choices, dim=1).indices
    counts = torch.bincount(ids.flatten(), minlength=experts)
    return Routing(expert_ids=ids, weights=draw(tokens, choices).abs(), scores=scores, counts=counts)


@pytest.mark.parametrize("multiple", [1, 32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plan_gives_every_choice_a_row_of_its_expert(shape: tuple[int, ...], multiple: int, draw: Draw) -> None:
    tokens, choices, experts, _ = shape
    routing = routing_for(tokens, choices, experts, draw)
    offsets, row_ids, token_ids = plan_rows(routing.expert_ids, routing.counts, multiple)
    sizes = [stop - start for start, stop in itertools.pairwise(offsets)]
    assert all(
        size % multiple == 0 and 0 <= size - count < multiple for size, count in zip(sizes, routing.counts, strict=True)
    )
    rows = row_ids.flatten()
    assert len(rows.unique()) == tokens * choices
    assert torch.equal(token_ids[rows], torch.arange(tokens).repeat_interleave(choices))
    assert (token_ids == -1).sum() == offsets[-1] - tokens * choices
    starts, ends = torch.tensor(offsets[:-1])[routing.expert_ids], torch.tensor(offsets[1:])[routing.expert_ids]
    assert ((row_ids >= starts) & (row_ids < ends)).all()


@pytest.mark.parametrize("is_part", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_placing_is_the_reference(shape: tuple[int, ...], is_part: bool, draw: Draw) -> None:
    tokens, choices, experts, _ = shape
    ids, multiple = routing_for(tokens, choices, experts, draw).expert_ids, 4
    if is_part:
        ids = ids.masked_fill(ids % 2 == 0, -1)  # experts that live elsewhere
    counts = torch.bincount(ids[ids >= 0], minlength=experts)
    offsets, row_ids, token_ids = plan_rows(ids, counts, multiple)
    starts = torch.tensor(offsets[:-1])
    for ours, theirs in zip((row_ids, token_ids), place_reference(ids, starts, offsets[-1]), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(row_ids < 0, ids < 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choices_that_live_elsewhere_count_as_none(dtype: torch.dtype, draw: Draw) -> None:
    ids = routing_for(37, 4, 16, draw).expert_ids
    ids = ids.masked_fill(ids % 2 == 0, -1)
    offsets, row_ids, token_ids = plan_rows(ids, torch.bincount(ids[ids >= 0], minlength=16), 8)
    places = Places(row_ids=row_ids, token_ids=token_ids)
    x, weights = draw(37, 24, dtype=dtype).requires_grad_(), draw(37, 4).requires_grad_()
    rows = spread(x, places)
    assert torch.equal(rows, gather_reference(x, token_ids))
    leaf, grad = rows.detach().requires_grad_(), draw(37, 24, dtype=dtype)
    output = weighted(leaf, weights, places)
    wide = rows.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    truth = combine_reference(*wide, row_ids)
    assert normwise_error(output, truth) < tolerance(dtype, terms=4)
    ours = torch.autograd.grad(output, (leaf, weights), grad)
    theirs = torch.autograd.grad(truth, wide, grad.double())
    assert normwise_error(ours[0], theirs[0]) < tolerance(dtype)
    assert normwise_error(ours[1], theirs[1]) < tolerance(torch.float32, terms=24)
    assert not ours[1][ids < 0].any()
    sums = combine_reference(rows.detach().double(), torch.ones(37, 4).double(), row_ids)
    assert normwise_error(summed(rows.detach(), row_ids), sums) < tolerance(dtype, terms=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather_is_the_reference(shape: tuple[int, ...], dtype: torch.dtype, draw: Draw) -> None:
    tokens, choices, experts, dim = shape
    routing = routing_for(tokens, choices, experts, draw)
    x = draw(tokens, dim, dtype=dtype).requires_grad_()
    dispatched = LocalDispatcher(8).dispatch(x, routing)
    assert torch.equal(dispatched.rows, gather_reference(x, dispatched.way_back.token_ids))
    grad = draw(*dispatched.rows.shape, dtype=dtype)
    (ours,) = torch.autograd.grad(dispatched.rows, x, grad)
    wide = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(gather_reference(wide, dispatched.way_back.token_ids), wide, grad.double())
    assert normwise_error(ours, truth) < tolerance(dtype, terms=choices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_combine_is_the_reference(shape: tuple[int, ...], dtype: torch.dtype, draw: Draw) -> None:
    tokens, choices, experts, dim = shape
    routing = routing_for(tokens, choices, experts, draw)
    dispatcher = LocalDispatcher(8)
    dispatched = dispatcher.dispatch(draw(tokens, dim, dtype=dtype), routing)
    rows, grad = draw(*dispatched.rows.shape, dtype=dtype).requires_grad_(), draw(tokens, dim, dtype=dtype)
    routing.weights.requires_grad_()
    output = dispatcher.combine(rows, dispatched, routing)
    ours = torch.autograd.grad(output, (rows, routing.weights), grad)
    wide = rows.detach().double().requires_grad_(), routing.weights.detach().double().requires_grad_()
    truth = combine_reference(*wide, dispatched.way_back.row_ids)
    theirs = torch.autograd.grad(truth, wide, grad.double())
    assert normwise_error(output, truth) < tolerance(dtype, terms=choices)
    assert normwise_error(ours[0], theirs[0]) < tolerance(dtype)
    assert normwise_error(ours[1], theirs[1]) < tolerance(torch.float32, terms=dim)
    assert not ours[0][dispatched.way_back.token_ids < 0].any()


def test_combine_after_dispatch_gives_the_tokens_back(draw: Draw) -> None:
    """With weights that are powers of two and sum to one, bit for bit."""
    routing = routing_for(50, 4, 16, draw)
    routing.weights.copy_(torch.tensor([0.5, 0.25, 0.125, 0.125]))
    dispatcher, x = LocalDispatcher(), draw(50, 24, dtype=torch.bfloat16)
    dispatched = dispatcher.dispatch(x, routing)
    assert torch.equal(dispatcher.combine(dispatched.rows, dispatched, routing), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(dtype: torch.dtype, draw: Draw) -> None:
    routing, dispatcher = routing_for(37, 2, 4, draw), LocalDispatcher(8)
    x, grad = draw(37, 70, dtype=dtype), draw(37, 70, dtype=dtype)
    results = []
    for is_strided in (False, True):
        tokens = (x.t().contiguous().t() if is_strided else x).requires_grad_()
        weights = routing.weights.t().contiguous().t() if is_strided else routing.weights
        weights = weights.detach().requires_grad_()
        layout = Routing(expert_ids=routing.expert_ids, weights=weights, scores=routing.scores, counts=routing.counts)
        dispatched = dispatcher.dispatch(tokens, layout)
        rows = dispatched.rows.t().contiguous().t() if is_strided else dispatched.rows
        output = dispatcher.combine(rows, dispatched, layout)
        output_grad = grad.t().contiguous().t() if is_strided else grad
        results.append([output, *torch.autograd.grad(output, (tokens, weights), output_grad)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_token(poison: float, draw: Draw) -> None:
    routing, dispatcher, x = routing_for(37, 2, 4, draw), LocalDispatcher(8), draw(37, 24)
    x[0, 3] = poison
    dispatched = dispatcher.dispatch(x, routing)
    assert torch.equal(dispatched.rows.isfinite().all(1), dispatched.way_back.token_ids != 0)
    output = dispatcher.combine(dispatched.rows, dispatched, routing)
    assert torch.equal(output.isfinite().all(1), torch.arange(37) != 0)


# ---- The layer ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offsets", [[0, 0, 0, 0], [0, 32, 32, 64]], ids=str)
def test_experts_against_a_loop(offsets: list[int], dtype: torch.dtype, draw: Draw) -> None:
    experts = Experts(3, 24, 16, dtype)
    for parameter in experts.parameters():
        parameter.data = draw(*parameter.shape, dtype=dtype)
    rows, grad = draw(offsets[-1], 24, dtype=dtype).requires_grad_(), draw(offsets[-1], 24, dtype=dtype)
    output = experts(rows, offsets)
    ours = torch.autograd.grad(output, (rows, *experts.parameters()), grad)
    wide = [tensor.detach().double().requires_grad_() for tensor in (rows, *experts.parameters())]
    parts = []
    for e in range(3):
        gate, up = F.linear(wide[0][offsets[e] : offsets[e + 1]], wide[1][e]).chunk(2, dim=-1)
        parts.append(F.linear(F.silu(gate) * up, wide[2][e]))
    truth = torch.cat(parts)
    theirs = torch.autograd.grad(truth, wide, grad.double())
    bound = tolerance(dtype, roundings=4, terms=24 + 16 + 32)
    for mine, right in zip((output, *ours), (truth, *theirs), strict=True):
        assert mine.dtype == dtype
        assert normwise_error(mine, right) < bound
    assert not ours[1][1].any()
    assert not ours[2][1].any()


def test_gradient_of_the_experts(draw: Draw) -> None:
    experts = Experts(3, 4, 3, torch.float64)
    weights = draw(3, 6, 4).double().requires_grad_(), draw(3, 4, 3).double().requires_grad_()
    rows = draw(5, 4).double().requires_grad_()

    def run(rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        parameters = {"gate_up_proj": gate_up, "down_proj": down}
        return torch.func.functional_call(experts, parameters, (rows, [0, 2, 2, 5]))

    assert torch.autograd.gradcheck(run, (rows, *weights))


# ---- The layer ----


def layer_of(spec: ModelSpec, dtype: torch.dtype, draw: Draw) -> MoeMlp:
    layer = MoeMlp(spec, dtype)
    for parameter in layer.parameters():
        parameter.data = draw(*parameter.shape, dtype=parameter.dtype, scale=0.3)
    return layer


def by_token(layer: MoeMlp, x: Tensor, routing: Routing) -> Tensor:
    """In FP64, one token and one expert at a time."""
    outputs = []
    for token, ids, weights in zip(x.double(), routing.expert_ids, routing.weights.double(), strict=True):
        total = torch.zeros_like(token)
        for expert, weight in zip(ids, weights, strict=True):
            gate, up = (layer.experts.gate_up_proj[expert].double() @ token).chunk(2)
            total = total + weight * (layer.experts.down_proj[expert].double() @ (F.silu(gate) * up))
        if layer.shared_experts is not None:
            gate, up = (layer.shared_experts.gate_up_proj.weight.double() @ token).chunk(2)
            total = total + layer.shared_experts.down_proj.weight.double() @ (F.silu(gate) * up)
        outputs.append(total)
    return torch.stack(outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [0, 1, 2])
def test_layer_against_a_loop_over_tokens(shared: int, dtype: torch.dtype, tiny_spec: SpecFactory, draw: Draw) -> None:
    layer = layer_of(tiny_spec(n_shared_experts=shared), dtype, draw)
    x = draw(3, 7, 32, dtype=dtype)
    output, routing = layer(x, LocalDispatcher())
    truth = by_token(layer, x.flatten(0, 1), routing).view(3, 7, 32)
    assert output.dtype == dtype
    assert rowwise_error(output, truth) < tolerance(dtype, roundings=5, terms=32 + 2 * 16 + 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens_and_one(dtype: torch.dtype, tiny_spec: SpecFactory, draw: Draw) -> None:
    layer = layer_of(tiny_spec(), dtype, draw)
    for shape in ((0, 32), (2, 0, 32), (1, 32)):
        x = draw(*shape, dtype=dtype).requires_grad_()
        output, routing = layer(x, LocalDispatcher())
        output.sum().backward()
        assert output.shape == shape
        assert x.grad is not None
        assert x.grad.shape == shape
        assert routing.counts.sum() == 2 * x[..., 0].numel()


def test_a_token_does_not_depend_on_its_neighbours(tiny_spec: SpecFactory, draw: Draw) -> None:
    layer, x = layer_of(tiny_spec(), torch.float32, draw), draw(9, 32)
    together = layer(x, LocalDispatcher())[0]
    alone = torch.cat([layer(row[None], LocalDispatcher())[0] for row in x])
    assert rowwise_error(together, alone) < tolerance(torch.float32, terms=32 + 16)


def test_padding_rows_change_nothing(tiny_spec: SpecFactory, draw: Draw) -> None:
    layer, x, grad = layer_of(tiny_spec(), torch.float32, draw), draw(19, 32), draw(19, 32)
    results = []
    for multiple in (1, 32):
        leaf = x.clone().requires_grad_()
        output = layer(leaf, LocalDispatcher(multiple))[0]
        results.append([output, *torch.autograd.grad(output, (leaf, *layer.parameters()), grad)])
    for ours, theirs in zip(*results, strict=True):
        assert normwise_error(ours, theirs) < tolerance(torch.float32, terms=32 + 16 + 19)
