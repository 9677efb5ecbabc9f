"""SwiGLU fused with quantisation: the kernel against SwiGLU and quantisation one after the other."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dovetail.model.swiglu import swiglu_backward_reference, swiglu_reference
from dovetail.model.swiglu_quantized import (
    swiglu_quantized_backward_reference,
    swiglu_quantized_reference,
)
from dovetail.numerics.compare import rowwise_error, tolerance
from dovetail.numerics.quantize import Quantized, dequantize, grid_values, quantize

pytest.importorskip("triton", reason="Triton is published for Linux only")

from dovetail.model.swiglu_triton import swiglu_quantized, swiglu_quantized_backward  # noqa: E402

Draw = Callable[..., Tensor]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROW, COLUMN = (1, 128), (128, 1)
OPERATIONS = 12.0  # roundings of one element on its way, exp among them


def moved(x: Tensor | Quantized) -> Tensor | Quantized:
    if isinstance(x, Tensor):
        return x.to(DEVICE)
    return Quantized(data=x.data.to(DEVICE), scale=x.scale.to(DEVICE), tile=x.tile, format=x.format)


def half_a_step(expected: Tensor, quantized: Quantized) -> Tensor:
    """How far E4M3 may be from a value: half a step of 3 mantissa bits, or of the subnormal ones times the scale."""
    rows, columns = quantized.tile
    scale = quantized.scale.cpu().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return torch.maximum(expected.abs() * 2**-4, scale[: expected.shape[0], : expected.shape[1]] * 2**-10)


def assert_near(actual: Quantized, truth: Tensor, dtype: torch.dtype) -> None:
    """Within the rounding to `dtype`, then to E4M3; `truth` FP64."""
    values = dequantize(actual).cpu().double()
    before = tolerance(dtype, terms=OPERATIONS) * truth.abs().amax(dim=-1, keepdim=True)
    assert ((values - truth).abs() <= (half_a_step(truth, actual) + before) * (1 + tolerance(dtype))).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [ROW, COLUMN], ids=str)
@pytest.mark.parametrize("shape", [(0, 128), (1, 128), (5, 384), (131, 128)], ids=str)
def test_results_are_those_of_the_two_steps(
    shape: tuple[int, int], tile: tuple[int, int], dtype: torch.dtype, draw: Draw
) -> None:
    gate_up, grad = draw(shape[0], 2 * shape[1], dtype=dtype, scale=3.0), draw(*shape, dtype=dtype, scale=1e-2)
    truth = swiglu_reference(gate_up.double())
    true_gradient, _ = swiglu_backward_reference(grad.double(), gate_up.double())
    assert_near(swiglu_quantized(moved(gate_up), tile), truth, dtype)
    gradient, output = swiglu_quantized_backward(moved(grad), moved(gate_up), tile)
    assert_near(gradient, true_gradient, dtype)
    assert_near(output, truth, dtype)
    assert gradient.data.shape == gate_up.shape and output.data.shape == grad.shape


@pytest.mark.parametrize("tile", [ROW, COLUMN], ids=str)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_where_the_sigmoid_is_exact_bits_are_the_reference(
    tile: tuple[int, int], power_of_two: bool, draw: Draw
) -> None:
    """Gates of 20 and more, whose sigmoid is 1: what remains is products, rounding to BF16, and quantisation."""
    gate, up = 20 + draw(7, 256).abs() * 10, draw(7, 256)
    gate_up, grad = torch.cat((gate, up), dim=1).bfloat16(), draw(7, 256, dtype=torch.bfloat16)
    gate_up[3], grad[4] = 0, 0
    ours = swiglu_quantized_backward(moved(grad), moved(gate_up), tile, power_of_two=power_of_two)
    theirs = swiglu_quantized_backward_reference(grad, gate_up, tile, power_of_two=power_of_two)
    ours += (swiglu_quantized(moved(gate_up), tile, power_of_two=power_of_two),)
    theirs += (swiglu_quantized_reference(gate_up, tile, power_of_two=power_of_two),)
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.equal(mine.scale.cpu(), reference.scale)
        assert torch.equal(grid_values(mine).cpu(), grid_values(reference))


@pytest.mark.parametrize("format", ["e4m3", "e5m2", "e5m6"])
def test_what_was_kept_in_fp8_is_read_as_it_is(format: str, draw: Draw) -> None:
    """The input kept 1x128 in E4M3: as from its BF16 values [V3 §3.3.3]; results in any format."""
    kept = quantize(draw(9, 512, scale=3.0), ROW)
    grad = draw(9, 256, dtype=torch.bfloat16)
    plain = dequantize(kept, torch.bfloat16)
    from_kept = swiglu_quantized_backward(moved(grad), moved(kept), format=format)
    from_plain = swiglu_quantized_backward(moved(grad), moved(plain), format=format)
    for mine, other in zip(from_kept, from_plain, strict=True):
        assert torch.equal(mine.scale, other.scale) and torch.equal(grid_values(mine), grid_values(other))
    forward = swiglu_quantized(moved(kept), format=format)
    assert torch.equal(grid_values(forward), grid_values(from_plain[1]))
    shifted = Quantized(data=kept.data, scale=kept.scale.roll(1, 1), tile=ROW)  # gate's scales for up are wrong
    assert not torch.equal(grid_values(swiglu_quantized(moved(shifted), format=format)), grid_values(forward))


def test_gradient_of_another_dtype_is_rounded_first(draw: Draw) -> None:
    gate_up, grad = draw(3, 256, dtype=torch.bfloat16), draw(3, 128)
    wide, _ = swiglu_quantized_backward(moved(grad), moved(gate_up))
    rounded, _ = swiglu_quantized_backward(moved(grad.bfloat16()), moved(gate_up))
    assert torch.equal(grid_values(wide), grid_values(rounded)) and torch.equal(wide.scale, rounded.scale)


def test_strides_do_not_matter(draw: Draw) -> None:
    gate_up, grad = draw(256, 9, dtype=torch.bfloat16), draw(9, 256, dtype=torch.bfloat16)
    plain = swiglu_quantized_backward(moved(grad[:, ::2].contiguous()), moved(gate_up.t().contiguous()))
    strided = swiglu_quantized_backward(moved(grad)[:, ::2], moved(gate_up).t())
    for mine, other in zip(strided, plain, strict=True):
        assert torch.equal(grid_values(mine), grid_values(other))


def test_ragged_width_forward_and_refused_backward(draw: Draw) -> None:
    gate_up = draw(4, 2 * 200, dtype=torch.bfloat16)
    actual = swiglu_quantized(moved(gate_up))
    assert actual.scale.shape == (4, 2)
    assert_near(actual, swiglu_reference(gate_up.double()), torch.bfloat16)
    with pytest.raises(ValueError, match="width 200.*hold gate and up"):
        swiglu_quantized_backward(moved(draw(4, 200, dtype=torch.bfloat16)), moved(gate_up))
    with pytest.raises(ValueError, match=r"not torch.bfloat16 \[4, 400\] and \[4, 128\]"):
        swiglu_quantized_backward(moved(draw(4, 128, dtype=torch.bfloat16)), moved(gate_up))


def test_extreme_gates(draw: Draw) -> None:
    gate = torch.tensor([-1e38, -1e4, -100.0, -88.0, -1.278, -1e-45, 0.0, 1e-30, 88.0, 1e4, 1e30]).repeat(12)[:128]
    gate_up = torch.cat((gate, torch.ones(128)))[None].repeat(3, 1)
    gate_up[1, :128], gate_up[2, 128:] = gate[:128].clamp(-200, 200), 1e-3
    grad = torch.ones(3, 128)
    gradient, output = swiglu_quantized_backward(moved(grad), moved(gate_up))
    truth, (true_gradient, _) = (
        swiglu_reference(gate_up.double()),
        swiglu_backward_reference(grad.double(), gate_up.double()),
    )
    assert_near(output, truth, torch.float32)
    assert_near(gradient, true_gradient, torch.float32)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused_or_stays_so(bad: float, draw: Draw) -> None:
    gate_up, grad = draw(3, 512), draw(3, 256)
    gate_up[1, 300] = bad
    with pytest.raises(ValueError, match=r"the output of a SwiGLU, shape \[3, 256\], holds"):
        swiglu_quantized(moved(gate_up))
    with pytest.raises(ValueError, match=r"the gradient of a SwiGLU, shape \[3, 512\], holds"):
        swiglu_quantized_backward(moved(grad), moved(gate_up))
    loose = swiglu_quantized(moved(gate_up), check=False)
    assert not dequantize(loose).cpu()[1, 44].isfinite()
    assert dequantize(loose).cpu()[[0, 2]].isfinite().all() and dequantize(loose).cpu()[1, 128:].isfinite().all()


def test_two_roundings_are_near_one(draw: Draw) -> None:
    """BF16 between SwiGLU and E4M3 costs little: the error of the whole row stays that of E4M3."""
    gate_up = draw(6, 512, dtype=torch.bfloat16)
    actual = dequantize(swiglu_quantized(moved(gate_up))).cpu()
    assert rowwise_error(actual, swiglu_reference(gate_up.double()).float()) < 2**-4
