"""Times against the measurements they come from, the datasheet's limits, and what must change how."""

import math
import time
from statistics import median

import pytest

from dovetail.catalog.hardware import gpu_names, load_gpu
from dovetail.cost.ops import Attention, Elementwise, Gemm
from dovetail.cost.roofline import op_time
from dovetail.cost.shares import gemm_share

H800 = load_gpu("h800")


def gemm(m: float, n: int, k: float, **changes) -> Gemm:
    return Gemm(**{"name": "x", "pass_": "forward", "m": m, "n": n, "k": k, "format": "fp8", **changes})


def rate(op: Gemm) -> float:
    """TFLOPS without the launch."""
    seconds = op_time(op, H800).seconds.value - H800.efficiency.launch_us.value * 1e-6
    return op.flop / seconds / 1e12


@pytest.mark.parametrize("point", H800.efficiency.gemms, ids=lambda p: f"{p.layout}-{p.m}-{p.n}-{p.k}")
def test_a_measured_product_takes_what_was_measured(point):
    op = gemm(point.m, point.n, point.k, groups=point.groups, layout=point.layout)
    # FP8 operands here are counted with their scales, three percent more bytes.
    assert rate(op) == pytest.approx(point.tflops, rel=0.032)
    seconds = op_time(op, H800).seconds
    assert seconds.low < seconds.value < seconds.high


def test_small_products_follow_bytes_and_large_ones_flop():
    few, many = gemm(96, 7168, 2048), gemm(6000, 7168, 2048)
    assert op_time(few, H800).bound == "memory" and op_time(many, H800).bound == "compute"
    gbs = few.bytes * rate(few) / few.flop * 1e3
    assert 2277 <= gbs <= 2470 * 1.03  # between the rows of M = 128 and M = 64
    assert 1025 < rate(many) < 1350
    # Four times the weights in a memory-bound product: four times the time.
    assert rate(gemm(16, 7168, 2048, groups=4)) == pytest.approx(rate(gemm(16, 7168, 2048)))


def test_bands_hold_what_was_measured_where_it_is_left_out():
    points, inside, errors = H800.efficiency.gemms, 0, []
    for index, point in enumerate(points):
        others = H800.efficiency.model_copy(update={"gemms": points[:index] + points[index + 1 :]})
        gpu = H800.model_copy(update={"efficiency": others, "name": f"without {index}"})
        share = gemm_share(gpu, "fp8", point.layout, point.m, point.n, point.k).band
        measured = H800.ideal_seconds(point) * point.speed.value / point.flop
        inside += share.low <= measured <= share.high
        errors.append(abs(math.log(share.value / measured)))
    # One root mean square to either side: two thirds of what is normally distributed.
    assert inside >= len(points) * 0.6
    assert median(errors) < 0.10 and max(errors) < 0.35


def test_a_shape_far_from_all_measured_has_a_wider_band():
    near, far = (gemm_share(H800, "fp8", "dense", *shape).band for shape in ((4000, 7168, 16000), (300, 128, 128)))
    assert far.high / far.low > 1.3 * near.high / near.low


@pytest.mark.parametrize("name", gpu_names())
@pytest.mark.parametrize("format", ["fp8", "bf16", "fp32"])
def test_nothing_beats_the_datasheet(name, format):
    gpu = load_gpu(name)
    for shape in ((1, 512, 512), (64, 7168, 2048), (4096, 129280, 7168), (7168, 2048, 8192)):
        op = gemm(*shape, format=format)
        ideal = max(op.flop / gpu.peak(format), op.bytes / gpu.bandwidth)
        seconds = op_time(op, gpu).seconds
        assert ideal <= seconds.low <= seconds.value <= seconds.high < 100 * ideal + 1e-4


def test_bf16_is_between_fp8s_share_and_the_throttled_clock():
    op = gemm(4096, 7168, 16384, format="bf16")
    assert 0.72 * 990 <= rate(op) <= 865


def test_fewer_multiprocessors_slow_compute_only():
    compute, memory = gemm(4096, 7168, 16384), Elementwise(name="x", pass_="forward", bytes=1e9)
    all_of_them, fewer = op_time(compute, H800).seconds.value, op_time(compute, H800, 112).seconds.value
    launch = H800.efficiency.launch_us.value * 1e-6
    assert (fewer - launch) / (all_of_them - launch) == pytest.approx(132 / 112)
    assert op_time(memory, H800, 112).seconds == op_time(memory, H800).seconds
    for wrong in (0, 133):
        with pytest.raises(ValueError, match=f"{wrong} multiprocessors of h800: expected 1 to 132"):
            op_time(compute, H800, wrong)


def attention(**changes) -> Attention:
    fields = {"tokens": 4096, "context": 4096, "heads": 128, "qk_dim": 192, "v_dim": 128, "pass_": "forward"}
    return Attention(name="x", **{**fields, **changes})


def test_attention_in_training_is_what_kernels_reach_forward_and_backward():
    for pass_, low, high in (("forward", 515, 643), ("dgrad", 445, 545)):
        op = attention(pass_=pass_)
        timed = op_time(op, H800)
        assert timed.bound == "compute"
        assert low <= op.flop / timed.seconds.value / 1e12 <= high


def test_absorbed_attention_of_v3_reaches_flashmlas_660_tflops():
    op = attention(tokens=128, sequences=128, context=4096, qk_dim=576, v_dim=512, absorbed=True)
    timed = op_time(op, H800)
    # 128 heads on one latent are just compute-bound: FlashMLA's README.
    assert timed.bound == "compute"
    assert op.flop / timed.seconds.value / 1e12 == pytest.approx(660, rel=0.02)
    few_heads = attention(tokens=128, sequences=128, context=4096, heads=16, qk_dim=576, v_dim=512, absorbed=True)
    timed = op_time(few_heads, H800)
    assert timed.bound == "memory"
    assert few_heads.bytes / timed.seconds.value / 1e9 == pytest.approx(3000, rel=0.03)


def test_no_work_takes_no_time_and_a_little_is_bound_by_its_launch():
    nothing = gemm(0, 7168, 2048, groups=0)
    assert op_time(nothing, H800).seconds.high == 0
    assert op_time(Elementwise(name="x", pass_="forward", bytes=64), H800).bound == "launch"


def test_times_say_their_formula_and_source():
    timed = op_time(gemm(4096, 7168, 16384, format="bf16"), H800)
    assert "bf16 1 x [4096 x 16384 x 7168]" in timed.formula and "compute" in timed.formula
    assert "DeepGEMM" in timed.source and "unverified" in timed.source


def test_a_plan_of_a_hundred_operations_is_timed_in_milliseconds():
    ops = [gemm(m, 7168, 2048) for m in range(1, 101)]
    for op in ops:
        op_time(op, H800)
    start = time.perf_counter()
    for op in ops:
        op_time(op, H800)
    assert time.perf_counter() - start < 0.02
