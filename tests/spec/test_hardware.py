import pytest

from dovetail.config import validate
from dovetail.spec.hardware import Link
from dovetail.spec.measurements import Estimate, GemmPoint, GemmSweep, merged, moved_seconds


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value=value, low=low, high=high, source="a test")


def test_an_estimate_lies_in_its_band():
    assert estimate(2, 1, 3).band.high == 3
    with pytest.raises(ValueError, match="low <= value <= high"):
        estimate(2, 2.5, 3)


def test_a_link_does_not_carry_more_than_its_datasheet_says():
    with pytest.raises(ValueError, match="up to 60 is more than the datasheet's 50"):
        Link(gbs=50, achieved_gbs=estimate(40, 38, 60), latency_us=estimate(3, 2, 4))


def test_base_units():
    link = Link(gbs=50, achieved_gbs=estimate(40, 38, 45), latency_us=estimate(3.7, 2.8, 4))
    assert link.bandwidth.value == 40e9
    assert link.latency.value == pytest.approx(3.7e-6)


def test_bytes_of_a_product_are_those_that_deepgemm_counts():
    # 206 TFLOPS of 64 x 2112 x 7168 are printed beside 1688 GB/s.
    point = GemmPoint(format="fp8", m=64, n=2112, k=7168, tflops=206)
    assert point.bytes / (point.flop / point.speed.value) / 1e9 == pytest.approx(1688, rel=0.001)


@pytest.mark.parametrize("bad", [{"low": 7.0}, {"high": 1.0}, {"tflops": -1.0}, {"m": 0}, {"layout": "sparse"}])
def test_a_wrong_product_is_an_error(bad):
    with pytest.raises(ValueError, match="GEMM"):
        validate(GemmPoint, {"format": "bf16", "m": 1, "n": 1, "k": 1, "tflops": 5.0, **bad}, "GEMM")


def test_a_sweep_is_its_points():
    sweep = GemmSweep(format="fp8", n=576, k=7168, m=(16, 4096), microseconds=(9.932, 34.493))
    # The shares of 1979 TFLOPS that are published beside these times.
    assert [point.tflops / 1979 for point in sweep.points] == pytest.approx([0.006722, 0.495489], rel=1e-3)
    with pytest.raises(ValueError, match="2 values of m, but 1 of microseconds"):
        validate(GemmSweep, {"format": "fp8", "n": 1, "k": 1, "m": (1, 2), "microseconds": (1,)}, "GEMM")


def test_of_one_shape_measured_twice_the_last_counts_and_both_are_its_band():
    points = [GemmPoint(format="bf16", m=1, n=2, k=3, tflops=tflops) for tflops in (5.0, 3.0)]
    (point,) = merged(points)
    assert (point.tflops, point.low, point.high) == (3.0, 3.0, 5.0)
    assert len(merged([points[0], points[1].model_copy(update={"m": 2})])) == 2


def test_what_waits_takes_as_long_elsewhere():
    assert moved_seconds(10.0, ratio=4, share=0.7, best=0.7) == 40.0
    assert moved_seconds(10.0, ratio=4, share=1e-9, best=0.7) == pytest.approx(10.0)
    assert 10.0 < moved_seconds(10.0, ratio=4, share=0.2, best=0.7) < 40.0
