"""Products of FP8 matrices in the kernels, against the reference and against FP64 within the bound of FP32 sums."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dovetail.catalog.presets import load_model
from dovetail.numerics.formats.errors import tolerance
from dovetail.numerics.formats.quantize import dequantize, quantize
from dovetail.numerics.formats.quantized import Quantized, token_tiles, transposed
from dovetail.numerics.products import scaled_reference as reference
from dovetail.numerics.products.accumulators import HOPPER, Accumulator, Fp32Accumulator, HopperAccumulator
from dovetail.spec.model import Mla

pytest.importorskip("triton", reason="Triton is published for Linux only")

from dovetail.numerics.formats.quantize_triton import quantize_parts  # noqa: E402
from dovetail.numerics.products.scaled_blocks_triton import BLOCKINGS, Blocking, choose_blocking  # noqa: E402
from dovetail.numerics.products.scaled_triton import dgrad, fprop, masked_fprop, wgrad  # noqa: E402

Draw = Callable[..., Tensor]
CPU = torch.device("cpu")
DEVICE = torch.device("cuda") if torch.cuda.is_available() else CPU
ROW, COLUMN, BLOCK = (1, 128), (128, 1), (128, 128)
ACCUMULATORS: list[Accumulator] = [Fp32Accumulator(), HopperAccumulator(), HopperAccumulator(32)]
ONE_BLOCK = BLOCKINGS[0]  # few programs: the interpreter takes 10 to 20 ms for each
RAGGED = [[0, 0, 0, 0], [0, 1, 1, 2], [0, 3, 40, 40], [0, 0, 70, 75]]


def uneven(draw: Draw, rows: int, columns: int) -> Tensor:
    """Rows and columns of very different size, so that the scales of tiles differ and a wrong one is seen."""
    return draw(rows, columns) * torch.exp(2 * draw(rows, 1)) * torch.exp(2 * draw(1, columns))


def moved(quantized: Quantized, device: torch.device = DEVICE) -> Quantized:
    return replace(quantized, data=quantized.data.to(device), scale=quantized.scale.to(device))


def stacked(parts: Sequence[Quantized]) -> Quantized:
    """Matrices of one shape, as one."""
    data, scale = torch.stack([part.data for part in parts]), torch.stack([part.scale for part in parts])
    return replace(parts[0], data=data, scale=scale)


def by_kernel(
    a: Quantized,
    b: Quantized,
    accumulator: Accumulator = HOPPER,
    dtype: torch.dtype = torch.bfloat16,
    blocking: Blocking = ONE_BLOCK,
) -> Tensor:
    """a [M, K] by b [N, K] transposed: one group."""
    weight = replace(b, data=b.data[None], scale=b.scale[None])
    return fprop(a, weight, [0, len(a.data)], accumulator, dtype, blocking)


def bound(a: Quantized, b: Quantized) -> Tensor:
    """What sums over K may be wrong by: a share of the sum of magnitudes. FP32's roundings in the interpreter, whose
    products are FP32; the 13 fraction bits of 32 products and of their sums on Hopper."""
    magnitudes = dequantize(a, torch.float64).abs() @ dequantize(b, torch.float64).abs().t()
    share = tolerance(torch.float32, roundings=3, terms=a.data.shape[1])
    return magnitudes * (share if DEVICE.type == "cpu" else 2.0**-13 * 2)


def exact(a: Quantized, b: Quantized) -> Tensor:
    return dequantize(a, torch.float64) @ dequantize(b, torch.float64).t()


def integers(draw: Draw, rows: int, columns: int, tile: tuple[int, int]) -> Quantized:
    """Small whole numbers and scales that are powers of two: every sum is exact, in any order and in 13 bits."""
    values = draw(rows, columns, scale=1.0).round().clamp(-3, 3)
    plain = quantize(values, tile)
    return Quantized(
        data=values.to(torch.float8_e4m3fn),
        scale=torch.exp2(draw(*plain.scale.shape).round()),
        tile=tile,
    )


@pytest.mark.parametrize("tile", [ROW, BLOCK], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (5, 7, 128), (3, 130, 300), (130, 4, 129), (0, 3, 40), (3, 2, 0)], ids=str
)
def test_product_is_exact_but_for_its_sums(shape: tuple[int, ...], tile: tuple[int, int], draw: Draw) -> None:
    m, n, k = shape
    a, b = quantize(uneven(draw, m, k), ROW), quantize(uneven(draw, n, k), tile)
    for accumulator in ACCUMULATORS:
        actual = by_kernel(moved(a), moved(b), accumulator, torch.float32)
        assert actual.shape == (m, n) and actual.dtype == torch.float32
        assert ((actual.cpu() - exact(a, b)).abs() <= bound(a, b)).all()
    if k > 128:  # scales of other tiles of K are far off
        wrong = Quantized(data=a.data, scale=a.scale.flip(1), tile=ROW)
        assert ((exact(wrong, b) - exact(a, b)).abs() > bound(a, b)).any()


@pytest.mark.parametrize("blocking", BLOCKINGS, ids=lambda each: f"{each.rows}x{each.columns}")
@pytest.mark.parametrize("tile", [ROW, BLOCK], ids=str)
def test_every_blocking_has_the_reference_s_bits_where_sums_are_exact(
    blocking: Blocking, tile: tuple[int, int], draw: Draw
) -> None:
    a, b = integers(draw, 70, 300, ROW), integers(draw, 135, 300, tile)
    for dtype in (torch.float32, torch.bfloat16):
        actual = by_kernel(moved(a), moved(b), HopperAccumulator(), dtype, blocking)
        assert torch.equal(actual.cpu(), reference.product(a, b, dtype=dtype))


@pytest.mark.parametrize("accumulator", ACCUMULATORS, ids=str)
def test_output_is_rounded_once_to_nearest_even(accumulator: Accumulator, draw: Draw) -> None:
    a, b = moved(quantize(draw(9, 260), ROW)), moved(quantize(draw(33, 260), BLOCK))
    wide = by_kernel(a, b, accumulator, torch.float32)
    assert torch.equal(by_kernel(a, b, accumulator), wide.bfloat16())
    truncated = (wide.view(torch.int32) & -0x10000).view(torch.float32).bfloat16()
    assert not torch.equal(truncated, wide.bfloat16())


def test_dgrad_takes_the_transposed_weight_where_it_lies(draw: Draw) -> None:
    grad, weight = quantize(uneven(draw, 5, 200), ROW), quantize(uneven(draw, 200, 140), BLOCK)
    actual = by_kernel(moved(grad), transposed(moved(weight)), dtype=torch.float32)
    copied = dgrad(moved(grad), stacked([moved(weight)]), [0, 5], dtype=torch.float32, blocking=ONE_BLOCK)
    assert torch.equal(actual, copied)
    assert ((actual.cpu() - exact(grad, transposed(weight))).abs() <= bound(grad, transposed(weight))).all()


def test_tiles_of_the_left_side_may_be_higher(draw: Draw) -> None:
    """128x128 for activation gradients too: the paper's negative result [V3 App. B.2]."""
    a, b = integers(draw, 140, 200, BLOCK), integers(draw, 9, 200, BLOCK)
    assert torch.equal(by_kernel(moved(a), moved(b)).cpu(), reference.product(a, b))


def test_nothing_behind_the_last_column_is_read(draw: Draw) -> None:
    """E5M2, whose infinity times zero is NaN also in the interpreter, which takes E4M3's NaN for 480."""
    a, b = integers(draw, 5, 140, ROW), integers(draw, 7, 140, BLOCK)
    expected = reference.product(a, b)
    for side in (0, 1):
        parts = [a, b]
        wide = torch.full((len(parts[side].data), 256), torch.inf)
        wide[:, :140] = parts[side].data.float()
        data = wide.to(torch.float8_e5m2)[:, :140]
        parts[side] = Quantized(data=data, scale=parts[side].scale, tile=parts[side].tile, format="e5m2")
        actual = by_kernel(moved(parts[0]), moved(parts[1]))
        assert torch.equal(actual.cpu(), expected)


def test_formats_may_differ(draw: Draw) -> None:
    a, b = quantize(draw(6, 130), ROW, "e5m2"), quantize(draw(9, 130), BLOCK)
    actual = by_kernel(moved(a), moved(b), dtype=torch.float32)
    assert ((actual.cpu() - exact(a, b)).abs() <= bound(a, b)).all()


def test_every_code_is_read_as_the_number_it_is() -> None:
    """Each E4M3 number, subnormal ones and the largest too, times one; by FP8 and by widened products."""
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    a = Quantized(
        data=torch.zeros(len(numbers), 32).to(torch.float8_e4m3fn), scale=torch.ones(len(numbers), 1), tile=ROW
    )
    a.data[:, 3] = numbers
    b = Quantized(data=torch.ones(1, 32).to(torch.float8_e4m3fn), scale=torch.ones(1, 1), tile=BLOCK)
    for accumulator in ACCUMULATORS:
        actual = by_kernel(moved(a), moved(b), accumulator, torch.float32)
        assert torch.equal(actual.cpu()[:, 0], numbers.float())


@pytest.mark.parametrize("offsets", RAGGED, ids=str)
def test_grouped_rows_are_a_loop_over_experts(offsets: Sequence[int], draw: Draw) -> None:
    rows = quantize(uneven(draw, offsets[-1], 200), ROW)
    weights = [quantize(uneven(draw, 7, 200), BLOCK) for _ in range(3)]
    blocking = Blocking(rows=64, columns=32, warps=4, stages=2)
    actual = fprop(moved(rows), moved(stacked(weights)), offsets, dtype=torch.float32, blocking=blocking)
    expected = reference.fprop(rows, stacked(weights), offsets, dtype=torch.float32)
    assert actual.shape == expected.shape
    for e, weight in enumerate(weights):
        here = slice(offsets[e], offsets[e + 1])
        mine = Quantized(data=rows.data[here], scale=rows.scale[here], tile=ROW)
        assert ((actual.cpu()[here] - expected[here]).abs() <= 2 * bound(mine, weight)).all()


@pytest.mark.parametrize("counts", [[0, 0, 0], [1, 0, 5], [70, 3, 64]], ids=str)
def test_masked_rows_are_those_of_each_expert(counts: Sequence[int], draw: Draw) -> None:
    capacity = 70
    rows = integers(draw, 3 * capacity, 140, ROW)
    for e, count in enumerate(counts):  # what lies behind an expert's rows may be anything
        rows.data[e * capacity + count : (e + 1) * capacity] = torch.nan
    weights = [integers(draw, 9, 140, BLOCK) for _ in range(3)]
    numbers = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    blocking = Blocking(rows=64, columns=32, warps=4, stages=2)
    actual = masked_fprop(moved(rows), moved(stacked(weights)), numbers, blocking=blocking).cpu()
    expected = reference.masked_fprop(rows, stacked(weights), numbers.cpu())
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    for e, count in enumerate(counts):
        here = slice(e * capacity, e * capacity + count)
        assert torch.equal(actual[here], expected[here])


@pytest.mark.parametrize("tokens", [0, 1, 128, 300])
def test_wgrad_sums_over_tokens(tokens: int, draw: Draw) -> None:
    grad, x = quantize(uneven(draw, tokens, 6), COLUMN), quantize(uneven(draw, tokens, 9), COLUMN)
    actual = wgrad(moved(grad), moved(x), [0, tokens], dtype=torch.float32)
    assert actual.shape == (1, 6, 9) and actual.dtype == torch.float32
    assert (
        (actual[0].cpu() - exact(transposed(grad), transposed(x))).abs() <= bound(transposed(grad), transposed(x))
    ).all()


@pytest.mark.parametrize("offsets", [*RAGGED, [0, 128, 128, 384], [0, 130, 131, 301]], ids=str)
def test_grouped_wgrad_sums_over_each_expert_s_tokens(offsets: Sequence[int], draw: Draw) -> None:
    grad = in_columns(uneven(draw, offsets[-1], 6), offsets)
    x = in_columns(uneven(draw, offsets[-1], 9), offsets)
    actual = wgrad(grad, x, offsets, dtype=torch.float32, blocking=ONE_BLOCK).cpu()
    assert actual.shape == (3, 6, 9)
    expected = reference.wgrad(moved(grad, CPU), moved(x, CPU), offsets, dtype=torch.float32)
    share = tolerance(torch.float32, roundings=6, terms=max(offsets[-1], 1)) if DEVICE.type == "cpu" else 2.0**-12
    for e in range(3):
        empty = offsets[e] == offsets[e + 1]
        assert not empty or not actual[e].any()
        magnitudes = outer_of_magnitudes(grad, x, offsets, e)
        assert ((actual[e] - expected[e]).abs() <= share * magnitudes).all()


def in_columns(x: Tensor, offsets: Sequence[int]) -> Quantized:
    return quantize_parts(x.to(DEVICE), token_tiles(offsets)[0], COLUMN)


def outer_of_magnitudes(left: Quantized, right: Quantized, offsets: Sequence[int], expert: int) -> Tensor:
    """|left|^T |right| over the rows of one expert, FP64."""
    tiles = [-(-(stop - start) // 128) for start, stop in zip(offsets, offsets[1:], strict=False)]
    first, here = sum(tiles[:expert]), slice(offsets[expert], offsets[expert + 1])
    parts = []
    for each in (moved(left, CPU), moved(right, CPU)):
        scale = each.scale[first : first + tiles[expert]].repeat_interleave(128, 0)[: here.stop - here.start]
        parts.append((each.data[here].double() * scale.double()).abs())
    return parts[0].t() @ parts[1]


def test_shapes_of_the_published_model(draw: Draw) -> None:
    """Its products, K a 32nd of what it is and N a 128th."""
    spec = load_model("deepseek-v3")
    assert isinstance(spec.attention, Mla) and spec.attention.q_lora_rank is not None and spec.moe is not None
    hidden, mla = spec.hidden_size, spec.attention
    shapes = [
        (mla.q_lora_rank + mla.kv_lora_rank + mla.qk_rope_head_dim, hidden),
        (mla.num_attention_heads * mla.qk_head_dim, mla.q_lora_rank),
        (mla.num_attention_heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank),
        (hidden, mla.num_attention_heads * mla.v_head_dim),
        (2 * spec.moe.moe_intermediate_size, hidden),
        (hidden, spec.moe.moe_intermediate_size),
    ]
    assert shapes == [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
    for n, k in shapes:
        a, b = integers(draw, 3, k // 32, ROW), integers(draw, n // 128, k // 32, BLOCK)
        actual = by_kernel(moved(a), moved(b))
        assert torch.equal(actual.cpu(), reference.product(a, b))


def test_blocks_are_chosen_so_that_the_last_finishes_first() -> None:
    assert choose_blocking([64], 2112).columns == 16  # 132 blocks for 132 multiprocessors
    assert choose_blocking([4096], 7168) == BLOCKINGS[0]
    assert choose_blocking([64] * 8, 4096).rows == 64
    assert choose_blocking([0], 100) in BLOCKINGS


def test_wrong_inputs_are_refused(draw: Draw) -> None:
    a, b = moved(quantize(draw(4, 256), ROW)), moved(quantize(draw(5, 256), BLOCK))
    with pytest.raises(ValueError, match=r"promotion = 512 with one scale per 128 of K = 256"):
        by_kernel(a, b, HopperAccumulator(512))
    with pytest.raises(ValueError, match="promotion = None"):
        by_kernel(a, b, HopperAccumulator(None))
    with pytest.raises(ValueError, match=r"\[4, 256\] and b \[1, 5, 128\]"):
        by_kernel(a, moved(quantize(draw(5, 128), BLOCK)))
    with pytest.raises(ValueError, match=r"differ in width"):
        by_kernel(a, moved(quantize(draw(5, 256), (64, 64))))
    with pytest.raises(ValueError, match=r"scale has shape \[1, 2\], not \[4, 2\]: data is \[4, 256\]"):
        by_kernel(Quantized(data=a.data, scale=a.scale[:1], tile=ROW), b)
    with pytest.raises(ValueError, match="uint16"):
        by_kernel(moved(quantize(draw(4, 256), ROW, "e5m6")), b)
    with pytest.raises(ValueError, match=r"offsets \[0, 2, 3\] do not divide 4 rows among 2 experts"):
        fprop(a, stacked([b, b]), [0, 2, 3])
    with pytest.raises(ValueError, match="4 rows for 3 experts"):
        masked_fprop(a, stacked([b, b, b]), torch.zeros(3, dtype=torch.int32, device=DEVICE))
    with pytest.raises(ValueError, match="rows of 2 experts, in tiles of height 128"):
        fprop(b, stacked([b, b]), [0, 2, 5])
    with pytest.raises(ValueError, match=r"experts with rows \[0, 3, 4\] need FP8 in tiles \[128, 1\]"):
        wgrad(in_columns(draw(4, 8), [0, 4]), in_columns(draw(4, 8), [0, 4]), [0, 3, 4])
