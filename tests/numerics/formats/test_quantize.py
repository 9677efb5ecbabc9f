import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dovetail.numerics.formats.floats import E4M3, decode, encode, float_format, pack_e5m6, round_to, unpack_e5m6
from dovetail.numerics.formats.quantize import dequantize, quantize, quantize_weight
from dovetail.numerics.formats.quantized import AMAX_FLOOR, Quantized, grid_values, spread_scale

Draw = Callable[..., Tensor]
TILES = [(1, 128), (128, 1), (128, 128)]


def round_to_e4m3(value: float) -> float:
    """E4M3 from its definition: 3 mantissa bits, smallest exponent -6, ties to even, saturating."""
    if value == 0:
        return value
    step = 2.0 ** (max(math.floor(math.log2(abs(value))), -6) - 3)
    return math.copysign(min(round(abs(value) / step) * step, E4M3.max), value)


def quantize_by_loops(weight: Tensor, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """One block at a time, one element at a time, in numpy FP32."""
    array = weight.float().numpy()
    rows, columns = array.shape
    data = np.zeros_like(array)
    scale = np.zeros((math.ceil(rows / tile), math.ceil(columns / tile)), dtype=np.float32)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = array[i * tile : (i + 1) * tile, j * tile : (j + 1) * tile]
            scale[i, j] = max(np.abs(block).max(), np.float32(AMAX_FLOOR)) / np.float32(E4M3.max)
            for r in range(block.shape[0]):
                for c in range(block.shape[1]):
                    quotient = float(np.float32(block[r, c]) / scale[i, j])
                    data[i * tile + r, j * tile + c] = round_to_e4m3(quotient)
    return data, scale


def random_weight(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(2 * torch.randn(rows, 1, generator=generator))  # rows differ, so blocks do
    return (0.02 * spread * torch.randn(rows, columns, generator=generator)).to(dtype)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (8, 8), (9, 17), (16, 5), (7, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantising_is_bitwise_the_plain_loop(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = random_weight(rows, columns, seed=rows * columns, dtype=dtype)
    quantized = quantize_weight(weight, tile=(8, 8))
    data, scale = quantize_by_loops(weight, tile=8)
    assert quantized.data.dtype == torch.float8_e4m3fn
    assert np.array_equal(quantized.data.float().numpy(), data)
    assert np.array_equal(quantized.scale.numpy(), scale)


@pytest.mark.parametrize(
    ("shape", "scales"),
    [((576, 200), (5, 2)), ((128, 128), (1, 1)), ((129, 127), (2, 1)), ((1, 300), (1, 3))],
)
def test_ragged_edges_have_a_scale_of_their_own(shape: tuple[int, int], scales: tuple[int, int]) -> None:
    weight = random_weight(*shape, seed=1)
    quantized = quantize_weight(weight)
    assert tuple(quantized.scale.shape) == scales
    assert quantized.data.shape == weight.shape
    last = weight[(scales[0] - 1) * 128 :, (scales[1] - 1) * 128 :]
    assert quantized.scale[-1, -1] == last.abs().max() / E4M3.max


@pytest.mark.parametrize("power_of_two", [False, True])
def test_error_is_within_half_a_step_of_the_format(power_of_two: bool) -> None:
    weight = random_weight(300, 260, seed=2)
    quantized = quantize_weight(weight, power_of_two=power_of_two)
    scale = quantized.scale.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :260]
    # three mantissa bits: half a step is 2^-4 of the value, and 2^-10 of the scale among the subnormals;
    # the FP32 division and product add 2^-23 each
    bound = torch.maximum(weight.abs() * 2**-4, scale * 2**-10) * (1 + 2**-3) + weight.abs() * 2**-22
    assert ((dequantize(quantized) - weight).abs() <= bound).all()


def test_scale_is_the_multiplier_and_not_its_inverse() -> None:
    weight = random_weight(130, 130, seed=3)
    quantized = quantize_weight(weight)
    inverse = Quantized(data=quantized.data, scale=1 / quantized.scale, tile=quantized.tile)
    assert (dequantize(quantized) - weight).norm() < 0.05 * weight.norm()
    assert (dequantize(inverse) - weight).norm() > 10 * weight.norm()  # the wrong variant is far off


def test_dequantising_by_the_transposed_scale_is_wrong() -> None:
    weight = random_weight(256, 256, seed=4)
    quantized = quantize_weight(weight)
    transposed = Quantized(data=quantized.data, scale=quantized.scale.T.contiguous(), tile=quantized.tile)
    assert (dequantize(transposed) - weight).norm() > 0.2 * weight.norm()


def test_power_of_two_scales_round_up_and_are_exact() -> None:
    weight = random_weight(256, 384, seed=5)
    plain, rounded = quantize_weight(weight).scale, quantize_weight(weight, power_of_two=True).scale
    mantissa, _ = torch.frexp(rounded)
    assert (mantissa == 0.5).all()
    assert (rounded >= plain).all() and (rounded < 2 * plain).all()
    exact = torch.full((128, 128), 448.0 * 2**-9)  # this scale is a power of two already
    assert quantize_weight(exact, power_of_two=True).scale.item() == 2**-9


def test_power_of_two_quantising_is_idempotent_even_through_bf16() -> None:
    once = dequantize(quantize_weight(random_weight(200, 136, seed=6), power_of_two=True), torch.bfloat16)
    again = dequantize(quantize_weight(once, power_of_two=True), torch.bfloat16)
    assert torch.equal(once, again)


def test_zeros_stay_zero_and_have_a_finite_positive_scale() -> None:
    quantized = quantize_weight(torch.zeros(140, 3))
    assert (quantized.scale > 0).all() and torch.isfinite(quantized.scale).all()
    assert torch.equal(dequantize(quantized), torch.zeros(140, 3))


def test_block_below_the_amax_floor_keeps_its_values() -> None:
    weight = random_weight(64, 64, seed=7) * 1e-6
    assert weight.abs().max() < AMAX_FLOOR
    quantized = quantize_weight(weight)
    assert quantized.scale.item() == pytest.approx(AMAX_FLOOR / E4M3.max)
    step = quantized.scale.item() * 2**-9  # the subnormal step
    assert ((dequantize(quantized) - weight).abs() <= torch.maximum(weight.abs() / 15, torch.tensor(step))).all()


@pytest.mark.parametrize("power_of_two", [False, True])
def test_largest_values_are_finite_and_reach_448(power_of_two: bool) -> None:
    weight = torch.tensor([[3.0e38, -3.0e38], [1.0, 0.0]])
    quantized = quantize_weight(weight, power_of_two=power_of_two)
    assert torch.isfinite(quantized.data.float()).all()
    assert power_of_two or quantized.data.float().abs().max() == E4M3.max
    assert torch.allclose(dequantize(quantized), weight, rtol=2**-4, atol=1e30)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_non_finite_weights_never_come_back_finite(bad: float, power_of_two: bool) -> None:
    weight = torch.ones(4, 8)
    weight[1, 5] = bad
    restored = dequantize(quantize_weight(weight, tile=(4, 4), power_of_two=power_of_two))
    assert torch.isnan(restored[:, 4:]).any()
    assert not torch.isfinite(restored[1, 5])
    assert torch.isfinite(restored[:, :4]).all()  # the other block is untouched


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_matrices_pass(shape: tuple[int, int]) -> None:
    restored = dequantize(quantize_weight(torch.zeros(shape)))
    assert tuple(restored.shape) == shape


def test_non_contiguous_input_equals_its_copy() -> None:
    weight = random_weight(150, 140, seed=8).T
    quantized, copied = quantize_weight(weight), quantize_weight(weight.contiguous())
    assert torch.equal(quantized.data.float(), copied.data.float())
    assert torch.equal(quantized.scale, copied.scale)
    assert quantized.data.is_contiguous()


def test_wrong_inputs_are_refused_with_their_shape() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3, 4\]"):
        quantize_weight(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="int64"):
        quantize_weight(torch.zeros(2, 3, dtype=torch.int64))
    good = quantize_weight(torch.zeros(130, 3))
    with pytest.raises(ValueError, match=r"\[1, 1\], not \[2, 1\]"):
        dequantize(Quantized(data=good.data, scale=good.scale[:1], tile=good.tile))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("format", ["e4m3", "e5m2", "e5m6", "e3m4", "e4m7"])
@pytest.mark.parametrize("tile", [(1, 8), (8, 1), (8, 8)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 19), (17, 3), (10, 17), (8, 16)], ids=str)
def test_tiles_are_rounded_as_their_definition_says(
    shape: tuple[int, int], tile: tuple[int, int], format: str, power_of_two: bool, draw: Draw
) -> None:
    """Tile by tile: the scale from its largest value, the values on the format's grid."""
    x, fmt = draw(*shape) * torch.exp(2 * draw(*shape)), float_format(format)
    quantized = quantize(x, tile, format, power_of_two)
    assert quantized.tile == tile and quantized.format == format
    for i, rows in enumerate(x.split(tile[0])):
        for j, block in enumerate(rows.split(tile[1], dim=1)):
            scale = block.abs().max().clamp(min=AMAX_FLOOR) / fmt.max
            if power_of_two:
                scale = torch.tensor(2.0 ** math.ceil(math.log2(scale.double().item())))
            assert quantized.scale[i, j] == scale
            got = grid_values(quantized)[i * tile[0] :, j * tile[1] :][: block.shape[0], : block.shape[1]]
            assert torch.equal(got, round_to(block / scale, fmt))


@pytest.mark.parametrize("format", ["e4m3", "e5m2", "e5m6", "e3m4", "e4m7"])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_error_of_every_format_is_half_a_step(tile: tuple[int, int], format: str, draw: Draw) -> None:
    x, fmt = draw(150, 260), float_format(format)
    quantized = quantize(x, tile, format)
    scale = spread_scale(quantized)
    half_step = torch.maximum(x.abs() * 2.0 ** (-1 - fmt.mantissa_bits), scale * fmt.smallest_subnormal / 2)
    roundings = x.abs() * 2**-22  # the FP32 division and product
    assert ((dequantize(quantized) - x).abs() <= half_step + roundings).all()


@pytest.mark.parametrize(
    ("format", "dtype"),
    [
        ("e4m3", torch.float8_e4m3fn),
        ("E5M2", torch.float8_e5m2),
        ("e5m6", torch.uint16),
        ("e3m4", torch.uint8),
        ("e6m9", torch.uint16),
    ],
)
def test_data_is_a_torch_type_or_codes(format: str, dtype: torch.dtype, draw: Draw) -> None:
    x = draw(3, 130)
    quantized = quantize(x, (1, 128), format)
    assert quantized.data.dtype == dtype and quantized.data.shape == x.shape and quantized.data.is_contiguous()
    assert quantized.scale.dtype == torch.float32 and quantized.scale.shape == (3, 2)
    if dtype.is_floating_point:
        codes = encode(grid_values(quantized), float_format(format))
        assert torch.equal(codes, quantized.data.view(torch.uint8))
    else:
        assert torch.equal(decode(quantized.data, float_format(format)), grid_values(quantized))


def test_e5m6_data_survives_packing(draw: Draw) -> None:
    quantized = quantize(draw(5, 136), (1, 128), "e5m6", power_of_two=True)
    packed = pack_e5m6(quantized.data)
    assert packed.numel() == quantized.data.numel() * 12 // 8
    assert torch.equal(unpack_e5m6(packed), quantized.data)


def test_weights_are_published_as_quantize_makes_them(draw: Draw) -> None:
    weight = draw(300, 200, dtype=torch.bfloat16)
    plain, published = quantize(weight, (128, 128)), quantize_weight(weight)
    assert torch.equal(plain.scale, published.scale) and published.scale.shape == (3, 2)
    assert torch.equal(plain.data.view(torch.uint8), published.data.view(torch.uint8))


def test_column_tiles_are_row_tiles_of_the_transpose(draw: Draw) -> None:
    x = draw(200, 9)
    columns, rows = quantize(x, (128, 1)), quantize(x.t(), (1, 128))
    assert torch.equal(columns.scale, rows.scale.t())
    assert torch.equal(columns.data.float(), rows.data.float().t())


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_matrices_pass_in_every_tile(shape: tuple[int, int], tile: tuple[int, int]) -> None:
    quantized = quantize(torch.zeros(shape), tile, "e5m6")
    assert dequantize(quantized).shape == shape


@pytest.mark.parametrize("format", ["e4m3", "e5m6"])
def test_not_a_number_is_refused_or_stays_one(format: str) -> None:
    x = torch.ones(4, 300)
    x[1, 5], x[2, 7], x[2, 8] = math.nan, math.inf, -math.inf
    with pytest.raises(ValueError, match=r"grad of o_proj, shape \[4, 300\], holds 1 NaN and 2 infinite values"):
        quantize(x, (1, 128), format, name="grad of o_proj")
    restored = dequantize(quantize(x, (1, 128), format, check=False))
    assert restored[1, 5].isnan() and not restored[2, 7:9].isfinite().any()
    assert restored[[0, 3]].isfinite().all() and restored[:, 128:].isfinite().all()


def test_wrong_formats_and_tiles_are_refused() -> None:
    x = torch.zeros(3, 130)
    with pytest.raises(ValueError, match=r"'e4m33'.*1 to 22"):
        quantize(x, (1, 128), "e4m33")
    with pytest.raises(ValueError, match="did you mean e5m6"):
        quantize(x, (1, 128), "e5n6")
    with pytest.raises(ValueError, match="'bf16' has FP32's range"):
        quantize(x, (1, 128), "bf16")
    with pytest.raises(ValueError, match=r"tile \[0, 128\] of a \[3, 130\] matrix"):
        quantize(x, (0, 128))
    with pytest.raises(ValueError, match=r"x is torch.float32 with shape \[130\]"):
        quantize(x[0], (1, 128), name="x")
    good = quantize(x, (1, 128), "e5m6")
    with pytest.raises(ValueError, match=r"e5m6 data .* not torch.int64 \[3, 130\]"):
        dequantize(Quantized(data=good.data.long(), scale=good.scale, tile=good.tile, format="e5m6"))
