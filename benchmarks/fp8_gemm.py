"""Block-scaled FP8 products on one GPU, at the shapes that DeepGEMM publishes: ours, torch's own, and BF16.

Each product is checked before it is timed: all of it against the FP32 product of the dequantised operands, and a
corner of it against `numerics.products.scaled_reference`, the reference, with its model of Hopper's accumulator.
Floor: the slower of FLOP at the measured FP8 rate and bytes at the measured memory rate.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from typing import Annotated, Any

import torch
import typer
from _gpu import Ceilings, Times, describe_gpu, measure_ceilings, reason, require_gpu, time_gpu
from _products import BF16, LIBRARY, Case, Sides, cases, prepare
from _sides import append_rows, print_table, progress
from torch import Tensor

from dovetail.numerics.formats.errors import normwise_error, tolerance
from dovetail.numerics.formats.quantize import dequantize
from dovetail.numerics.formats.quantized import Quantized
from dovetail.numerics.products import scaled_reference as reference
from dovetail.numerics.products.accumulators import HopperAccumulator

OURS = "dovetail"
HOPPER = (9, 0)
CORNER = 32  # rows and columns of the part that the reference computes
# Hopper keeps 13 fraction bits of each addend and of the sum of 128; beside the largest output that is far below:
ACCUMULATION = 2.0**-10


def check(case: Case, sides: Sides, result: Tensor) -> tuple[float, float]:
    """Error of the whole result, and share of the corner's values that are bit for bit the reference's.

    ValueError where either is further off than its format and length allow.
    """
    inner = sides.products[0][0].data.shape[1]
    allowed = tolerance(result.dtype, terms=inner) + ACCUMULATION
    worst, equal = 0.0, 1.0
    for (a, b), part in zip(sides.products, sides.parts(result), strict=True):
        worst = max(worst, normwise_error(part, _full_product(a, b)))
        corner = reference.product(_corner(a), _corner(b), HopperAccumulator(), result.dtype)
        ours = part[:CORNER, :CORNER].cpu()
        worst = max(worst, normwise_error(ours, corner))
        equal = min(equal, (ours == corner).float().mean().item())
    if not worst <= allowed:
        raise ValueError(f"{case.label}: error {worst:.2e} of the largest output, allowed are {allowed:.2e}")
    return worst, equal


def _full_product(a: Quantized, b: Quantized) -> Tensor:
    assert not torch.backends.cuda.matmul.allow_tf32
    return dequantize(a) @ dequantize(b).t()


def _corner(quantized: Quantized) -> Quantized:
    """The first CORNER rows, on the CPU."""
    scale = quantized.scale[: max(1, CORNER // quantized.tile[0])].cpu()
    return replace(quantized, data=quantized.data[:CORNER].cpu(), scale=scale)


def measure(case: Case, device: torch.device, repeats: int, tune: bool) -> tuple[dict[str, Times], dict[str, str], Any]:
    """Times by side, reasons by side that did not run, and (error, share of equal bits)."""
    from dovetail.numerics.products.scaled_blocks_triton import BLOCKINGS

    sides, times, refused = prepare(case, device), {}, {}
    checked = check(case, sides, sides.ours(None))
    times[OURS] = time_gpu(lambda: sides.ours(None), repeats)
    if tune:
        for blocking in BLOCKINGS:
            name = f"{OURS} {blocking.rows}x{blocking.columns} warps {blocking.warps} stages {blocking.stages}"
            times[name] = time_gpu(lambda blocking=blocking: sides.ours(blocking), repeats)  # type: ignore[misc]
    for name, work in sides.rivals.items():
        try:
            if name == LIBRARY:
                check(case, sides, work())
            times[name] = time_gpu(work, repeats)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            refused[name] = reason(error)
    return times, refused, checked


def row(
    case: Case, side: str, times: dict[str, Times], ceilings: Ceilings, checked: tuple[float, float]
) -> dict[str, Any]:
    seconds = times[side].median
    peak = ceilings.bf16_flop_per_s if side == BF16 else ceilings.fp8_flop_per_s
    num_bytes = case.num_bytes * (2 if side == BF16 else 1)
    floor = max(case.flop / peak, num_bytes / ceilings.memory_bytes_per_s)
    others = {name: times[name].median / seconds for name in (BF16, LIBRARY) if name in times}
    return {
        **{key: value for key, value in asdict(case).items() if key != "published"},
        "side": side,
        **times[side].summary(),
        "tflops": case.flop / seconds / 1e12,
        "gb_per_s": num_bytes / seconds / 1e9,
        "floor_s": floor,
        "share_of_floor": floor / seconds,
        "times_faster_than": others,
        "published_tflops_h800": case.published,
        "error": checked[0] if side != BF16 else None,
        "share_of_reference_bits": checked[1] if side == OURS else None,
    }


def main(
    layout: Annotated[list[str] | None, typer.Option(help="dense, contiguous, masked, wgrad; all if none")] = None,
    tune: Annotated[bool, typer.Option(help="Also time every blocking of ours.")] = False,
    repeats: int = 20,
    record: bool = True,
) -> None:
    device = require_gpu(HOPPER)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    ceilings, rows, lines, notes, failures = measure_ceilings(), [], [], [], []
    for case in cases():
        if layout and case.layout not in layout:
            continue
        progress(case.label)
        try:
            times, refused, checked = measure(case, device, repeats, tune)
        except ValueError as error:
            failures.append(str(error))
            continue
        here = [row(case, side, times, ceilings, checked) for side in times]
        rows += [{**each, "gpu": describe_gpu(), "ceilings": asdict(ceilings)} for each in here]
        lines += [line(case, each) for each in here]
        notes += [f"{case.label}: no {side}: {why}" for side, why in refused.items()]
        if BF16 in times and times[BF16].median < times[OURS].median:
            notes.append(f"{case.label}: BF16 is faster than block-scaled FP8 here and should be used")
        torch.cuda.empty_cache()
    print(f"block-scaled FP8 products; measured ceilings: {ceilings}")
    columns = ["case", "side", "us", "TFLOPS", "GB/s", "of floor", "x BF16", "x scaled_mm", "x H800", "error", "= ref"]
    print_table(columns, lines)
    print(*notes, *failures, sep="\n")
    if record and rows:
        append_rows("fp8_gemm", rows)
    if failures:
        sys.exit(f"{len(failures)} products were wrong and not timed.")


def line(case: Case, each: dict[str, Any]) -> list[str]:
    others, published = each["times_faster_than"], each["published_tflops_h800"]
    return [
        case.label,
        each["side"],
        f"{each['median_s'] * 1e6:.1f}",
        f"{each['tflops']:.0f}",
        f"{each['gb_per_s']:.0f}",
        f"{each['share_of_floor']:.0%}",
        f"{others[BF16]:.2f}" if BF16 in others else "-",
        f"{others[LIBRARY]:.2f}" if LIBRARY in others else "-",
        f"{each['tflops'] / published:.2f}" if published and each["side"] != BF16 else "-",
        f"{each['error']:.1e}" if each["error"] is not None else "-",
        f"{each['share_of_reference_bits']:.0%}" if each["share_of_reference_bits"] is not None else "-",
    ]


if __name__ == "__main__":
    typer.run(main)
