"""Splitting and rotating heads: the kernel against the reference."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dovetail.model.attention.heads import split_heads, split_heads_reference
from dovetail.numerics.formats.errors import normwise_error, tolerance

Draw = Callable[..., Tensor]
# batch, length, heads, nope, rope, v
SHAPES = [(1, 1, 1, 1, 2, 1), (2, 0, 2, 4, 4, 4), (0, 3, 2, 4, 4, 4), (2, 7, 3, 5, 6, 9), (3, 67, 2, 16, 8, 24)]
NAMES = ("q", "kv", "rope_key")


def inputs(shape: tuple[int, ...], dtype: torch.dtype, draw: Draw) -> list[Tensor]:
    batch, length, heads, nope, rope, v = shape
    angles = draw(batch, length, rope // 2, scale=10.0)
    q, kv = draw(batch, length, heads, nope + rope, dtype=dtype), draw(batch, length, heads, nope + v, dtype=dtype)
    return [q, kv, draw(batch, length, rope, dtype=dtype), angles.cos(), angles.sin()]


def run(function: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    outputs = function(*leaves, *tensors[3:])
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


def output_grads(shape: tuple[int, ...], dtype: torch.dtype, draw: Draw) -> list[Tensor]:
    batch, length, heads, nope, rope, v = shape
    return [draw(batch, heads, length, width, dtype=dtype) for width in (nope + rope, nope + rope, v)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_is_the_reference(shape: tuple[int, ...], dtype: torch.dtype, draw: Draw) -> None:
    tensors, grads = inputs(shape, dtype, draw), output_grads(shape, dtype, draw)
    ours = run(split_heads, tensors, grads)
    wide = [tensor.float() for tensor in tensors], [grad.float() for grad in grads]
    truth = run(split_heads_reference, *wide)
    for name, mine, right in zip(("q", "k", "v", *NAMES), ours, truth, strict=True):
        assert mine.dtype == dtype
        if name in ("k", "v", "kv"):  # copies
            assert torch.equal(mine, right.to(dtype)), name
        else:  # a rotation is two terms, the key's gradient one per head
            assert normwise_error(mine, right) < tolerance(dtype, terms=2 + shape[2]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(dtype: torch.dtype, draw: Draw) -> None:
    shape = (2, 7, 3, 5, 6, 9)
    tensors, grads = inputs(shape, dtype, draw), output_grads(shape, dtype, draw)
    strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in tensors]
    strided_grads = [grad.transpose(1, 2).contiguous().transpose(1, 2) for grad in grads]
    assert not any(tensor.is_contiguous() for tensor in strided + strided_grads)
    pairs = zip(run(split_heads, strided, strided_grads), run(split_heads, tensors, grads), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_one_row_of_positions_serves_every_sequence(draw: Draw) -> None:
    shape = (3, 7, 2, 4, 6, 5)
    tensors, grads = inputs(shape, torch.float32, draw), output_grads(shape, torch.float32, draw)
    shared = tensors[:3] + [tensor[:1] for tensor in tensors[3:]]
    repeated = tensors[:3] + [tensor[:1].repeat(3, 1, 1) for tensor in tensors[3:]]
    pairs = zip(run(split_heads, shared, grads), run(split_heads, repeated, grads), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_a_gradient_of_one_output_alone(draw: Draw) -> None:
    tensors = inputs((2, 5, 3, 4, 6, 7), torch.float32, draw)
    grads = []
    for function in (split_heads, split_heads_reference):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
        function(*leaves, *tensors[3:])[1].square().sum().backward()
        grads.append([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads, strict=True):
        assert normwise_error(ours, theirs) < tolerance(torch.float32, terms=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_so(dtype: torch.dtype, draw: Draw) -> None:
    shape = (1, 3, 2, 4, 6, 5)
    for index, poison in ((0, float("nan")), (0, float("inf")), (1, float("nan")), (2, -float("inf"))):
        tensors, grads = inputs(shape, dtype, draw), output_grads(shape, dtype, draw)
        tensors[index].flatten()[-1] = poison
        outputs = run(split_heads, tensors, grads)[:3]
        assert not all(output.isfinite().all() for output in outputs)
