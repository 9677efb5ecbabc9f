"""The scalar blocks of the CPU kernels against torch: bit for bit where that applies."""

import numpy as np
import pytest
import torch
from numba import prange
from torch import Tensor

from dovetail.numerics import capability
from dovetail.numerics.cpu.kernels import array, kernel
from dovetail.numerics.cpu.scalars_numba import EXP_ERROR, exp, from_ordered, load, ordered, sigmoid, store
from dovetail.numerics.formats.errors import elementwise_error, tolerance


@kernel
def _round_trip(source, target):  # type: ignore[no-untyped-def]
    for i in prange(source.shape[0]):
        store(target, i, load(source, i))


@kernel
def _functions(x, exps, sigmoids, back, keys):  # type: ignore[no-untyped-def]
    for i in prange(x.shape[0]):
        exps[i] = exp(x[i])
        sigmoids[i] = sigmoid(x[i])
        keys[i] = ordered(x[i])
        back[i] = from_ordered(ordered(x[i]))


def converted(source: Tensor, dtype: torch.dtype) -> Tensor:
    target = torch.empty(source.shape, dtype=dtype)
    _round_trip(array(source), array(target))
    return target


def functions(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    exps, sigmoids, back = (torch.empty_like(x) for _ in range(3))
    keys = torch.empty(x.shape, dtype=torch.int32)
    _functions(*(array(each) for each in (x, exps, sigmoids, back, keys)))
    return exps, sigmoids, back, keys


def from_bits(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32))


def dense_sweep() -> Tensor:
    """Every BF16 value, each with low bits just below, on and above the tie, at both ends and at random."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    low = np.array([0, 1, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF], dtype=np.uint32)
    random = np.random.default_rng(0).integers(0, 1 << 16, (1 << 16, 4), dtype=np.uint32)
    return from_bits(np.concatenate((high[:, None] | low, high[:, None] | random), axis=1).ravel())


def test_storing_bf16_rounds_as_torch_does() -> None:
    values = dense_sweep()
    ours, theirs = converted(values, torch.bfloat16), values.to(torch.bfloat16)
    is_nan = values.isnan()
    assert torch.equal(ours.isnan(), is_nan)
    assert torch.equal(ours[~is_nan].view(torch.int16), theirs[~is_nan].view(torch.int16))
    last_midpoint = from_bits(np.array([0x7F7F8000]))
    assert torch.equal(ours.isinf(), (values.abs() >= last_midpoint) & ~is_nan)
    truncated = (values.view(torch.int32) >> 16).to(torch.int16)
    assert not torch.equal(truncated[~is_nan], theirs[~is_nan].view(torch.int16))


def test_loading_bf16_is_exact() -> None:
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    ours, theirs = converted(values, torch.float32), values.float()
    assert torch.equal(ours.isnan(), theirs.isnan())
    number = ~theirs.isnan()
    assert torch.equal(ours[number].view(torch.int32), theirs[number].view(torch.int32))


def test_fp32_passes_unchanged() -> None:
    values = dense_sweep()
    assert torch.equal(converted(values, torch.float32).view(torch.int32), values.view(torch.int32))


def test_exp_is_as_good_as_stated() -> None:
    x = torch.cat((torch.linspace(-87, 88, 400_001), torch.linspace(-1, 1, 100_001), torch.tensor([0.0, -0.0])))
    exps = functions(x)[0]
    assert elementwise_error(exps, x.double().exp()) < EXP_ERROR
    assert exps[-1] == exps[-2] == 1.0


def test_exp_outside_its_range_is_clamped_and_nan_stays() -> None:
    nan, inf = float("nan"), float("inf")
    exps = functions(torch.tensor([nan, -nan, inf, 1e30, -inf, -1e30, -90.0, 1e-45]))[0]
    assert exps[:2].isnan().all()
    assert (exps[2:4] > 1e38).all()
    assert ((exps[4:7] >= 0) & (exps[4:7] < 2e-38)).all()
    assert exps[7] == 1.0


def test_sigmoid() -> None:
    x = torch.linspace(-80, 80, 200_001)
    assert elementwise_error(functions(x)[1], x.double().sigmoid()) < EXP_ERROR + tolerance(torch.float32)
    edge = functions(torch.tensor([float("nan"), float("inf"), -float("inf"), 1e38, -1e38]))[1]
    assert edge[0].isnan()
    assert edge[1] == edge[3] == 1.0
    assert (edge[[2, 4]] < 1e-37).all()


def test_ordered_keys_order_as_floats_do_and_go_back() -> None:
    values = dense_sweep()
    values = values[~values.isnan()].sort().values
    keys = functions(values)[3].long()
    assert (keys.diff()[values.diff() > 0] > 0).all()
    assert torch.equal(functions(values)[2].view(torch.int32), values.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_elements(dtype: torch.dtype) -> None:
    assert converted(torch.empty(0), dtype).shape == (0,)


def test_arrays_share_memory_and_refuse_strides() -> None:
    tensor = torch.zeros(4, 6, dtype=torch.bfloat16)
    array(tensor)[1, 2] = 0x3F80
    assert tensor[1, 2] == 1.0
    with pytest.raises(AssertionError, match="contiguous"):
        array(tensor.t())


def test_what_the_kernels_take() -> None:
    assert capability.on_cpu(torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16))
    assert not capability.on_cpu(torch.zeros(1), torch.zeros(1, dtype=torch.float64))
    assert not capability.on_cpu(torch.zeros(1, device="meta"))
