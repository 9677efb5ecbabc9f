"""FLOP and bytes of single records, by hand and against published intensities."""

import pytest

from dovetail.cost.ops.ops import Attention, Gemm


def test_a_product_reads_operands_and_writes_its_result() -> None:
    """[DeepGEMM]'s GB/s: 4096 x 7168 x 16384 at 1358 TFLOPS is 343 GB/s, without scales."""
    op = Gemm(name="o_proj", pass_="forward", m=4096, n=7168, k=16384, format="fp8")
    assert op.flop == 2 * 4096 * 7168 * 16384
    assert op.bytes == (4096 * 16384 + 16384 * 7168) * (1 + 4 / 128) + 2 * 4096 * 7168
    seconds = op.flop / 1358e12
    assert op.bytes / seconds / 1e9 == pytest.approx(343, rel=0.03)


def test_formats_of_operands_and_results() -> None:
    sizes = {"name": "x", "m": 2, "n": 3, "k": 128, "groups": 5}
    assert Gemm(**sizes, pass_="forward").bytes == 5 * (2 * 5 * 128 + 2 * 6)
    assert Gemm(**sizes, pass_="forward", format="fp32").bytes == 5 * (4 * 5 * 128 + 4 * 6)
    # A weight gradient is added to one in FP32: read and written.
    assert Gemm(**sizes, pass_="wgrad").bytes == 5 * (2 * 5 * 128 + 8 * 6)
    assert Gemm(**sizes, pass_="wgrad", is_added=False).bytes == 5 * (2 * 5 * 128 + 2 * 6)


def test_weights_of_groups_without_rows_are_not_read() -> None:
    op = Gemm(name="x", pass_="forward", m=2, n=3, k=128, groups=5, filled=0.4)
    assert op.bytes == 5 * 2 * 128 * 2 + 2 * 3 * 128 * 2 + 5 * 2 * 3 * 2
    assert op.flop == 2 * 5 * 2 * 3 * 128


def attention(**changes: object) -> Attention:
    sizes = {"name": "x", "pass_": "forward", "tokens": 10, "context": 10, "heads": 3, "qk_dim": 192, "v_dim": 128}
    return Attention(**{**sizes, **changes})


def test_attention_forward_and_backward() -> None:
    assert attention(causal=False).flop == 2 * 3 * 10 * 10 * (192 + 128)
    assert attention().flop == attention(causal=False).flop / 2  # the lower triangle [ISCA Table 4]
    backward = attention(pass_="dgrad").flop / attention().flop
    assert backward == pytest.approx((3 * 192 + 2 * 128) / (192 + 128))
    square = attention(qk_dim=128, pass_="dgrad").flop / attention(qk_dim=128).flop
    assert square == 2.5  # five products against two, where both dims are the same


def test_a_prefix_is_seen_by_all_and_new_tokens_by_half() -> None:
    assert attention(context=100).visible == 90 + 5
    assert attention(tokens=20, context=100, sequences=2).visible == 90 + 5
    assert attention(tokens=2, sequences=2, context=100, causal=False).visible == 100


def test_absorbed_attention_reads_one_key_for_all_heads() -> None:
    expanded = attention(tokens=1, context=5000, causal=False)
    absorbed = attention(tokens=1, context=5000, causal=False, qk_dim=576, v_dim=512, absorbed=True)
    assert expanded.bytes == pytest.approx(5000 * 3 * (192 + 128) * 2, rel=1e-3)
    assert absorbed.bytes == pytest.approx(5000 * 576 * 2, rel=2e-3)
    half = attention(tokens=1, context=5000, qk_dim=576, v_dim=512, absorbed=True, cache_element_bytes=1)
    assert half.bytes == pytest.approx(absorbed.bytes / 2, rel=2e-3)


def test_attention_bytes_by_hand() -> None:
    own = 10 * 3 * 2
    forward = own * (192 + 192 + 128 + 128) + 10 * 3 * 4
    assert attention().bytes == forward
    assert attention(pass_="dgrad").bytes == 2 * (forward - 10 * 3 * 4) + 10 * 3 * 4
