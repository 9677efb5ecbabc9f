"""The calibration's bookkeeping on made-up times, one real run of a few operations, and two ranks."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dovetail.calibrate import machine as module
from dovetail.calibrate.machine import calibrate, describe, dump
from dovetail.calibrate.memory_work import memory_work
from dovetail.calibrate.timing import Times, run_in_rounds
from dovetail.calibrate.work import attention_work, launch_work, product_work
from dovetail.catalog.hardware import load_cluster
from dovetail.cost.roofline import op_time
from dovetail.spec.hardware import Link

CPU = torch.device("cpu")


def all_works():
    return [*launch_work(CPU), *memory_work(CPU), *attention_work(CPU), *product_work(CPU)]


def test_the_tenth_percentile_counts():
    times = Times(tuple(float(each) for each in range(100, 0, -1)))
    assert (times.fastest, times.value, times.median) == (1.0, 11.0, 50.5)
    assert Times((3.0,)).value == 3.0


def made_up(works, launch=10e-6):
    """Products at 1 TFLOP/s (FP8 and FP32 half that), memory at 20 GB/s, attention at 0.25 TFLOP/s, with a launch."""
    times = {}
    for work in works:
        if work.product is not None:
            op = work.product
            flop = 2.0 * op.groups * math.ceil(op.m) * op.n * math.ceil(op.k)
            seconds = flop / (1e12 if op.format == "bf16" else 0.5e12) + launch
        elif work.kind == "attention":
            seconds = work.flop / 0.25e12 + work.other_bytes / 20e9 + launch
        elif work.kind == "copy":
            seconds = work.bytes / 20e9
        elif work.kind == "launch":
            seconds = work.weight * launch
        else:
            seconds = work.bytes / 20e9 + launch
        times[work.name] = Times((seconds,) * 20)
    return times


def test_a_machine_is_described_by_its_times():
    works = all_works()
    gpu = describe(works, made_up(works), CPU, "made up")
    assert gpu.bandwidth_gbs == pytest.approx(20)
    assert gpu.efficiency.memory.value == pytest.approx(1)
    assert gpu.efficiency.attention_prefill.value == pytest.approx(0.25)
    assert gpu.efficiency.launch_us.value == pytest.approx(10)
    peaks = gpu.peak_tflops
    assert (peaks.bf16, peaks.fp32, peaks.fp8) == pytest.approx((1, 0.5, 0.5))
    # What is predicted is what was measured, launch and all. (A plan's weight gradients are added up in FP32, which
    # a single product does not do.)
    times = made_up(works)
    for work in works:
        if work.product is not None and work.product.pass_ != "wgrad":
            assert op_time(work.product, gpu).seconds.value == pytest.approx(times[work.name].value, rel=0.1)


def test_works_have_distinct_names_and_cover_formats_and_passes():
    works = all_works()
    assert len({work.name for work in works}) == len(works)
    products = [work.product for work in works if work.product is not None]
    assert {op.format for op in products} == {"bf16", "fp8", "fp32"}
    assert {op.pass_ for op in products} == {"forward", "dgrad", "wgrad"}
    assert any(op.groups > 1 for op in products)


@pytest.mark.parametrize("format", ["bf16", "fp32", "fp8"])
def test_each_kind_of_product_runs_and_has_its_shape(format):
    chosen = {}
    for work in product_work(CPU):
        op = work.product
        if op.format == format and op.m < 2048:
            chosen.setdefault((op.pass_, op.groups > 1), work)
    assert len(chosen) >= (3 if format == "fp32" else 6)
    for work in chosen.values():
        op = work.product
        result = work.prepare()()
        assert result.numel() == op.groups * math.ceil(op.m) * op.n
        assert result.isfinite().all()


def test_the_other_operations_run():
    works = [*launch_work(CPU), *(work for work in memory_work(CPU) if work.kind != "copy"), *attention_work(CPU)]
    times = run_in_rounds(works, 0.05, CPU)
    assert all(0 < each.fastest <= each.value <= each.median < 30 for each in times.values())


def few_works(monkeypatch):
    products = product_work(CPU)
    few = [next(work for work in products if work.product.format == format) for format in ("bf16", "fp32", "fp8")]
    monkeypatch.setattr(module, "product_work", lambda device: few)
    monkeypatch.setattr(module, "memory_work", lambda device: [w for w in memory_work(device) if w.name != "add"])


def test_the_file_that_is_written_is_the_cluster_that_was_measured(tmp_path, monkeypatch):
    few_works(monkeypatch)
    path = tmp_path / "this.toml"
    cluster = calibrate(path, seconds=0.1)
    assert load_cluster(path) == cluster
    assert cluster.gpus == 1 and cluster.gpu.multiprocessors == torch.get_num_threads()
    assert cluster.gpu.memory_bytes > 1e8
    assert dump(cluster).count("\n    { format") == len(cluster.gpu.efficiency.gemms)
    assert [each.name for each in tmp_path.iterdir()] == ["this.toml"]


def test_a_name_that_would_not_be_read_as_a_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"this: expected a name that ends in \.toml"):
        calibrate(tmp_path / "this")
    with pytest.raises(ValueError, match="0 seconds to measure in"):
        module.measure(0.0)


RANK = """
import sys, torch, torch.distributed as dist
from dovetail.calibrate.timing import exchange_link
dist.init_process_group("gloo", init_method=sys.argv[1], rank=int(sys.argv[2]), world_size=4)
for ranks in (2, 4):
    print(exchange_link(torch.device("cpu"), ranks, "a test", size=1 << 16).model_dump_json())
dist.destroy_process_group()
"""


def test_ranks_exchange_among_a_node_and_among_all(tmp_path):
    meet = (tmp_path / "meet").as_uri()
    commands = [[sys.executable, "-c", RANK, meet, str(rank)] for rank in range(4)]
    ranks = [subprocess.Popen(each, stdout=subprocess.PIPE, text=True) for each in commands]
    outputs = [each.communicate(timeout=120)[0].splitlines() for each in ranks]
    assert [each.returncode for each in ranks] == [0, 0, 0, 0]
    for output in outputs:
        pair, whole = (Link.model_validate_json(line) for line in output)
        assert "2 ranks over gloo" in pair.achieved_gbs.source and "4 ranks over gloo" in whole.achieved_gbs.source
        for link in (pair, whole):
            assert 0 < link.achieved_gbs.low <= link.achieved_gbs.value <= link.gbs
            assert link.latency_us.value > 0.1


def test_a_calibration_does_not_read_the_catalogs_gpus():
    # A machine is described by what was measured on it: no figure of another may slip in.
    text = Path(module.__file__).read_text()
    assert "load_gpu" not in text and "borrow" not in text
