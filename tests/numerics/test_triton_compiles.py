"""Every Triton kernel compiles for Hopper as its wrapper launches it, which needs no GPU: what the interpreter lets
pass, the compiler may not.

In a process of its own, since TRITON_INTERPRET is read when Triton is imported. There the driver is a stand-in, and a
launch stops after the compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

PRODUCT = "wgmma.mma_async"
FP8_PRODUCT = "k32.f32.e4m3.e4m3"
CAST = "cvt.rn.satfinite.e4m3x2.f32"


@pytest.mark.slow
def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    counts = json.loads(run.stdout)
    assert len(counts) > 25
    for name, count in counts.items():
        has_product = name.startswith(("multiply", "sum_outer"))
        assert (count[PRODUCT] > 0) == has_product, name
        assert (count[FP8_PRODUCT] > 0) == (has_product and "widened" not in name), name
        is_e4m3 = name.startswith("_quantize") and "e5" not in name
        assert (count[CAST] > 0) == is_e4m3, name


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def compile_all() -> dict[str, dict[str, int]]:
    """How often each instruction is in the PTX of each kernel."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(Hopper())
    launch, ptx, label = JITFunction.run, {}, [""]

    def stop_before_launch(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        built = launch(kernel, *arguments, grid=grid, warmup=True, **options)
        assert built.asm["cubin"], "ptxas made nothing"
        ptx[f"{kernel.__name__}, {label[0]}"] = built.asm["ptx"]
        return built

    JITFunction.run = stop_before_launch
    for name, work in launches().items():
        label[0] = name
        work()
    return {name: {mark: text.count(mark) for mark in (PRODUCT, FP8_PRODUCT, CAST)} for name, text in ptx.items()}


def launches() -> dict[str, Callable[[], object]]:
    """Every wrapper, as for a GPU that casts to FP8. Matrices stay empty: nothing runs."""
    from dovetail.numerics import capability
    from dovetail.numerics.formats import logfmt_triton as logfmt
    from dovetail.numerics.formats import quantize_triton as quantisation
    from dovetail.numerics.formats import rounding_triton
    from dovetail.numerics.formats.quantized import LogFmt, Quantized
    from dovetail.numerics.products import scaled_triton as products
    from dovetail.numerics.products.accumulators import Fp32Accumulator, HopperAccumulator
    from dovetail.numerics.products.scaled_blocks_triton import BLOCKINGS

    plain = rounding_triton.rounding

    def as_on_a_gpu(form: Any, power_of_two: bool, device: torch.device) -> Any:
        casts = form.name in capability.FP8
        return replace(plain(form, power_of_two, device), fused=True, casts=casts)

    quantisation.rounding = as_on_a_gpu  # type: ignore[attr-defined]
    x = torch.zeros(256, 1024, dtype=torch.bfloat16)
    row, block, column = (
        quantisation.empty_quantized((256, 1024), tile, "e4m3", x.device) for tile in ((1, 128), (128, 128), (128, 1))
    )
    ragged = quantisation.empty_quantized((256, 1000), (1, 128), "e4m3", x.device)
    counts, parts = torch.zeros(2, dtype=torch.int32), torch.tensor([[0, 3], [3, 131], [131, 256]])
    packed = torch.zeros(256, 1500, dtype=torch.uint8)
    e5m6 = Quantized(data=packed, scale=ragged.scale, tile=(1, 128), format="e5m6", columns=1000)
    kept = row.data, parts, (128, 1), "e4m3", False, row.scale
    kept_e5m6 = quantisation.numbers_of(e5m6), parts, (128, 1), "e4m3", True, ragged.scale

    def stacked(each: Quantized, count: int) -> Quantized:
        return replace(each, data=torch.stack([each.data] * count), scale=torch.stack([each.scale] * count))

    def by_rows(rows: Quantized, weight: Quantized, *rest: Any, **options: Any) -> object:
        return products.fprop(rows, stacked(weight, 1), [0, 256], *rest, **options)

    shards = torch.zeros(2, 1000, 256).to(torch.float8_e4m3fn)
    experts = Quantized(data=shards, scale=torch.ones(2, 8, 2), tile=(128, 128))
    ragged_rows = replace(column, scale=column.scale[:1].expand(3, -1))
    sent = LogFmt(
        data=torch.zeros(256, 1280, dtype=torch.uint8), minimum=row.scale, step=row.scale, bits=10, columns=1024
    )
    found: dict[str, Callable[[], object]] = {
        "columns of experts": lambda: quantisation.quantize_parts(x, parts, (128, 1)),
        "re-tiled": lambda: quantisation.quantize_parts(*kept),
        "re-tiled from E5M6": lambda: quantisation.quantize_parts(*kept_e5m6),
        "blocks of experts": lambda: quantisation.quantize_parts(x, parts, (128, 128)),
        "restored": lambda: quantisation.dequantize(row, torch.bfloat16),
        "restored from FP16": lambda: quantisation.dequantize(e5m6, torch.float32),
        "dgrad of experts": lambda: products.dgrad(ragged, experts, [0, 3, 256]),
        "wgrad of experts": lambda: products.wgrad(ragged_rows, ragged_rows, [0, 3, 256]),
        "strided": lambda: quantisation.quantize(x[:, ::2], (1, 128), check=False),
        "e5m6": lambda: quantisation.quantize(x, (1, 128), "e5m6", check=False),
        "e5m2": lambda: quantisation.quantize(x, (1, 128), "e5m2", check=False),
        "ragged K": lambda: by_rows(ragged, ragged),
        "rows by rows": lambda: by_rows(row, row, dtype=torch.float32),
        "promoted every 32": lambda: by_rows(row, block, HopperAccumulator(32)),
        "widened": lambda: by_rows(row, block, Fp32Accumulator()),
        "contiguous": lambda: products.fprop(row, stacked(block, 2), [0, 100, 256]),
        "masked": lambda: products.masked_fprop(row, stacked(block, 2), counts),
        "wgrad": lambda: products.wgrad(column, column, [0, 128, 256]),
        "wgrad of one, in FP32": lambda: products.wgrad(column, column, [0, 256], dtype=torch.float32),
        "decode": lambda: logfmt.decode(sent),
        "decode in FP32": lambda: logfmt.decode(sent, torch.bfloat16, torch.float32),
        "encode": lambda: logfmt.encode(x, 9, check=False),
        "encode in FP32": lambda: logfmt.encode(x, 10, check=False, work=torch.float32),
    }
    for tile in ((1, 128), (128, 128), (128, 1)):
        for rule in (False, True):
            found[f"{tile}, power of two {rule}"] = lambda t=tile, p=rule: quantisation.quantize(x, t, "e4m3", p, False)
    for each in BLOCKINGS:
        found[f"{each}"] = lambda b=each: by_rows(row, block, blocking=b)
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(compile_all()))
