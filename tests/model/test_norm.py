"""RMSNorm: the kernel against the reference in FP64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dovetail.model.norm import rms_norm, rms_norm_reference
from dovetail.numerics.formats.errors import normwise_error, tolerance

Draw = Callable[..., Tensor]
EPS = 1e-6
SHAPES = [(0, 24), (1, 1), (1, 24), (3, 5, 7), (37, 576), (100, 130)]


def gradients(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel: y, grad_x, grad_weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = rms_norm(x, weight, EPS)
    return y, *torch.autograd.grad(y, (x, weight), grad)


def expected(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    y = rms_norm_reference(x, weight, EPS)
    return y, *torch.autograd.grad(y, (x, weight), grad.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_is_the_reference(shape: tuple[int, ...], dtype: torch.dtype, draw: Draw) -> None:
    x, grad = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype)
    weight = draw(shape[-1])
    ours, theirs = gradients(x, weight, grad), expected(x, weight, grad)
    assert [each.dtype for each in ours] == [dtype, dtype, torch.float32]
    assert normwise_error(ours[0], theirs[0]) < tolerance(dtype, terms=shape[-1])
    if shape[-1] > 1:  # the gradient of a row of one is a difference of equals
        assert normwise_error(ours[1], theirs[1]) < tolerance(dtype, terms=shape[-1])
    rows = x.numel() // shape[-1]
    assert normwise_error(ours[2], theirs[2]) < tolerance(torch.float32, terms=max(rows, 1) + shape[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(dtype: torch.dtype, draw: Draw) -> None:
    x, grad, weight = draw(9, 40, dtype=dtype), draw(9, 40, dtype=dtype), draw(40)
    wide_weight = weight.repeat_interleave(2)[::2]
    for strided in (x.t().contiguous().t(), x.repeat_interleave(2, dim=1)[:, ::2], x.repeat(1, 2)[:, :40]):
        assert not strided.is_contiguous()
        same = gradients(strided, wide_weight, grad.t().contiguous().t())
        assert all(torch.equal(a, b) for a, b in zip(same, gradients(x, weight, grad), strict=True))
    ones = torch.ones((), dtype=dtype).expand(9, 40)  # the zero-stride gradient of .sum()
    assert torch.equal(gradients(x, weight, ones)[1], gradients(x, weight, ones.contiguous())[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-30, 1e-3, 1e4, 1e15])
def test_sizes_from_subnormal_to_large(size: float, dtype: torch.dtype, draw: Draw) -> None:
    x, grad, weight = draw(5, 48, scale=size, dtype=dtype), draw(5, 48, dtype=dtype), draw(48)
    y, grad_x, _ = gradients(x, weight, grad)
    truth = expected(x, weight, grad)
    assert normwise_error(y, truth[0]) < tolerance(dtype, terms=48)
    if size < 1e12:  # above, the cube of 1 / rms leaves FP32
        assert normwise_error(grad_x, truth[1]) < tolerance(dtype, terms=48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(poison: float, dtype: torch.dtype, draw: Draw) -> None:
    x, grad, weight = draw(4, 20, dtype=dtype), draw(4, 20, dtype=dtype), draw(20)
    x[2, 7] = poison
    y, grad_x, grad_weight = gradients(x, weight, grad)
    assert not y[2].isfinite().all()
    assert y[[0, 1, 3]].isfinite().all()
    assert not grad_x[2].isfinite().all()
    assert not grad_weight.isfinite().all()


def test_another_weight_dtype_goes_to_the_reference(draw: Draw) -> None:
    x, weight = draw(3, 16, dtype=torch.bfloat16), draw(16, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x, weight, EPS), rms_norm_reference(x, weight, EPS))


def test_gradients_of_the_reference(draw: Draw) -> None:
    x, weight = draw(3, 7).double().requires_grad_(), draw(7).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm_reference(x, weight, EPS), (x, weight))


def test_formula() -> None:
    """By hand: rms of (3, 4) is sqrt(12.5); eps inside the root."""
    y = rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.5)
    truth = torch.tensor([[3.0, 8.0]], dtype=torch.float64) / 13**0.5
    assert normwise_error(y, truth) < tolerance(torch.float32)
    outside = torch.tensor([[3.0, 8.0]], dtype=torch.float64) / (12.5**0.5 + 0.5)
    assert normwise_error(y, outside) > 100 * tolerance(torch.float32)
