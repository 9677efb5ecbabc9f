"""The LogFMT kernels have the reference's bits; with FP32 inside, its error."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dovetail.numerics.formats import logfmt as reference
from dovetail.numerics.formats.quantized import LogFmt

pytest.importorskip("triton", reason="Triton is published for Linux only")

from dovetail.numerics.formats import logfmt_triton  # noqa: E402
from dovetail.numerics.formats.logfmt_triton import decode, encode  # noqa: E402

Draw = Callable[..., Tensor]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def moved(encoded: LogFmt, device: torch.device = DEVICE) -> LogFmt:
    parts = (part.to(device) for part in (encoded.data, encoded.minimum, encoded.step))
    data, minimum, step = parts
    return LogFmt(data=data, minimum=minimum, step=step, bits=encoded.bits, columns=encoded.columns)


def assert_same(actual: LogFmt, expected: LogFmt) -> None:
    back = moved(actual, torch.device("cpu"))
    assert (back.bits, back.columns) == (expected.bits, expected.columns)
    for mine, theirs in ((back.minimum, expected.minimum), (back.step, expected.step)):
        assert torch.equal(mine.view(torch.int32), theirs.view(torch.int32))
    assert torch.equal(back.data, expected.data)


def hard_rows(draw: Draw, dtype: torch.dtype) -> Tensor:
    """Zeros, one magnitude, nearly one, 60 octaves, subnormal numbers, the largest ones."""
    x = draw(9, 300)
    is_even = torch.arange(300) % 2 == 0
    x[1], x[2], x[3, ::3] = 0, -0.75, 0
    x[4] = torch.where(is_even, 1.0, 1.0078125)
    x[5] = torch.exp2(torch.linspace(-30, 30, 300))
    x[6] = torch.where(is_even, 1e-42, 2e-40)
    x[7] = torch.where(is_even, 3e38, -1e33)
    x[8] *= 1e-30
    return x.to(dtype)


@pytest.mark.parametrize("bits", range(4, 13))
def test_bits_are_the_reference(bits: int, draw: Draw) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = hard_rows(draw, dtype)
        expected = reference.encode(x, bits)
        assert_same(encode(x.to(DEVICE), bits), expected)
        for result in (torch.float32, torch.bfloat16):
            assert torch.equal(decode(moved(expected), result).cpu(), reference.decode(expected, result))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (1, 128), (3, 129), (17, 7)], ids=str)
def test_shapes(shape: tuple[int, int], draw: Draw) -> None:
    x = draw(*shape)
    expected = reference.encode(x, 10)
    actual = encode(x.to(DEVICE), 10)
    assert_same(actual, expected)
    assert actual.num_bytes == expected.num_bytes
    assert torch.equal(decode(actual).cpu(), reference.decode(expected))


def test_strides_do_not_matter(draw: Draw) -> None:
    x = draw(140, 18, dtype=torch.bfloat16)
    for view in (x.t(), x[:, ::2], x[3:9, 5:], x[:1].expand(5, -1)):
        assert_same(encode(view.to(DEVICE), 8), reference.encode(view.contiguous(), 8))


@pytest.mark.parametrize("bits", [4, 8, 10, 12])
def test_fast_values_are_no_further_from_the_input(bits: int, draw: Draw) -> None:
    """FP32 logarithms, below 32 and wrong by a few 2^-24 of themselves, move a border by less than 2^-17 octaves: of
    two values that nearly tie the other may be taken, and a decoded value is wrong by that share."""
    slack = 2.0**-17
    for dtype in (torch.float32, torch.bfloat16):
        x = hard_rows(draw, dtype)
        exact = reference.decode(reference.encode(x, bits)).double()
        fast = encode(x.to(DEVICE), bits, work=torch.float32)
        for mine in (reference.decode(moved(fast, torch.device("cpu"))), decode(fast, work=torch.float32).cpu()):
            excess = (mine.double() - x.double()).abs() - (exact - x.double()).abs()
            assert (excess <= slack * x.double().abs()).all()
    truncated = reference.from_codes(
        *((reference.unpack_bits(fast.data.cpu(), bits, 300) - 1).clamp(min=0), fast.minimum.cpu(), fast.step.cpu()),
        bits,
    )
    assert ((truncated.double() - x.double()).abs() - (exact - x.double()).abs() > slack * x.double().abs()).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused_or_stays_so(bad: float, draw: Draw) -> None:
    x = draw(3, 300)
    x[1, 150] = bad
    with pytest.raises(ValueError, match=r"the rows, shape \[3, 300\], holds"):
        encode(x.to(DEVICE), 8, name="the rows")
    values = decode(encode(x.to(DEVICE), 8, check=False)).cpu()
    expected = reference.decode(reference.encode(x, 8, check=False))
    assert torch.equal(values.isnan(), expected.isnan()) and values.isnan().any()
    assert torch.equal(values.nan_to_num(), expected.nan_to_num())


def test_wrong_inputs_are_refused(draw: Draw) -> None:
    x = draw(4, 8).to(DEVICE)
    with pytest.raises(ValueError, match="4 to 12 bits, not 13"):
        encode(x, 13)
    with pytest.raises(ValueError, match=r"float64 \[4, 8\]"):
        encode(x.double(), 8)
    good = encode(x, 8)
    with pytest.raises(ValueError, match=r"not \[\[4, 8\], \[3, 1\], \[4, 1\]\]"):
        decode(LogFmt(data=good.data, minimum=good.minimum[:3], step=good.step, bits=8, columns=8))


def test_a_gpu_s_matrices_are_encoded_by_the_kernel(
    draw: Draw, monkeypatch: pytest.MonkeyPatch, with_triton: Callable[[], object]
) -> None:
    """FP64, which it does not take, by the reference."""
    seen: list[object] = []
    for name, function in (("encode", encode), ("decode", decode)):
        monkeypatch.setattr(logfmt_triton, name, lambda *rest, f=function: [seen.append(f), f(*rest)][1])
    x = draw(5, 140)
    with with_triton() as device:
        ours = reference.encode(x.to(device), 9)
        assert_same(ours, reference.encode_reference(x, 9))
        assert torch.equal(reference.decode(ours).cpu(), reference.decode_reference(moved(ours, torch.device("cpu"))))
        assert seen == [encode, decode]
        reference.decode(reference.encode(x.double().to(device), 9), torch.float64)
        with pytest.raises(ValueError, match="LogFMT has 4 to 12 bits, not 13"):
            reference.encode(x.to(device), 13)
        x[2, 3] = torch.inf
        with pytest.raises(ValueError, match=r"a gate, shape \[5, 140\], holds 0 NaN and 1 infinite"):
            reference.encode(x.to(device), 9, name="a gate")
