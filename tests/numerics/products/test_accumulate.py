"""The Tensor Core model against the same in Python integers, and against what it has to obey whatever the numbers."""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from dovetail.numerics.formats.errors import normwise_error, tolerance
from dovetail.numerics.products.accumulate import _has_kernel as has_kernel
from dovetail.numerics.products.accumulate import dot_by_integers, matmul, matmul_reference, multiply_add
from dovetail.numerics.products.accumulators import Accumulator, Fp32Accumulator, HopperAccumulator, Scales

Draw = Callable[..., Tensor]
Matmul = Callable[..., Tensor]
NEVER = HopperAccumulator(None)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def all_codes(dtype: torch.dtype) -> Tensor:
    """Every finite value of an 8-bit format, subnormals and both zeros among them."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return values[values.isfinite()]


def pick(values: Tensor, *shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return values[torch.randint(len(values), shape, generator=generator)]


def on_grid(x: Tensor) -> Tensor:
    """x in E4M3, its largest value at 448."""
    return (x * (448 / x.abs().max())).to(E4M3).float()


def by_integers(a: Tensor, b: Tensor, promotion: int | None, formats: tuple[str, str] = ("e4m3", "e4m3")) -> Tensor:
    rows = [[dot_by_integers(row, column, promotion, formats) for column in b.tolist()] for row in a.tolist()]
    return torch.tensor(rows, dtype=torch.float32).reshape(len(a), len(b))


both = pytest.mark.parametrize("multiply", [matmul, matmul_reference], ids=["kernel", "reference"])


@both
@pytest.mark.parametrize("k", [0, 1, 31, 32, 33, 128, 300])
@pytest.mark.parametrize("promotion", [None, 32, 64, 128])
def test_it_is_the_integers_bit_for_bit(k: int, promotion: int | None, multiply: Matmul, draw: Draw) -> None:
    a, b = on_grid(draw(5, max(k, 1)))[:, :k], on_grid(draw(7, max(k, 1)))[:, :k]
    assert torch.equal(multiply(a, b, HopperAccumulator(promotion)), by_integers(a, b, promotion))


@pytest.mark.parametrize("shape", [(1, 1, 32), (33, 130, 300), (17, 64, 1000)], ids=str)
@pytest.mark.parametrize("promotion", [None, 32, 128, 256])
@pytest.mark.parametrize("width", [None, 128, 256, 1000])
def test_the_kernel_is_the_reference_bit_for_bit(
    shape: tuple[int, int, int], promotion: int | None, width: int | None, draw: Draw
) -> None:
    m, n, k = shape
    a, b = on_grid(draw(m, k)), on_grid(draw(n, k))
    scales = None
    if width is not None:
        tiles = math.ceil(k / width)
        scales = Scales(a=draw(m, tiles).exp(), b=draw(n, tiles).exp(), width=width)
    operands = (a, b, HopperAccumulator(promotion), scales)
    assert has_kernel(a, b, scales, ("e4m3", "e4m3"))
    assert torch.equal(matmul(*operands), matmul_reference(*operands))


@both
@pytest.mark.parametrize("dtypes", [(E4M3, E4M3), (E5M2, E4M3), (E5M2, E5M2)], ids=str)
def test_every_code_is_multiplied_as_the_integers_do(dtypes: tuple[torch.dtype, torch.dtype], multiply: Matmul) -> None:
    """Codes drawn evenly: exponents over the whole range, subnormals, zeros, and sums that cancel."""
    formats = ("e4m3" if dtypes[0] == E4M3 else "e5m2", "e4m3" if dtypes[1] == E4M3 else "e5m2")
    for seed in range(4):
        a, b = (pick(all_codes(dtype), 8, 160, seed=2 * seed + i) for i, dtype in enumerate(dtypes))
        b[:, 64:128] = -b[:, :64]
        a[:, 64:128] = a[:, :64]
        b[:, 128:] *= 0 if seed % 2 else 1
        actual = multiply(a, b, NEVER, formats=formats)
        assert torch.equal(actual, by_integers(a, b, None, formats))


def test_results_are_fp22(draw: Draw) -> None:
    result = matmul(on_grid(draw(16, 256)), on_grid(draw(16, 256)), NEVER)
    assert not (result.view(torch.int32) & 0x3FF).any()
    assert (result.view(torch.int32) & 0x400).any()
    promoted = matmul(on_grid(draw(16, 256)), on_grid(draw(16, 256)), HopperAccumulator())
    assert (promoted.view(torch.int32) & 0x3FF).any()


def one_dot(terms: list[tuple[float, float]], promotion: int | None = None) -> float:
    a, b = (torch.tensor([side], dtype=torch.float32) for side in zip(*terms, strict=True))
    return matmul(a, b, HopperAccumulator(promotion)).item()


def test_thirteen_fraction_bits_below_the_largest_are_kept_and_no_more() -> None:
    """256 = 2^8: 2^-5 is its 13th fraction bit."""
    large = (16.0, 16.0)
    assert one_dot([large, (2**-3, 2**-2)]) == 256 + 2**-5
    assert one_dot([large, (2**-3, 2**-3)]) == 256
    assert one_dot([large] + [(2**-3, 2**-3)] * 31) == 256  # each on its own: their exact sum would be seen
    assert one_dot([large, (2**-3, -(2**-3))]) == 256  # towards zero; a sign-filled shift would give 256 - 2^-5
    assert one_dot([(1.0, 0.0), (2**-9, 2**-9)]) == 2**-18  # a zero product has no exponent


def test_the_exponent_of_a_product_is_that_of_its_factors() -> None:
    """1.875^2 = 3.5 is taken as 3.5 times 2^0 and 2^-13 survives beside it; as 1.75 times 2^1 it would not."""
    assert one_dot([(1.875, 1.875), (2**-6, 2**-7)]) == 3.515625
    assert one_dot([(1.0, 1.0), (2**-6, 2**-7)]) == 1 + 2**-13
    # 3.515625 + 2^-13 needs 14 fraction bits: cut in FP22, but seen before the largest term is taken away again.
    assert one_dot([(1.875, 1.875), (2**-6, 2**-7), (-1.875, 1.875)]) == 2**-13
    assert one_dot([(2.0, 2.0), (2**-6, 2**-7), (-2.0, 2.0)]) == 0


def test_a_subnormal_factor_counts_with_the_smallest_normal_exponent() -> None:
    """2^-9 is 0.125 times 2^-6 in E4M3, and in E5M2 a normal number: only there 2^-17 times 2^-1 is within 13 bits."""
    terms = torch.tensor([[2**-9, 2**-9]]), torch.tensor([[2.0**-1, 2.0**-14]])
    assert matmul(*terms, NEVER, formats=("e4m3", "e5m2")).item() == 2**-10
    assert matmul(*terms, NEVER, formats=("e5m2", "e5m2")).item() == 2**-10 + 2**-23


def test_the_accumulator_is_aligned_with_the_products() -> None:
    """33 products: the last one is alone in its group, but the accumulator of 2^13 leaves nothing below 1."""
    first = [(16.0, 16.0)] * 32
    assert one_dot([*first, (1.0, 0.5)]) == 2**13
    assert one_dot([*first, (1.0, 1.0)]) == 2**13 + 1
    assert one_dot([*first, (1.0, 0.5)], promotion=32) == 2**13 + 0.5
    assert one_dot([(1.0, 0.5), *([(0.0, 0.0)] * 31), *first]) == 2**13  # and the other way round


def test_promotion_bounds_the_error_that_grows_without_it(draw: Draw) -> None:
    """Positive numbers lose a share of the sum in every group; within N_C of K it cannot grow beyond N_C's."""
    a, b = (on_grid(draw(8, 2048).abs()) for _ in range(2))
    exact = a.double() @ b.double().t()
    errors = [normwise_error(matmul(a, b, HopperAccumulator(n)), exact) for n in (64, 128, 512, None)]
    # A group of 32 and its accumulator lose less than 33 times 2^-13 of a power of two below the sum.
    assert errors == sorted(errors) and errors[3] > 20 * errors[1]
    for run, error in zip((64, 128, 512, 2048), errors, strict=True):
        assert error < run / 32 * 33 * 2**-13 + tolerance(torch.float32, terms=2048 / run)


def test_the_fp32_model_adds_the_odd_one_of_a_pair_first() -> None:
    """1 is lost beside 2^24, and only there: the order of additions is seen in the result."""
    large = 2.0**12
    a, b = torch.tensor([[1.0, large, 1.0, -large]]), torch.tensor([[1.0, large, 1.0, large]])
    assert matmul(a, b, Fp32Accumulator()).item() == 1.0  # 2^24, 1, -2^24, 1; in the order of k it would be 0
    assert matmul(a[:, [1, 0, 3, 2]], b[:, [1, 0, 3, 2]], Fp32Accumulator()).item() == 0.0
    assert matmul(a[:, [0, 1, 3]], b[:, [0, 1, 3]], Fp32Accumulator()).item() == 0.0  # 2^24, 1, -2^24 alone


@pytest.mark.parametrize("k", [0, 1, 7, 256])
def test_the_fp32_model_is_within_its_bound(k: int, draw: Draw) -> None:
    a, b = (draw(9, k).to(E4M3).float() for _ in range(2))
    actual, exact = matmul(a, b, Fp32Accumulator()), a.double() @ b.double().t()
    largest = a.double().abs() @ b.double().abs().t()
    assert ((actual - exact).abs() <= tolerance(torch.float32, terms=k) * largest).all()


def scaled(k: int, width: int, draw: Draw) -> tuple[Tensor, Tensor, Scales]:
    a, b = on_grid(draw(3, k)), on_grid(draw(4, k))
    tiles = math.ceil(k / width)
    return a, b, Scales(a=draw(3, tiles).abs() + 0.1, b=draw(4, tiles).abs() + 0.1, width=width)


@both
@pytest.mark.parametrize("promotion", [32, 64, 128])
@pytest.mark.parametrize("k", [40, 128, 300])
def test_scales_are_applied_as_a_run_is_promoted(promotion: int, k: int, multiply: Matmul, draw: Draw) -> None:
    """Bit for bit: the runs of the integer model, each fused-multiplied and added, by fractions."""
    a, b, scales = scaled(k, 128, draw)
    actual = multiply(a, b, HopperAccumulator(promotion), scales)
    for m, n in ((0, 0), (2, 3), (1, 2)):
        total = 0.0
        for start in range(0, k, promotion):
            run = slice(start, start + promotion)
            partial = dot_by_integers(a[m, run].tolist(), b[n, run].tolist())
            factor = (scales.a[m, start // 128] * scales.b[n, start // 128]).item()
            total = nearest_fp32(Fraction(partial) * Fraction(factor) + Fraction(total))
        assert actual[m, n].item() == total


@both
def test_one_run_over_several_scales_takes_them_inside(multiply: Matmul, draw: Draw) -> None:
    """With powers of two it is the run over values scaled beforehand; promotion every 256 of K has two per run."""
    a, b, scales = scaled(512, 128, draw)
    powers = [2.0 ** x.log2().round() for x in (scales.a, scales.b)]
    a, b = (x.where(x.abs() >= 2**-6, 0.0) for x in (a, b))  # no subnormal numbers
    scaled_a, scaled_b = (x * s.repeat_interleave(128, 1) for x, s in zip((a, b), powers, strict=True))
    scales = Scales(a=powers[0], b=powers[1], width=128)
    for promotion in (None, 256):
        accumulator = HopperAccumulator(promotion)
        inside = multiply(a, b, accumulator, scales)
        assert torch.equal(inside, matmul(scaled_a, scaled_b, accumulator, formats=("e8m3", "e8m3")))
        outside = matmul(a, b, HopperAccumulator(128), scales)
        assert not torch.equal(inside, outside)


@pytest.mark.parametrize("accumulator", [Fp32Accumulator(), HopperAccumulator(), NEVER], ids=str)
def test_scales_of_one_and_none_are_the_same(accumulator: Accumulator, draw: Draw) -> None:
    a, b = on_grid(draw(3, 128)), on_grid(draw(4, 128))
    ones = Scales(a=torch.ones(3, 1), b=torch.ones(4, 1), width=128)
    assert torch.equal(matmul(a, b, accumulator, ones), matmul(a, b, accumulator))


@pytest.mark.parametrize("accumulator", [Fp32Accumulator(), HopperAccumulator(), NEVER], ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 64), (3, 0, 64), (1, 1, 64), (3, 2, 0)], ids=str)
def test_nothing_and_one(accumulator: Accumulator, shape: tuple[int, int, int], draw: Draw) -> None:
    m, n, k = shape
    result = matmul(draw(m, k).to(E4M3).float(), draw(n, k).to(E4M3).float(), accumulator)
    assert result.shape == (m, n) and result.isfinite().all()
    assert k > 0 or not result.any()


@pytest.mark.parametrize("accumulator", [Fp32Accumulator(), HopperAccumulator(), NEVER], ids=str)
def test_views_and_company_do_not_matter(accumulator: Accumulator, draw: Draw) -> None:
    a, b = on_grid(draw(96, 70)), on_grid(draw(96, 700))
    together = matmul(a.t(), b.t(), accumulator)  # 700 columns: rows are taken in several parts
    assert torch.equal(together, matmul(a.t().contiguous(), b.t().contiguous(), accumulator))
    assert torch.equal(together[5:6, 20:30], matmul(a.t()[5:6], b.t()[20:30], accumulator))


@pytest.mark.parametrize("accumulator", [Fp32Accumulator(), HopperAccumulator(), NEVER], ids=str)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_not_finite_is_passed_on(accumulator: Accumulator, poison: float, draw: Draw) -> None:
    a, b = on_grid(draw(4, 96)), on_grid(draw(5, 96)).abs() + 0.125
    clean = matmul(a, b, accumulator)
    a[2, 40] = poison
    result = matmul(a, b, accumulator)
    assert not result[2].isfinite().any()
    assert torch.equal(result[[0, 1, 3]], clean[[0, 1, 3]])


def nearest_fp32(exact: Fraction) -> float:
    """Rounded once, ties to even; normal numbers only."""
    if exact == 0:
        return 0.0
    exponent = math.frexp(float(exact))[1]
    unit = Fraction(2) ** (exponent - 24)
    return float(round(exact / unit) * unit)


def test_multiply_add_rounds_once(draw: Draw) -> None:
    x, y, z = draw(2000), draw(2000), draw(2000)
    exact = [Fraction(p) * Fraction(q) + Fraction(r) for p, q, r in zip(*(t.tolist() for t in (x, y, z)), strict=True)]
    assert multiply_add(x, y, z).tolist() == [nearest_fp32(each) for each in exact]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_multiply_add_sees_what_fp64_loses(sign: float) -> None:
    """x y = 2^-24 (1 +- 2^-33), half an FP32 step and a little; the little is below FP64's last bit."""
    u = 2.0**-11
    above = torch.tensor([2.0**-24 * (1 + u)]), torch.tensor([1 - u + u * u]), torch.tensor([1.0])
    below = torch.tensor([2.0**-24 * (1 - u)]), torch.tensor([1 + u + u * u]), torch.tensor([1 + 2.0**-23])
    for (x, y, z), nearest, twice in ((above, 1 + 2.0**-23, 1.0), (below, 1 + 2.0**-23, 1 + 2.0**-22)):
        assert multiply_add(sign * x, y, sign * z).item() == sign * nearest
        assert (x.double() * y.double() + z.double()).float().item() == twice  # the wrong variant


def test_mistakes_are_said_with_their_numbers(draw: Draw) -> None:
    with pytest.raises(ValueError, match="promotion = 48 is no multiple of the 32"):
        HopperAccumulator(48)
    with pytest.raises(ValueError, match="promotion = 0"):
        HopperAccumulator(0)
    with pytest.raises(ValueError, match=r"a is \[2, 3\] and b \[2, 4\]"):
        matmul(draw(2, 3), draw(2, 4), NEVER)
    with pytest.raises(ValueError, match="bfloat16"):
        matmul(draw(2, 3).bfloat16(), draw(2, 3), NEVER)
    wrong = Scales(a=torch.ones(2, 1), b=torch.ones(2, 2), width=128)
    with pytest.raises(ValueError, match=r"scales are \[2, 1\] and \[2, 2\]"):
        matmul(draw(2, 200), draw(2, 200), NEVER, wrong)
    narrow = Scales(a=torch.ones(2, 4), b=torch.ones(2, 4), width=50)
    with pytest.raises(ValueError, match="one scale per 50 of K cuts through"):
        matmul(draw(2, 200), draw(2, 200), NEVER, narrow)
