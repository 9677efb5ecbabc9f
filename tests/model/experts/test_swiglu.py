"""SwiGLU and the dense MLP: kernels against the references in FP64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.model.experts.mlp import DenseMlp
from dovetail.model.experts.swiglu import (
    swiglu,
    swiglu_backward,
    swiglu_backward_reference,
    swiglu_reference,
)
from dovetail.numerics.formats.errors import elementwise_error, normwise_error, tolerance

Draw = Callable[..., Tensor]
SHAPES = [(0, 32), (1, 2), (1, 32), (3, 5, 14), (37, 200), (70, 2 * 67)]
OPERATIONS = 8.0  # roundings of one element on its way, exp among them


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_are_the_reference(shape: tuple[int, ...], dtype: torch.dtype, draw: Draw) -> None:
    gate_up = draw(*shape, dtype=dtype, scale=3.0)
    grad = draw(*shape[:-1], shape[-1] // 2, dtype=dtype)
    truth = swiglu_reference(gate_up.double())
    assert elementwise_error(swiglu(gate_up), truth) < tolerance(dtype, terms=OPERATIONS)
    grad_gate_up, output = swiglu_backward(grad, gate_up)
    assert elementwise_error(output, truth) < tolerance(dtype, terms=OPERATIONS)
    true_gradient, _ = swiglu_backward_reference(grad.double(), gate_up.double())
    # 1 + g (1 - s) cancels near its zero at g = -1.28: normwise
    assert normwise_error(grad_gate_up, true_gradient) < tolerance(dtype, terms=OPERATIONS)
    assert grad_gate_up.dtype == output.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(dtype: torch.dtype, draw: Draw) -> None:
    gate_up, grad = draw(9, 40, dtype=dtype), draw(9, 20, dtype=dtype)
    strided, strided_grad = gate_up.t().contiguous().t(), grad.repeat(1, 2)[:, :20]
    assert not strided.is_contiguous()
    assert not strided_grad.is_contiguous()
    assert torch.equal(swiglu(strided), swiglu(gate_up))
    pairs = zip(swiglu_backward(strided_grad, strided), swiglu_backward(grad, gate_up), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_large_gates_saturate_as_silu_does() -> None:
    gate = torch.tensor([-1e38, -1e4, -100.0, -88.0, 88.0, 100.0, 1e4, 1e38, 1e-45, -1e-45, 0.0])
    gate_up = torch.cat((gate, torch.ones_like(gate)))[None]
    truth = swiglu_reference(gate_up.double())
    error = (swiglu(gate_up) - truth).abs() / gate.abs().clamp(min=1.0)
    assert error.max() < tolerance(torch.float32)
    gradient, _ = swiglu_backward(torch.ones(1, len(gate)), gate_up)
    true_gradient, _ = swiglu_backward_reference(torch.ones(1, len(gate)).double(), gate_up.double())
    error = (gradient - true_gradient).abs() / gate.abs().clamp(min=1.0).repeat(2)
    assert error.max() < tolerance(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [3, 23], ids=["gate", "up"])
def test_what_is_not_finite_stays_so(column: int, poison: float, dtype: torch.dtype, draw: Draw) -> None:
    gate_up, grad = draw(4, 40, dtype=dtype), draw(4, 20, dtype=dtype)
    gate_up[2, column] = poison
    output = swiglu(gate_up)
    assert not output[2, 3].isfinite()
    assert output[[0, 1, 3]].isfinite().all()
    gradient, _ = swiglu_backward(grad, gate_up)
    assert not gradient[2, [3, 23]].isfinite().all()
    assert gradient[[0, 1, 3]].isfinite().all()
    grad[1, 5] = poison
    assert not swiglu_backward(grad, gate_up)[0][1, [5, 25]].isfinite().any()


def test_gradients_of_the_reference_and_of_the_mlp(draw: Draw) -> None:
    assert torch.autograd.gradcheck(swiglu_reference, draw(3, 8).double().requires_grad_())
    mlp = DenseMlp(6, 5, torch.float64)
    assert torch.autograd.gradcheck(mlp, draw(2, 3, 6).double().requires_grad_())
    leaves = tuple(parameter.detach().requires_grad_() for parameter in mlp.parameters())
    x = draw(4, 6).double()
    names = [name for name, _ in mlp.named_parameters()]

    def run(*weights: Tensor) -> Tensor:
        return torch.func.functional_call(mlp, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [(0,), (1,), (2, 19)], ids=str)
def test_mlp_against_torch(tokens: tuple[int, ...], dtype: torch.dtype, draw: Draw) -> None:
    mlp = DenseMlp(24, 40, dtype)
    x, grad = draw(*tokens, 24, dtype=dtype).requires_grad_(), draw(*tokens, 24, dtype=dtype)
    output = mlp(x)
    ours = torch.autograd.grad(output, (x, *mlp.parameters()), grad)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, *mlp.parameters())]
    gate, up = F.linear(wide[0], wide[1]).chunk(2, dim=-1)
    truth = F.linear(F.silu(gate) * up, wide[2])
    theirs = torch.autograd.grad(truth, wide, grad.double())
    bound = tolerance(dtype, roundings=4, terms=24 + 40 + 38)  # hidden, output of the SwiGLU, its gradient, result
    assert normwise_error(output, truth) < bound
    for name, gradient, true_gradient in zip(("x", "gate_up", "down"), ours, theirs, strict=True):
        assert normwise_error(gradient, true_gradient) < bound, name
