"""The three products on quantised operands against loops over tiles, and against FP64 within the bound of FP32 sums."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dovetail.numerics.formats.errors import elementwise_error, tolerance
from dovetail.numerics.formats.quantize import dequantize, quantize
from dovetail.numerics.formats.quantized import Quantized, transposed
from dovetail.numerics.products.accumulate import matmul
from dovetail.numerics.products.accumulators import Accumulator, Fp32Accumulator, HopperAccumulator
from dovetail.numerics.products.scaled_reference import dgrad, fprop, masked_fprop, product, wgrad

Draw = Callable[..., Tensor]
ROW, COLUMN, BLOCK = (1, 128), (128, 1), (128, 128)
ACCUMULATORS: list[Accumulator] = [
    Fp32Accumulator(),
    HopperAccumulator(),
    HopperAccumulator(32),
    HopperAccumulator(None),
]


def uneven(draw: Draw, rows: int, columns: int) -> Tensor:
    """Rows and columns of very different size, so that the scales of tiles differ and a wrong one is seen."""
    return draw(rows, columns) * torch.exp(2 * draw(rows, 1)) * torch.exp(2 * draw(1, columns))


def stacked(parts: Sequence[Quantized]) -> Quantized:
    """Matrices of one shape, as one."""
    data, scale = torch.stack([part.data for part in parts]), torch.stack([part.scale for part in parts])
    return replace(parts[0], data=data, scale=scale)


def row_scales(quantized: Quantized, tile: int) -> Tensor:
    """The scale of every row in one tile of K."""
    return quantized.scale[:, tile].repeat_interleave(quantized.tile[0])[: len(quantized.data)]


def by_tiles(a: Quantized, b: Quantized, accumulator: Accumulator) -> Tensor:
    """FP64 sum over tiles of 128 of scale times the tile's partial sum."""
    left, right = a.data.float(), b.data.float()
    total = torch.zeros(len(left), len(right), dtype=torch.float64)
    for tile in range(a.scale.shape[1]):
        k = slice(128 * tile, 128 * tile + 128)
        partial = matmul(left[:, k], right[:, k], accumulator).double()
        total += partial * (row_scales(a, tile)[:, None] * row_scales(b, tile)).double()
    return total


def fp32_bound(a: Quantized, b: Quantized) -> Tensor:
    """What FP32 sums over K may be wrong by: a share of the sum of magnitudes."""
    magnitudes = dequantize(a, torch.float64).abs() @ dequantize(b, torch.float64).abs().t()
    return tolerance(torch.float32, roundings=3, terms=a.data.shape[1]) * magnitudes


@pytest.mark.parametrize("tile", [ROW, BLOCK], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (5, 7, 128), (3, 130, 300), (130, 4, 129), (0, 3, 40), (3, 2, 0)], ids=str
)
def test_fprop_is_the_exact_product_but_for_fp32_sums(
    shape: tuple[int, ...], tile: tuple[int, int], draw: Draw
) -> None:
    m, n, k = shape
    a, b = quantize(uneven(draw, m, k), ROW), quantize(uneven(draw, n, k), tile)
    actual = product(a, b, dtype=torch.float32)
    exact = dequantize(a, torch.float64) @ dequantize(b, torch.float64).t()
    assert actual.shape == (m, n) and actual.dtype == torch.float32
    assert ((actual - exact).abs() <= fp32_bound(a, b)).all()


@pytest.mark.parametrize("accumulator", ACCUMULATORS[:3], ids=str)
def test_each_tile_is_summed_apart_and_scaled_after(accumulator: Accumulator, draw: Draw) -> None:
    a, b = quantize(uneven(draw, 6, 300), ROW), quantize(uneven(draw, 140, 300), BLOCK)
    actual = product(a, b, accumulator, dtype=torch.float32)
    sums = fp32_bound(a, b) * tolerance(torch.float32, terms=12) / tolerance(torch.float32, roundings=3, terms=300)
    assert ((actual - by_tiles(a, b, accumulator)).abs() <= sums).all()


def test_one_tile_with_scales_that_are_powers_of_two_is_exact(draw: Draw) -> None:
    """Nothing is rounded after the accumulator: bit for bit its result."""
    a, b = quantize(draw(6, 128), ROW, power_of_two=True), quantize(draw(9, 128), ROW, power_of_two=True)
    for accumulator in ACCUMULATORS[:2]:
        expected = matmul(a.data.float(), b.data.float(), accumulator) * (a.scale * b.scale.t())
        assert torch.equal(product(a, b, accumulator, dtype=torch.float32), expected)


@pytest.mark.parametrize("accumulator", ACCUMULATORS, ids=str)
def test_output_is_rounded_once(accumulator: Accumulator, draw: Draw) -> None:
    a, b = quantize(draw(4, 200), ROW), quantize(draw(5, 200), BLOCK)
    wide = product(a, b, accumulator, dtype=torch.float32)
    assert torch.equal(product(a, b, accumulator), wide.bfloat16())


def test_dgrad_is_the_product_with_the_transposed_weight(draw: Draw) -> None:
    grad, weight = quantize(uneven(draw, 5, 200), ROW), quantize(uneven(draw, 200, 140), BLOCK)
    actual = dgrad(grad, stacked([weight]), [0, 5], dtype=torch.float32)
    again = quantize(dequantize(weight).t().contiguous(), BLOCK)
    assert torch.equal(transposed(weight).data.float(), again.data.float())  # blocks need no second quantisation
    exact = dequantize(grad, torch.float64) @ dequantize(weight, torch.float64)
    assert ((actual - exact).abs() <= fp32_bound(grad, transposed(weight))).all()
    wrong = Quantized(data=weight.data.t(), scale=weight.scale.t().flip(0), tile=BLOCK)
    assert ((product(grad, wrong, dtype=torch.float32) - exact).abs() > fp32_bound(grad, wrong)).any()


@pytest.mark.parametrize("tokens", [0, 1, 128, 300])
def test_wgrad_sums_over_tokens(tokens: int, draw: Draw) -> None:
    grad, x = quantize(uneven(draw, tokens, 6), COLUMN), quantize(uneven(draw, tokens, 9), COLUMN)
    actual = wgrad(grad, x, [0, tokens], dtype=torch.float32)
    assert actual.shape == (1, 6, 9) and actual.dtype == torch.float32
    exact = dequantize(grad, torch.float64).t() @ dequantize(x, torch.float64)
    assert ((actual[0] - exact).abs() <= fp32_bound(transposed(grad), transposed(x))).all()


@pytest.mark.parametrize("accumulator", ACCUMULATORS, ids=str)
@pytest.mark.parametrize("offsets", [[0, 0, 0, 0], [0, 32, 32, 64], [0, 1, 10, 27]], ids=str)
def test_grouped_rows_are_a_loop_over_experts(offsets: Sequence[int], accumulator: Accumulator, draw: Draw) -> None:
    rows = quantize(uneven(draw, offsets[-1], 200), ROW)
    weights = [quantize(uneven(draw, 7, 200), BLOCK) for _ in range(3)]
    actual = fprop(rows, stacked(weights), offsets, accumulator)
    assert actual.shape == (offsets[-1], 7) and actual.dtype == torch.bfloat16
    for row in range(offsets[-1]):
        expert = next(e for e in range(3) if row < offsets[e + 1])
        alone = Quantized(data=rows.data[row : row + 1], scale=rows.scale[row : row + 1], tile=ROW)
        assert torch.equal(actual[row], product(alone, weights[expert], accumulator)[0])


def tiled_by_expert(x: Tensor, offsets: Sequence[int]) -> Quantized:
    parts = [quantize(x[start:stop], COLUMN) for start, stop in zip(offsets, offsets[1:], strict=False)]
    data = torch.cat([part.data.float() for part in parts]).to(parts[0].data.dtype)
    return Quantized(data=data, scale=torch.cat([part.scale for part in parts]), tile=COLUMN)


@pytest.mark.parametrize("accumulator", ACCUMULATORS[:2], ids=str)
@pytest.mark.parametrize("offsets", [[0, 0, 0, 0], [0, 128, 128, 384], [0, 1, 130, 161]], ids=str)
def test_grouped_tokens_are_a_loop_over_experts(offsets: Sequence[int], accumulator: Accumulator, draw: Draw) -> None:
    grads, rows = uneven(draw, offsets[-1], 5), uneven(draw, offsets[-1], 8)
    actual = wgrad(*(tiled_by_expert(x, offsets) for x in (grads, rows)), offsets, accumulator)
    assert actual.shape == (3, 5, 8)
    for e in range(3):
        here = slice(offsets[e], offsets[e + 1])
        alone = product(*(transposed(quantize(x[here], COLUMN)) for x in (grads, rows)), accumulator)
        assert torch.equal(actual[e], alone)
        assert here.start < here.stop or not actual[e].any()


def test_aligned_groups_need_not_be_tiled_one_by_one(draw: Draw) -> None:
    offsets, x = [0, 128, 128, 384], uneven(draw, 384, 3)
    whole, parts = quantize(x, COLUMN), tiled_by_expert(x, offsets)
    assert torch.equal(wgrad(whole, whole, offsets), wgrad(parts, parts, offsets))


def test_a_scale_per_tensor_is_a_tile_of_its_size(draw: Draw) -> None:
    x, w = draw(6, 300), draw(4, 300)
    a, b = quantize(x, (6, 300)), quantize(w, BLOCK)
    actual = product(a, b, dtype=torch.float32)
    exact = dequantize(a, torch.float64) @ dequantize(b, torch.float64).t()
    assert a.scale.shape == (1, 1) and ((actual - exact).abs() <= fp32_bound(a, b)).all()


def test_leaving_out_promotion_is_seen(draw: Draw) -> None:
    a, b = quantize(draw(4, 2048).abs(), ROW), quantize(draw(4, 2048).abs(), BLOCK)
    results = [product(a, b, HopperAccumulator(n), dtype=torch.float32) for n in (128, None)]
    exact = product(a, b, dtype=torch.float32)
    with_promotion, without = (elementwise_error(result, exact) for result in results)
    assert without > 10 * with_promotion > 10 * tolerance(torch.float32, terms=2048)


def test_other_formats_are_multiplied_too(draw: Draw) -> None:
    a, b = quantize(draw(3, 130), ROW, format="e5m2"), quantize(draw(4, 130), BLOCK)
    exact = dequantize(a, torch.float64) @ dequantize(b, torch.float64).t()
    assert ((product(a, b, dtype=torch.float32) - exact).abs() <= fp32_bound(a, b)).all()
    wide = quantize(draw(3, 130), ROW, format="e5m6")
    exact = dequantize(wide, torch.float64) @ dequantize(b, torch.float64).t()
    assert ((product(wide, b, dtype=torch.float32) - exact).abs() <= fp32_bound(wide, b)).all()


def test_mistakes_are_said_with_their_numbers(draw: Draw) -> None:
    a, b = quantize(draw(4, 256), ROW), quantize(draw(5, 256), BLOCK)
    with pytest.raises(ValueError, match=r"a is \[4, 256\] and b \[5, 300\]"):
        product(a, quantize(draw(5, 300), BLOCK))
    with pytest.raises(ValueError, match=r"scale has shape \[4, 1\], not \[4, 2\]"):
        product(Quantized(data=a.data, scale=a.scale[:, :1], tile=ROW), b)
    with pytest.raises(ValueError, match=r"\[1, 96\] of a and \[128, 128\] of b share no grid"):
        product(quantize(draw(4, 256), (1, 96)), b)
    with pytest.raises(ValueError, match=r"offsets \[0, 3\] do not divide 4 rows among 1 experts"):
        fprop(a, stacked([b]), [0, 3])
    with pytest.raises(ValueError, match="rows of 2 experts, in tiles of height 128; expected experts, and height 1"):
        fprop(b, stacked([b, b]), [0, 2, 5])
    shared = quantize(draw(200, 3), COLUMN)
    with pytest.raises(ValueError, match="2 rows of scales, not 3: experts with rows .* were not tiled one by one"):
        wgrad(shared, shared, [0, 150, 200])


@pytest.mark.parametrize("counts", [[0, 0, 0], [1, 0, 5], [7, 3, 9]], ids=str)
def test_masked_rows_are_products_of_each_expert_s_first_rows(counts: Sequence[int], draw: Draw) -> None:
    """More than fit are cut; what lies behind the counted rows is not read, NaN or not, and stays zero."""
    capacity = 7
    rows = quantize(uneven(draw, 3 * capacity, 140), ROW)
    weights = [quantize(uneven(draw, 9, 140), BLOCK) for _ in counts]
    numbers = torch.tensor(counts, dtype=torch.int32)
    places = [(e * capacity, min(count, capacity)) for e, count in enumerate(counts)]
    expected = torch.zeros(3 * capacity, 9, dtype=torch.bfloat16)
    for (first, count), weight in zip(places, weights, strict=True):
        mine = slice(first, first + count)
        mine_alone = Quantized(data=rows.data[mine], scale=rows.scale[mine], tile=ROW)
        expected[mine] = product(mine_alone, weight)
        rows.data[first + count : first + capacity] = torch.nan
    actual = masked_fprop(rows, stacked(weights), numbers)
    assert actual.dtype == torch.bfloat16 and torch.equal(actual, expected)


def test_masked_rows_that_do_not_fit_are_refused(draw: Draw) -> None:
    rows, weight = quantize(draw(4, 128), ROW), quantize(draw(5, 128), BLOCK)
    with pytest.raises(ValueError, match="4 rows for 3 experts"):
        masked_fprop(rows, stacked([weight] * 3), torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"counts torch.int64 \[2\]"):
        masked_fprop(rows, stacked([weight] * 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="tiles of height 128"):
        masked_fprop(quantize(draw(4, 128), BLOCK), stacked([weight] * 2), torch.zeros(2, dtype=torch.int32))
